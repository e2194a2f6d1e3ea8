"""Weights in blocks: codes of 4, 5 or 8 bits with a scale for each group of 32 or 16 inputs, as GGUF files hold them.

`BlockWeight` is a matrix in this form, `quantize_blocks` makes it from fp32 weights, and `BlockLinear` multiplies with
it in torch's operators; `cpu/blocks.h` computes the same bits faster. Activations are quantized to 8 bits by groups of
32 inputs of a row. The products of a group are whole numbers, and their sums over groups are one chain of additions in
fp32: a row's result depends on that row and the weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, cast, get_args

import torch
from torch import Tensor, nn

from headstart.errors import UsageError

Quantize = Literal["q4", "q8"]
GROUP = 32
"""Inputs of a row of activations that share a scale, and of weights that Headstart itself quantizes."""
STEPS = 127
"""The largest code of an activation."""
_FP16 = (2.0**-14, 65504.0)
"""The range of scales that fp16 holds with all its digits."""


def parse_quantize(name: str | None) -> Quantize | None:
    """Return `name` if it names a way to quantize. Raises UsageError for any other name."""
    if name not in (None, *get_args(Quantize)):
        raise UsageError(f"quantize {name!r} is unknown; take {' or '.join(get_args(Quantize))}, or leave it out")
    return cast("Quantize | None", name)


@dataclass(frozen=True)
class BlockWeight:
    """A matrix (N, K) in blocks: weight = scale * code + minimum."""

    codes_NK: Tensor
    """int8: -2^(bits - 1) to 2^(bits - 1) - 1, or with minimums, for 4 and 5 bits, 0 to 2^bits - 1."""
    scales_NG: Tensor
    """fp16 or fp32, one per group of inputs."""
    minimums_NG: Tensor | None
    """Offsets, in the type of the scales; None: all are 0."""
    bits: int
    """The bits that a code takes in packed weights: 4, 5 or 8."""
    group: int = GROUP
    """The inputs that share a scale: 32, or 16 for codes of 8 bits. The last group of a row may have fewer."""

    @property
    def shape(self) -> torch.Size:
        """Numbers of outputs and inputs."""
        return self.codes_NK.shape

    def rows(self, rows: Tensor | slice) -> BlockWeight:
        """Return some rows of the matrix, in the order given."""
        minimums = None if self.minimums_NG is None else self.minimums_NG[rows]
        return BlockWeight(self.codes_NK[rows], self.scales_NG[rows], minimums, self.bits, self.group)

    def dequantize(self) -> Tensor:
        """Return the weights in fp32."""

        def spread(values_NG: Tensor) -> Tensor:
            return values_NG.float().repeat_interleave(self.group, 1)[:, : self.shape[1]]

        weight_NK = self.codes_NK * spread(self.scales_NG)
        return weight_NK if self.minimums_NG is None else weight_NK + spread(self.minimums_NG)


class BlockRows(Protocol):
    """A matrix whose rows are read when they are packed: a `BlockWeight`, or what a file holds."""

    @property
    def shape(self) -> torch.Size:
        """Numbers of outputs and inputs."""

    def rows(self, rows: Tensor | slice) -> BlockWeight:
        """Return some rows of the matrix, in the order given."""


Blocks = tuple[BlockRows, ...]
"""A matrix whose rows are those of several forms, one after another, such as q, k and v of a GGUF file."""


Weight = Tensor | Blocks
"""A matrix as a tensor or in blocks."""


def shape_of(weight: Weight) -> torch.Size:
    """Return the outputs and inputs of a matrix."""
    if isinstance(weight, Tensor):
        return weight.shape
    return torch.Size((sum(part.shape[0] for part in weight), weight[0].shape[1]))


def rows_of(weight: Weight, rows: Tensor) -> Weight:
    """Return some rows of a matrix, named in ascending order, in the form that the matrix has."""
    if isinstance(weight, Tensor):
        return weight[rows]
    found, first = [], 0
    for part in weight:
        here = rows[(rows >= first) & (rows < first + part.shape[0])] - first
        found += [part.rows(here)] if len(here) else []
        first += part.shape[0]
    return tuple(found)


def put_blocks(model: nn.Module, blocks: Mapping[str, Blocks]) -> None:
    """Put blocks in the place of parameters, by their names. Only `pack` can do something with the model."""
    for name, weight in blocks.items():
        place, _, attribute = name.rpartition(".")
        module = model.get_submodule(place)
        delattr(module, attribute)
        setattr(module, attribute, weight)


def in_blocks(weight: Weight, quantize: Quantize | None) -> Weight:
    """Return a weight, in blocks if it is stored so or is to be quantized."""
    return (quantize_blocks(weight, quantize),) if quantize and isinstance(weight, Tensor) else weight


@torch.no_grad()
def quantize_blocks(weight_NK: Tensor, quantize: Quantize) -> BlockWeight:
    """Return fp32 weights rounded to blocks: q4 with scale and minimum per group, q8 with a scale.

    Scales and minimums are rounded to fp16, unless it would overflow or lose digits of all of them.
    """
    N, K = weight_NK.shape
    groups_NGI = nn.functional.pad(weight_NK.float(), (0, -K % GROUP), mode="replicate").view(N, -1, GROUP)
    if quantize == "q4":
        lowest, highest = groups_NGI.amin(2), groups_NGI.amax(2)
        scale, minimum = (highest - lowest) / 15, lowest
    else:
        scale, minimum = groups_NGI.abs().amax(2) / 127, None
    most = max(float(x.abs().max()) for x in (scale, minimum) if x is not None)
    if _FP16[0] <= most <= _FP16[1] or most == 0:
        scale, minimum = scale.half(), None if minimum is None else minimum.half()
    from_NGI = groups_NGI if minimum is None else groups_NGI - minimum[..., None].float()
    steps = torch.where(scale > 0, 1 / scale.float(), 0)
    low, high = (0, 15) if quantize == "q4" else (-127, 127)
    codes = (from_NGI * steps[..., None]).round_().clamp_(low, high).to(torch.int8)
    return BlockWeight(codes.view(N, -1)[:, :K].contiguous(), scale, minimum, 4 if quantize == "q4" else 8)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (..., K) as whole numbers (..., G, 32) in fp32, padded with 0, and the value of a step, (..., G)."""
    grouped = nn.functional.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    top = grouped.abs().amax(-1)
    steps = torch.where(top > 1e-30, STEPS / top, 0)
    return (grouped * steps[..., None]).round_(), top * (1 / STEPS)


def _fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a * b + c in fp32, rounded once: fp64 holds the product exactly."""
    return (a.double() * b.double() + c.double()).float()


class BlockLinear(nn.Module):
    """Compute x W^T + b with weights in blocks and rows rounded to 8 bits, on every machine, slowly."""

    def __init__(self, blocks: Blocks, bias_N: Tensor | None) -> None:
        super().__init__()
        self.blocks = tuple(part.rows(slice(None)) for part in blocks)
        self.bias = None if bias_N is None else bias_N.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b in fp32."""
        codes, step = quantize_rows(x.reshape(-1, x.shape[-1]))
        y = torch.cat([self._product(part, codes, step) for part in self.blocks], 1)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)

    def rows(self, which: Tensor) -> Tensor:
        """Return the rows (..., K) of W that `which` (...) names."""
        flat, first = which.flatten(), 0
        rows = torch.empty(len(flat), self.blocks[0].shape[1])
        for part in self.blocks:
            here = (flat >= first) & (flat < first + part.shape[0])
            rows[here] = part.rows(flat[here] - first).dequantize()
            first += part.shape[0]
        return rows.view(*which.shape, -1)

    @staticmethod
    def _product(part: BlockWeight, codes_RGI: Tensor, step_RG: Tensor) -> Tensor:
        N, K = part.shape
        codes_RHI = codes_RGI.flatten(1).unflatten(1, (-1, part.group))
        weight_NHI = nn.functional.pad(part.codes_NK, (0, -K % part.group)).view(N, -1, part.group)
        y_RN = codes_RGI.new_zeros(len(codes_RGI), N)
        for h in range(weight_NHI.shape[1]):
            dot_RN = codes_RHI[:, h] @ weight_NHI[:, h].float().T  # whole numbers below 2^24, exact in fp32
            scale_N = part.scales_NG[:, h].float()
            if part.minimums_NG is None:
                value_RN = dot_RN * scale_N
            else:
                value_RN = _fused(dot_RN, scale_N, codes_RHI[:, h].sum(1)[:, None] * part.minimums_NG[:, h].float())
            y_RN = _fused(value_RN, step_RG[:, h * part.group // GROUP, None], y_RN)
        return y_RN


class BlockEmbedding(nn.Module):
    """Look up rows of a matrix in blocks, in fp32.

    Args:
        linear: what holds the matrix, perhaps the unembedding: its method `rows` returns some.
        factor: multiplies the rows.
    """

    def __init__(self, linear: nn.Module, factor: float = 1) -> None:
        super().__init__()
        self.linear, self.factor = linear, factor

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the embeddings (..., D) of tokens of any shape."""
        rows = self.linear.rows(tokens)  # type: ignore[operator]
        return rows if self.factor == 1 else rows * self.factor
