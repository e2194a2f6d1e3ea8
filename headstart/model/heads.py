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
    """A head that reads its parent's latent as it is: head 1 of every kind but transformer (and linear wired
    anticausally), and all heads that are made of what the unembedding holds."""

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


class SequentialHead(nn.Module):
    """DeepSeek-V3's module (arXiv 2412.19437, section 2.2): the latent of head k-1 at t and the embedding of token
    t+k-1, each normed, joined by one matrix, then a block of its own.

    Its latent goes to the next head as it is, and to the unembedding, whose final norm all heads share.
    """

    def __init__(self, config: ModelConfig, k: int = 2) -> None:
        super().__init__()
        self.latent_norm = RMSNorm(config.dim, config.norm_eps, config.norm_offset)
        self.token_norm = RMSNorm(config.dim, config.norm_eps, config.norm_offset)
        self.join = nn.Linear(2 * config.dim, config.dim, bias=False)
        self.block = Block(config, config.layer_of_head(k))

    def forward(
        self,
        z_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        attend: Attend = causal_attention,
        select: Callable[[Tensor], Tensor] | None = None,
        *,
        ahead_BTD: Tensor,
    ) -> Tensor:
        """As `Block`; `ahead_BTD`: the embedding of token t+k-1 for each position t."""
        joined = self.join(torch.cat([self.latent_norm(z_BTD), self.token_norm(ahead_BTD)], -1))
        return cast(Tensor, self.block(joined, rotary, attend, select))


def make_heads(config: ModelConfig) -> nn.ModuleList:
    """The heads in order: entry k-1 is head k. Shared sequential heads are one module, the last; see
    `Transformer.head`."""
    heads: list[nn.Module] = []
    for k in range(1, config.heads + 1):
        if config.head_kind == "transformer":
            heads.append(Block(config, config.layer_of_head(k)))
        elif config.head_kind == "linear" and not (k == 1 and config.plain_decoder):
            heads.append(LinearHead(config))
        elif config.head_kind == "sequential" and k > 1:
            if k == 2 or not config.shared:
                heads.append(SequentialHead(config, k))
        else:
            heads.append(PassHead())
    return nn.ModuleList(heads)


class MedusaResiduals(nn.Module):
    """Medusa's heads (arXiv 2401.10774, section 2.1): x + SiLU(W x + b), x behind the final norm. W and b are zero at
    first, so that a head begins as the next-token head. The bias is that of the authors' code; without it b is 0."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in range(config.heads - 1))

    def forward(self, x: Tensor, k: int) -> Tensor:
        return x + F.silu(self.maps[k - 2](x))


class SternResiduals(nn.Module):
    """Stern's heads (arXiv 1811.03115, section 6): one feed-forward layer with an output for each head, added to x. Its
    hidden layer, as wide as that of n - 1 blocks, is read by all of them. Head 1 stays x itself, which keeps the model
    what it is without the others (there it gets an output too)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.stern_hidden
        self.hidden = nn.Linear(config.dim, width, bias=False)
        self.outputs = nn.ModuleList(nn.Linear(width, config.dim, bias=False) for _ in range(config.heads - 1))

    def forward(self, x: Tensor, k: int) -> Tensor:
        return cast(Tensor, x + self.outputs[k - 2](F.relu(self.hidden(x))))


class Unembedding(nn.Module):
    """Final norm and output matrix (V, D), shared by all heads; replicated heads have one matrix each, and medusa heads
    may. What medusa and stern heads add lies between the two, and so in here."""

    def __init__(self, config: ModelConfig, tied_to: Tensor | None = None) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps, config.norm_offset)
        own = config.head_kind == "replicated" or (config.head_kind == "medusa" and not config.shared)
        copies = config.heads if own else 1
        self.residuals: MedusaResiduals | SternResiduals | None = None
        if config.heads > 1 and config.head_kind in ("medusa", "stern"):
            self.residuals = MedusaResiduals(config) if config.head_kind == "medusa" else SternResiduals(config)
        first = (
            nn.Parameter(torch.empty(config.vocab_size, config.dim)) if tied_to is None else cast(nn.Parameter, tied_to)
        )
        others = [nn.Parameter(torch.empty(config.vocab_size, config.dim)) for _ in range(copies - 1)]
        self.weights = nn.ParameterList([first, *others])
        # A matrix (V, D) beside them while a run trains with token order prediction; in here, where sharding gathers.
        self.order: nn.Parameter | None
        self.register_parameter("order", None)

    def weight(self, k: int) -> Tensor:
        """The matrix (V, D) of head k."""
        return self.weights[k - 1 if len(self.weights) > 1 else 0]

    def forward(self, z: Tensor, k: int = 1, using: Callable[[Tensor, Tensor], Tensor] = F.linear) -> Tensor:
        """Latent (..., D) of head k -> logits (..., V).

        `using(normed latent, weight)` replaces the plain product: the objective passes its chunked cross-entropy, which
        never holds all logits, and gets its scalar back; so the weight is only ever touched inside this module's
        forward, which is what sharding hooks on to.
        """
        x = self.norm(z)
        if self.residuals is not None and k > 1:
            x = self.residuals(x, k)
        return using(x, self.weight(k))
