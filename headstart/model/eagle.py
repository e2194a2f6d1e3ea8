"""The module of EAGLE-3 (arXiv 2503.01840): one block that drafts step by step from several states of the trunk.

Step 1 (head 2) joins the states that the trunk hands out at position t into g and reads g with the embedding of token
t+1. Step d (head d+1) stands at position t+d-1 and reads the output of step d-1 in place of g. All steps have one set
of keys and values: step d sees those of step 1 up to position t, and behind them those of its own steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from headstart.model.attention import causal_attention
from headstart.model.layers import Attend, Attention, RMSNorm, SwiGLU
from headstart.model.shape import Shape


def default_features(layers: int) -> tuple[int, ...]:
    """Return EAGLE-3's layers whose inputs are read: 2, L/2, L-3; the last three states in shallow models."""
    return (2, layers // 2, layers - 3) if layers >= 7 else tuple(range(max(0, layers - 2), layers + 1))


def block_shape(shape: Shape) -> Shape:
    """Return the shape of EAGLE's block on a model of any family: a Llama block that sees the whole context."""
    values = {field.name: getattr(shape, field.name) for field in fields(Shape)}
    plain: dict[str, Any] = {
        **{"heads": 1, "offsets": None, "draft_vocab": None, "features": None, "norm_output": False},
        **{"attention_bias": False, "qkv_bias": False, "qk_norm": "none", "norm_placement": "pre"},
        **{"activation": "silu", "query_scalar": None, "nope_layers": ()},
        "window_layers": None if shape.window is None else (),
    }
    if shape.draft_block is not None and shape.draft_block.hidden_dim is not None:
        plain["hidden_dim"] = shape.draft_block.hidden_dim
    return Shape(**{**values, **plain})


class EagleBlock(nn.Module):
    """A Llama block around the stream g, whose attention reads [norm(embedding), norm(g)]."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.dim, shape.norm_eps, shape.norm_offset)  # of the embedding
        self.hidden_norm = RMSNorm(shape.dim, shape.norm_eps, shape.norm_offset)
        self.attention = Attention(shape, layer, inputs=2 * shape.dim)
        self.mlp_norm = RMSNorm(shape.dim, shape.norm_eps, shape.norm_offset)
        self.mlp = SwiGLU(shape)
        self.normed_residual = shape.draft_block is not None and shape.draft_block.norm_before_residual

    def forward(
        self,
        g_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        attend: Attend,
        select: Callable[[Tensor], Tensor] | None,
        *,
        ahead_BTD: Tensor,
    ) -> Tensor:
        """Return the stream, those rows that `select` picks."""
        normed_BTD = self.hidden_norm(g_BTD)
        joined = torch.cat([self.attention_norm(ahead_BTD), normed_BTD], -1)
        g_BTD = normed_BTD if self.normed_residual else g_BTD
        attended = self.attention(joined, rotary, attend)
        g_BTD = (g_BTD if select is None else select(g_BTD)) + attended
        return g_BTD + self.mlp(self.mlp_norm(g_BTD))


class EagleHead(nn.Module):
    """The module of all steps: `fc` joins the states of the trunk, `midlayer` is the block.

    Args:
        shape: that of the block.
        layer: the layer of the block.
        features: the number of states that it reads; one is g as it is.
        norm_output: whether the result is normed, which the next step then reads (EAGLE-3.1).
    """

    def __init__(self, shape: Shape, layer: int, features: int, norm_output: bool) -> None:
        super().__init__()
        self.width = features * shape.dim
        self.fc = nn.Linear(self.width, shape.dim, bias=False) if features > 1 else None
        self.midlayer = EagleBlock(shape, layer)
        self.norm = RMSNorm(shape.dim, shape.norm_eps, shape.norm_offset) if norm_output else None

    def forward(
        self,
        z: Tensor,
        rotary: tuple[Tensor, Tensor],
        attend: Attend = causal_attention,
        select: Callable[[Tensor], Tensor] | None = None,
        *,
        ahead_BTD: Tensor,
    ) -> Tensor:
        """Return the output (B, T, D) of a step, those rows that `select` picks.

        `z` holds the states of the trunk (B, T, F x D, perhaps more) for step 1, else the output (B, T, D) of the step
        before. `ahead_BTD` holds the embedding of the token behind each row's position.
        """
        if z.shape[-1] != ahead_BTD.shape[-1]:
            z = z[..., : self.width]
            z = z if self.fc is None else self.fc(z)
        z = self.midlayer(z, rotary, attend, select, ahead_BTD=ahead_BTD)
        return z if self.norm is None else self.norm(z)
