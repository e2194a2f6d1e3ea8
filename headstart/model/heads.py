"""Prediction heads and the unembedding they share.

The heads form a tree rooted at the trunk: `ModelConfig.parents` says which latent feeds which head. A head maps its
parent's latent to its own, (B, T, D) -> (B, T, D); the unembedding turns a latent into logits over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.model.attention import causal_attention
from headstart.model.config import ModelConfig
from headstart.model.layers import Attend, Block, RMSNorm


class PassHead(nn.Module):
    """A head that reads its parent's latent as it is: every replicated head, and head 1 of linear heads."""

    def forward(self, z_BTD: Tensor, *_: object) -> Tensor:
        return z_BTD


class LinearHead(nn.Module):
    """One matrix without nonlinearity, a linear probe of the latent (paper section B)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.map = nn.Linear(config.dim, config.dim, bias=False)

    def forward(
        self,
        z_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        attend: Attend = causal_attention,
        select: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        return self.map(z_BTD if select is None else select(z_BTD))


def make_heads(config: ModelConfig) -> nn.ModuleList:
    """The n heads in order: entry k-1 is head k."""
    heads: list[nn.Module] = []
    for k in range(1, config.heads + 1):
        if config.head_kind == "transformer":
            heads.append(Block(config))
        elif config.head_kind == "linear" and not (k == 1 and config.plain_decoder):
            heads.append(LinearHead(config))
        else:
            heads.append(PassHead())
    return nn.ModuleList(heads)


class Unembedding(nn.Module):
    """Final norm and output matrix (V, D), shared by all heads; replicated heads have one matrix each."""

    def __init__(self, config: ModelConfig, tied_to: Tensor | None = None) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps)
        copies = config.heads if config.head_kind == "replicated" else 1
        first = (
            nn.Parameter(torch.empty(config.vocab_size, config.dim)) if tied_to is None else cast(nn.Parameter, tied_to)
        )
        others = [nn.Parameter(torch.empty(config.vocab_size, config.dim)) for _ in range(copies - 1)]
        self.weights = nn.ParameterList([first, *others])

    def weight(self, k: int) -> Tensor:
        """The matrix (V, D) of head k."""
        return self.weights[k - 1 if len(self.weights) > 1 else 0]

    def forward(self, z: Tensor, k: int = 1, using: Callable[[Tensor, Tensor], Tensor] = F.linear) -> Tensor:
        """Latent (..., D) of head k -> logits (..., V).

        `using(normed latent, weight)` replaces the plain product: the objective passes its chunked cross-entropy, which
        never holds all logits, and gets its scalar back; so the weight is only ever touched inside this module's
        forward, which is what sharding hooks on to.
        """
        return using(self.norm(z), self.weight(k))
