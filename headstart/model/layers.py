"""The parts of a transformer block: norm, rotary positions, attention's projections, SwiGLU.

Shape suffixes: B batch, T time (positions), D dim, H attention heads, K key/value heads, E width of one head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.model.attention import causal_attention
from headstart.model.config import ModelConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q (B,H,T,E), k (B,K,T,E), v (B,K,T,E)) -> (B,H,T',E). Decoding passes one that keeps K/V in its cache; it may give
fewer rows than came in, when only some are wanted."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in fp32 as Llama does."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def rotary_tables(positions: Tensor, dim_per_head: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of shape positions.shape + (1, E), for `rotate`; angles in fp64, so that far positions stay exact.

    The pairing is Hugging Face's: coordinate i turns with coordinate i + E/2. The sine carries the sign of the pairing.
    """
    half = torch.arange(dim_per_head // 2, dtype=torch.float64, device=positions.device)
    angles = positions.to(torch.float64)[..., None] * theta ** (-2 * half / dim_per_head)  # (..., E/2)
    cos, sin = angles.cos(), angles.sin()
    return (
        torch.cat([cos, cos], -1).unsqueeze(-2).to(dtype),
        torch.cat([-sin, sin], -1).unsqueeze(-2).to(dtype),
    )


def rotate(x_BTHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns queries or keys to their positions (rotary embedding, RoFormer)."""
    half = x_BTHE.shape[-1] // 2
    return torch.addcmul(x_BTHE * cos, torch.roll(x_BTHE, half, -1), sin)


class Attention(nn.Module):
    """Self-attention with rotary positions and grouped key/value heads; q, k and v come from one matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim_per_head = (
            config.attention_heads,
            config.key_value_heads,
            config.dim_per_head,
        )
        width = (self.heads + 2 * self.kv_heads) * self.dim_per_head
        self.qkv = nn.Linear(config.dim, width, bias=config.attention_bias)
        self.out = nn.Linear(config.attention_dim, config.dim, bias=config.attention_bias)

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend = causal_attention) -> Tensor:
        B, T, _ = x_BTD.shape
        qkv = self.qkv(x_BTD).view(B, T, -1, self.dim_per_head)
        # Queries and keys lie side by side, so one rotation turns both.
        qk = rotate(qkv[:, :, : self.heads + self.kv_heads], *rotary)
        q, k = qk.split([self.heads, self.kv_heads], dim=2)
        v = qkv[:, :, self.heads + self.kv_heads :]
        y_BHTE = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.out(y_BHTE.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up come from one matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate, up = self.gate_up(x_BTD).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm transformer block, Llama's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        attend: Attend = causal_attention,
        select: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D), or (B, T', D) when `select` picks the rows whose output is wanted.

        `select` must pick the same rows as `attend` returns: keys and values are made for all T rows, the rest of the
        block runs on the selected ones only.
        """
        attended = self.attention(self.attention_norm(x_BTD), rotary, attend)
        x_BTD = (x_BTD if select is None else select(x_BTD)) + attended
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))
