"""The parts of a transformer block: norm, attention's projections, SwiGLU.

Shape suffixes: B batch, T time (positions), D dim, H attention heads, K key/value heads, E width of one head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.model.attention import causal_attention
from headstart.model.rotary import rotary_tables, rotate
from headstart.model.shape import Activation, Shape

__all__ = ["Attend", "Attention", "Block", "RMSNorm", "SwiGLU", "rotary_tables", "rotate"]

Attend = Callable[..., Tensor]
"""(q (B,H,T,E), k (B,K,T,E), v (B,K,T,E)) -> (B,H,T',E). Layers that slide also pass `window`, the number of positions
that a row sees. Decoding passes an attention that keeps keys and values in its cache; it may return fewer rows than it
gets."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in fp32 as Llama does; with `offset` times 1 + weight."""

    def __init__(self, dim: int, eps: float, offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim) if offset else torch.ones(dim))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed input, of its shape and dtype."""
        if self.offset:  # rounded once, at the end: 1 + weight has too few digits in bf16
            wide = torch.promote_types(x.dtype, torch.float32)
            return F.rms_norm(x.to(wide), (x.shape[-1],), 1 + self.weight.to(wide), self.eps).to(x.dtype)
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Self-attention with rotary positions and grouped key/value heads; q, k and v come from one matrix.

    It knows what differs between layers: whether its attention slides, and which rotary positions it has. Its input is
    `inputs` wide (None: dim).
    """

    def __init__(self, shape: Shape, layer: int = 0, inputs: int | None = None) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim_per_head = (
            shape.attention_heads,
            shape.key_value_heads,
            shape.dim_per_head,
        )
        width = (self.heads + 2 * self.kv_heads) * self.dim_per_head
        self.qkv = nn.Linear(inputs or shape.dim, width, bias=shape.attention_bias or shape.qkv_bias)
        self.out = nn.Linear(shape.attention_dim, shape.dim, bias=shape.attention_bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if shape.qk_norm != "none":
            whole = shape.qk_norm == "full"
            eps, offset = shape.norm_eps, shape.norm_offset
            self.q_norm = RMSNorm(self.dim_per_head * (self.heads if whole else 1), eps, offset)
            self.k_norm = RMSNorm(self.dim_per_head * (self.kv_heads if whole else 1), eps, offset)
        self._whole_norm = shape.qk_norm == "full"
        self.window = shape.window_of(layer)
        self.turned = layer not in shape.nope_layers
        # The part of the tables that it reads; None: all of it, because there is one base. EAGLE's block has its own.
        begin = self.dim_per_head if shape.local_rope_theta is not None and self.window is not None else 0
        if inputs is not None and shape.draft_rope is not None:
            begin = shape.rotary_dim - self.dim_per_head
        whole = shape.rotary_dim == self.dim_per_head
        self._tables = None if whole else slice(begin, begin + self.dim_per_head)
        self._query_factor = (shape.dim_per_head / shape.score_dim) ** 0.5

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend = causal_attention) -> Tensor:
        """Return the result (B, T', D) of attention over (B, T, D), in which `attend` may leave rows out."""
        B, T, _ = x_BTD.shape
        qkv = self.qkv(x_BTD).view(B, T, -1, self.dim_per_head)
        # Queries and keys lie side by side, so one rotation turns both.
        qk = qkv[:, :, : self.heads + self.kv_heads]
        if self.q_norm is not None:
            qk = self._normed(qk)
        if self._tables is not None:
            rotary = rotary[0][..., self._tables], rotary[1][..., self._tables]
        if self.turned:
            qk = rotate(qk, *rotary)
        q, k = qk.split([self.heads, self.kv_heads], dim=2)
        if self._query_factor != 1:
            q = q * self._query_factor
        v = qkv[:, :, self.heads + self.kv_heads :]
        slides = {} if self.window is None else {"window": self.window}
        y_BHTE = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **slides)
        return self.out(y_BHTE.transpose(1, 2).flatten(2))

    def _normed(self, qk: Tensor) -> Tensor:
        parts = zip((self.q_norm, self.k_norm), qk.split([self.heads, self.kv_heads], dim=2))
        if self._whole_norm:
            return torch.cat([norm(x.flatten(2)).view(x.shape) for norm, x in parts if norm is not None], dim=2)
        return torch.cat([norm(x) for norm, x in parts if norm is not None], dim=2)


def activate(gate: Tensor, activation: Activation) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), or with another activation; gate and up come from one matrix."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_up = nn.Linear(shape.dim, 2 * shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.dim, bias=False)
        self.activation = shape.activation

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the result, of the input's shape."""
        gate, up = self.gate_up(x_BTD).chunk(2, dim=-1)
        return self.down(activate(gate, self.activation) * up)


class Block(nn.Module):
    """Transformer block: norms before attention and SwiGLU (Llama), or behind them (OLMo2), or both (Gemma).

    `layer` blocks lie below it, which decides what its attention sees in families whose layers differ.
    """

    def __init__(self, shape: Shape, layer: int = 0) -> None:
        super().__init__()

        def norm(*placements: str) -> nn.Module:
            placed = shape.norm_placement in placements
            return RMSNorm(shape.dim, shape.norm_eps, shape.norm_offset) if placed else nn.Identity()

        self.attention_norm = norm("pre", "both")
        self.attention = Attention(shape, layer)
        self.attention_post_norm = norm("post", "both")
        self.mlp_norm = norm("pre", "both")
        self.mlp = SwiGLU(shape)
        self.mlp_post_norm = norm("post", "both")

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        attend: Attend = causal_attention,
        select: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return (B, T, D) for (B, T, D), or (B, T', D) if `select` picks rows.

        `select` must pick the rows that `attend` returns: keys and values are made for all T rows, the rest of the
        block runs on the selected rows only.
        """
        attended = self.attention_post_norm(self.attention(self.attention_norm(x_BTD), rotary, attend))
        x_BTD = (x_BTD if select is None else select(x_BTD)) + attended
        return x_BTD + self.mlp_post_norm(self.mlp(self.mlp_norm(x_BTD)))
