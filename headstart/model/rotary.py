"""Rotary positions (RoFormer): tables of cosines and sines, and turning queries and keys by them.

Shape suffixes: B batch, T time (positions), H attention heads, E width of one head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headstart.model.shape import RopeScaling, Shape


def rotary_tables(
    positions: Tensor, dim_per_head: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of shape positions.shape + (1, E), for `rotate`.

    Angles are computed in fp64, so that far positions stay exact. The pairing is Hugging Face's: coordinate i turns
    with coordinate i + E/2. The sine carries the sign of the pairing.
    """
    half = torch.arange(dim_per_head // 2, dtype=torch.float64, device=positions.device)
    frequencies = theta ** (-2 * half / dim_per_head)
    if scaling is not None:
        frequencies = scaled(frequencies, theta, scaling)
    angles = positions.to(torch.float64)[..., None] * frequencies  # (..., E/2)
    cos, sin = angles.cos(), angles.sin()
    if scaling is not None and scaling.attention_factor != 1:
        cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
    return (torch.cat([cos, cos], -1).unsqueeze(-2).to(dtype), torch.cat([-sin, sin], -1).unsqueeze(-2).to(dtype))


def model_tables(shape: Shape, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the tables (..., 1, E) that the blocks of a model read.

    If layers that slide have a base of their own, or EAGLE's block has one, the tables of these follow in the last
    axis, in this order.
    """
    bases = [(shape.rope_theta, shape.rope_scaling)]
    bases += [] if shape.local_rope_theta is None else [(shape.local_rope_theta, None)]
    if (own := shape.draft_rope) is not None and own.rope_theta is not None:
        bases.append((own.rope_theta, own.rope_scaling))
    tables = [rotary_tables(positions, shape.dim_per_head, theta, dtype, scaling) for theta, scaling in bases]
    if len(tables) == 1:
        return tables[0]
    cos, sin = (torch.cat(parts, -1) for parts in zip(*tables))
    return cos, sin


def scaled(frequencies: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Return the stretched frequencies (E/2,) of pairs of coordinates, fastest first."""
    slowed = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slowed
    kept = _kept_llama3(frequencies, scaling) if scaling.kind == "llama3" else _kept_yarn(frequencies, theta, scaling)
    return kept * frequencies + (1 - kept) * slowed


def _kept_llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Return Llama 3.1's share of the old frequency of each pair, by how often it turns within the old context."""
    turns = scaling.original_context * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def _kept_yarn(frequencies: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Return YaRN's share (arXiv 2309.00071, section 3.2), on a ramp over the numbers of the pairs, not over turns."""
    dim = 2 * len(frequencies)

    def pair_that_turns(times: float) -> float:
        return dim * math.log(scaling.original_context / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    pairs = torch.arange(dim // 2, dtype=frequencies.dtype, device=frequencies.device)
    return 1 - ((pairs - low) / (high - low)).clamp(0, 1)


def rotate(x_BTHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys to their positions."""
    half = x_BTHE.shape[-1] // 2
    return torch.addcmul(x_BTHE * cos, torch.roll(x_BTHE, half, -1), sin)
