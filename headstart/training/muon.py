"""Muon for matrices that are whole, or spread in shares over several processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

TOGETHER = 2**25
"""Most weights of whole matrices that are orthogonalized in one batch (at least one matrix). A batch of small matrices
is faster than one after the other, and the bound limits its memory."""


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, for plain parameters and FSDP2's DTensors.

    Its products run in `dtype`; torch's always run in bf16. Results equal torch's to rounding.

    A process holds some rows of every sharded matrix, but orthogonalizing a matrix needs all of it. So the updates of
    all matrices of one shape are stacked, and each process exchanges its share of all of them for some whole matrices,
    orthogonalizes these in one batch, and exchanges the results back. That takes two exchanges for each shape, in
    `dtype`, and the processes that share a copy compute no product twice.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float, dtype: torch.dtype) -> None:
        super().__init__(groups, lr=0.0, momentum=momentum, nesterov=True, adjust_lr_fn="match_rms_adamw")
        self._dtype = dtype

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters. A closure is not supported: several backward passes make one gradient."""
        assert closure is None
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in alike.items():
                sharded = isinstance(parameters[0], DTensor)
                size = len(parameters) if sharded else max(1, TOGETHER // shape.numel())
                rest = iter(parameters)
                while batch := list(islice(rest, size)):
                    self._update(batch, group)
        return None

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        lr, momentum = float(group["lr"]), group["momentum"]
        updates = []
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            # Elementwise, so the local shares suffice.
            mine, buffer = _local(gradient), _local(state["momentum_buffer"])
            buffer.lerp_(mine, 1 - momentum)
            updates.append(mine.lerp(buffer, momentum).to(self._dtype))
        first = parameters[0]
        exchange = _Exchange(parameters) if isinstance(first, DTensor) else None
        stacked = torch.stack(updates)
        whole = stacked if exchange is None else exchange.some_whole(stacked)
        whole = orthogonalize(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])
        for parameter, update in zip(parameters, whole if exchange is None else exchange.shares_of_all(whole)):
            local = _local(parameter)
            local.mul_(1 - lr * group["weight_decay"])
            local.add_(update, alpha=-lr * 0.2 * math.sqrt(max(first.shape)))


class _Exchange:
    """The exchange of some rows of all L matrices (M, N) of one shape for all rows of some of them, and back."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        first = parameters[0]
        assert isinstance(first, DTensor)
        self._mesh, rows, columns = first.device_mesh, *first.shape
        self._shape = torch.Size((len(parameters), rows, columns))
        self._copies = [Replicate()] * (self._mesh.ndim - 1)

    def some_whole(self, shares_LMN: Tensor) -> Tensor:
        return self._relaid(shares_LMN, 1, 0)

    def shares_of_all(self, whole_LMN: Tensor) -> Tensor:
        return self._relaid(whole_LMN, 0, 1)

    def _relaid(self, local: Tensor, before: int, after: int) -> Tensor:
        _, rows, columns = self._shape
        laid_out = DTensor.from_local(
            local,
            self._mesh,
            [*self._copies, Shard(before)],
            run_check=False,
            shape=self._shape,
            stride=(rows * columns, columns, 1),
        )
        return laid_out.redistribute(placements=[*self._copies, Shard(after)]).to_local()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def orthogonalize(x_LMN: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Approximate the nearest orthogonal matrix of each of L matrices (M, N).

    This is the Newton-Schulz iteration of torch's Muon, in the dtype of `x_LMN`.
    """
    a, b, c = coefficients
    tall = x_LMN.shape[1] > x_LMN.shape[2]
    x = x_LMN.mT if tall else x_LMN
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps if len(x) else 0):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
