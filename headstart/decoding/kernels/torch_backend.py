"""The backend of torch's operators: every model on every device, in fixed shapes where decoding must be exact."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headstart.decoding.kernels.backend import Backend
from headstart.decoding.kernels.blocks import BlockLinear, Weight
from headstart.model.transformer import Transformer


class TorchBackend(Backend):
    """Run products in oneDNN's packed layout where the CPU has it, else as plain products."""

    def __init__(self, model: Transformer, rows: int, form: str | None) -> None:
        super().__init__(model, rows, form)
        self._packs = can_pack(model.device, model.dtype)

    @classmethod
    def supports(cls, model: Transformer) -> bool:
        """Return True: torch's operators run every model."""
        return True

    def linear(self, weight: Weight, bias_N: Tensor | None) -> nn.Module:
        """Return a `BlockLinear`, a `PackedLinear` or a `PlainLinear`."""
        if isinstance(weight, tuple):
            return BlockLinear(weight, bias_N)
        return PackedLinear(weight, bias_N, self.rows) if self._packs else PlainLinear(weight, bias_N)


class PackedLinear(nn.Module):
    """Compute x W^T + b with the weight in oneDNN's blocked layout, for inference on a CPU.

    A product of few rows with the plain layout reaches a third of the memory bandwidth, with the blocked one nearly all
    of it (docs/lab-notes.md). A row of the result does not depend on its place among the others.
    """

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None, rows: int) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach(), rows)
        self.bias = None if bias_N is None else bias_N.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class PlainLinear(nn.Module):
    """Compute x W^T + b with the weight as it is stored."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        super().__init__()
        self.weight = weight_NK.detach()
        self.bias = None if bias_N is None else bias_N.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        return nn.functional.linear(x, self.weight, self.bias)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether this machine's oneDNN takes packed weights of this type."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
