"""int8 weights with int8 activations: what is computed, in torch's operators. `native/int8.h` computes the same faster.

Weights are symmetric with a scale for each output, and use 7 of the 8 bits (-63 to 63): then no 16-bit sum of AVX2's
instructions overflows, and it costs no quality (docs/lab-notes.md). Activations are symmetric too, with a scale for
each row that is found as it comes: a row's result depends on that row and the weights alone. Sums are exact.
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
"""So many products of 255 * 63 add up below 2^31."""
_EXACT = 1 << 11
"""So many products of 127 * 63 add up below 2^24: exactly, and in any order, in fp32."""


def parse_quantize(name: str | None) -> Quantize | None:
    """Return `name` if it names a way to quantize. Raises UsageError for any other name."""
    if name not in (None, "int8"):
        raise UsageError(f"quantize {name!r} is unknown; take int8, or leave it out")
    return "int8" if name else None


def quantize_weight(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) fp32 -> whole numbers (N, K) int8, and the value of one step for each output, (N,) fp32.

    Raises UsageError for more inputs than an int32 sum can hold."""
    if weight_NK.shape[1] > _MOST:
        raise UsageError(f"int8 products take at most {_MOST:,} inputs, not {weight_NK.shape[1]:,}; decode without")
    top_N1 = weight_NK.abs().amax(1, keepdim=True)
    steps = torch.where(top_N1 > 0, WEIGHT_STEPS / top_N1, 0)
    return (weight_NK * steps).round_().to(torch.int8), top_N1[:, 0] / WEIGHT_STEPS


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., K) fp32 -> whole numbers (..., K), still fp32, and the value of one step for each row, (..., 1) fp32."""
    top = x.abs().amax(-1, keepdim=True)
    steps = torch.where(top > 1e-30, ROW_STEPS / top, 0)
    return (x * steps).round_(), top * (1 / ROW_STEPS)


class Int8Linear(nn.Module):
    """y = x W^T + b, both rounded to int8: everywhere, and slower than the product in fp32."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        super().__init__()
        whole_NK, self.scale_N = quantize_weight(weight_NK.detach())
        self.whole_NK = whole_NK.float()
        self.bias = None if bias_N is None else bias_N.detach().double()

    def forward(self, x: Tensor) -> Tensor:
        whole, scale = quantize_rows(x)
        pieces = zip(whole.split(_EXACT, dim=-1), self.whole_NK.split(_EXACT, dim=1))
        total = sum(nn.functional.linear(a, w).double() for a, w in pieces)
        y = total.float().double() * (scale * self.scale_N).double()  # type: ignore[union-attr]
        return (y if self.bias is None else y + self.bias).float()
