"""Muon for matrices that lie in shares on several processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


class ShardedMuon(torch.optim.Muon):
    """`torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` over DTensor parameters sharded by rows, as FSDP2's are.

    A process holds some rows of every matrix, and orthogonalising a matrix needs all of it. So the updates of all
    matrices of one shape are stacked and exchanged, some whole matrices for a share of all of them; each process
    orthogonalises its own in one batch, and the results are exchanged back: two exchanges for each shape, in bf16, and
    no product computed twice among the processes that share a copy. Equal to torch's, which works in bf16, to rounding.
    """

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update. There is no closure here: several backward passes make one gradient."""
        assert closure is None
        for group in self.param_groups:
            alike: dict[torch.Size, list[DTensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(parameter.shape, []).append(parameter)
            for parameters in alike.values():
                self._update(parameters, group)
        return None

    def _update(self, parameters: list[DTensor], group: dict[str, Any]) -> None:
        lr, momentum = float(group["lr"]), group["momentum"]
        updates = []
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert isinstance(gradient, DTensor)
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            # Elementwise, so on the shares alone.
            mine, buffer = gradient.to_local(), state["momentum_buffer"].to_local()
            buffer.lerp_(mine, 1 - momentum)
            updates.append((mine.lerp(buffer, momentum) if group["nesterov"] else buffer).bfloat16())

        mesh, rows, columns = parameters[0].device_mesh, *parameters[0].shape
        shape = torch.Size((len(parameters), rows, columns))
        copies = [Replicate()] * (mesh.ndim - 1)

        def laid_out(local: Tensor, dimension: int) -> DTensor:
            return DTensor.from_local(
                local,
                mesh,
                [*copies, Shard(dimension)],
                run_check=False,
                shape=shape,
                stride=(rows * columns, columns, 1),
            )

        whole = laid_out(torch.stack(updates), 1).redistribute(placements=[*copies, Shard(0)]).to_local()
        whole = orthogonalize(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])
        shares = laid_out(whole, 0).redistribute(placements=[*copies, Shard(1)]).to_local()
        for parameter, share in zip(parameters, shares):
            local = parameter.to_local()
            local.mul_(1 - lr * group["weight_decay"])
            local.add_(share, alpha=-lr * 0.2 * math.sqrt(max(rows, columns)))


def orthogonalize(x_LMN: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The nearest orthogonal matrix, roughly, of each of L matrices (M, N): Newton-Schulz in bf16, as torch's Muon."""
    a, b, c = coefficients
    x = x_LMN.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps if len(x) else 0):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
