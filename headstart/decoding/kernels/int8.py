"""Multiply int8 weights with int8 activations in torch's operators; `cpu/int8.h` computes the same faster.

Weights are symmetric with a scale for each output, and use 7 of the 8 bits (-63 to 63): no 16-bit sum of AVX2's
instructions overflows then, and quality does not suffer (docs/lab-notes.md). Activations are symmetric too, with a
scale for each row that comes from the row itself: a row's result depends on that row and the weights alone. Sums are
exact.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from headstart.errors import UsageError

Quantize = Literal["int8"]
WEIGHT_STEPS = 63
ROW_STEPS = 127
_MOST = 1 << 17
"""The most products of 255 * 63 whose sum is below 2^31."""
_EXACT = 1 << 11
"""The most products of 127 * 63 whose sum is below 2^24, so that fp32 adds them exactly in any order."""


def parse_quantize(name: str | None) -> Quantize | None:
    """Return `name` if it names a way to quantize. Raises UsageError for any other name."""
    if name not in (None, "int8"):
        raise UsageError(f"quantize {name!r} is unknown; take int8, or leave it out")
    return "int8" if name else None


def quantize_weight(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return (N, K) fp32 weights as whole numbers (N, K) int8, and the value of one step for each output, (N,) fp32.

    Raises UsageError for more inputs than an int32 sum can hold.
    """
    if weight_NK.shape[1] > _MOST:
        raise UsageError(
            f"int8 products take at most {_MOST:,} inputs, not {weight_NK.shape[1]:,}; decode without quantize"
        )
    top_N1 = weight_NK.abs().amax(1, keepdim=True)
    steps = torch.where(top_N1 > 0, WEIGHT_STEPS / top_N1, 0)
    return (weight_NK * steps).round_().to(torch.int8), top_N1[:, 0] / WEIGHT_STEPS


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (..., K) fp32 rows as whole numbers in fp32, and the value of one step for each row, (..., 1) fp32."""
    top = x.abs().amax(-1, keepdim=True)
    steps = torch.where(top > 1e-30, ROW_STEPS / top, 0)
    return (x * steps).round_(), top * (1 / ROW_STEPS)


class Int8Linear(nn.Module):
    """Compute x W^T + b with weights and rows rounded to int8, on every machine, more slowly than in fp32."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        super().__init__()
        whole_NK, self.scale_N = quantize_weight(weight_NK.detach())
        self.whole_NK = whole_NK.float()
        self.bias = None if bias_N is None else bias_N.detach().double()

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b in fp32."""
        whole, scale = quantize_rows(x)
        pieces = zip(whole.split(_EXACT, dim=-1), self.whole_NK.split(_EXACT, dim=1))
        total = sum(nn.functional.linear(a, w).double() for a, w in pieces)
        y = total.float().double() * (scale * self.scale_N).double()  # type: ignore[union-attr]
        return (y if self.bias is None else y + self.bias).float()
