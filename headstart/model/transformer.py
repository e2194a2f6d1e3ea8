"""The model: a trunk and n heads on it. It knows nothing of losses, files or devices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.model.attention import DocumentAttention, StepAttention, causal_attention
from headstart.model.config import ModelConfig
from headstart.model.draft_vocabulary import widen
from headstart.model.layers import Attend, Block, RMSNorm
from headstart.model.rotary import model_tables

TRAINING_ALONE = frozenset({"unembedding.order"})
"""Names of parameters that exist only during training: neither copies nor model directories hold them."""


class ScaledEmbedding(nn.Embedding):
    """Embeddings times the square root of their width, rounded to their dtype first (Gemma's)."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scaled embeddings of tokens of any shape."""
        embedded = super().forward(tokens)
        return embedded * torch.tensor(self.embedding_dim**0.5, dtype=embedded.dtype).item()


class Trunk(nn.Module):
    """Token embedding and the shared transformer blocks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Filling a tensor without storage makes torch import its compiler: two seconds of every loading.
        weight = torch.empty(config.vocab_size, config.dim)
        kind = ScaledEmbedding if config.scaled_embedding else nn.Embedding
        self.embedding = kind(config.vocab_size, config.dim, _weight=weight if weight.is_meta else None)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.trunk_layers))
        self.handed_out = config.handed_out

    def forward(
        self,
        tokens_BT: Tensor,
        rotary: tuple[Tensor, Tensor],
        attend: Callable[[int], Attend] = lambda layer: causal_attention,
        length: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the latents z (B, T, D) of tokens (B, T) int64. `attend(layer)` gives the attention of that block.

        If heads read inputs of layers (`handed_out`), these come before the latents: z is then (B, T, (F + 1) x D).
        With `length` return z of the first `length` tokens, and the embeddings (B, T, D) of all, which sequential heads
        read. The lookup is in here, so that the matrix is used once in a pass, which sharding requires.
        """
        embeddings_BTD = self.embedding(tokens_BT)
        z_BTD = embeddings_BTD[:, :length]
        handed_out: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            if layer in self.handed_out:
                handed_out.append(z_BTD)
            z_BTD = block(z_BTD, rotary, attend(layer))
        if handed_out:
            z_BTD = torch.cat([*handed_out, z_BTD], -1)
        return z_BTD if length is None else (z_BTD, embeddings_BTD)


class Unembedding(nn.Module):
    """Final norm and output matrix (V, D) of all heads; heads with unembeddings of their own have one matrix each.

    What heads add between the two (`HeadKind.residuals`) is in here too.
    """

    def __init__(self, config: ModelConfig, tied_to: Tensor | None = None) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps, config.norm_offset)
        copies = config.kind.unembeddings
        self.residuals = config.kind.residuals()
        self.draft_norm = config.kind.draft_norm()
        first = (
            nn.Parameter(torch.empty(config.vocab_size, config.dim)) if tied_to is None else cast(nn.Parameter, tied_to)
        )
        others = [nn.Parameter(torch.empty(config.drafted_tokens, config.dim)) for _ in range(copies - 1)]
        self.weights = nn.ParameterList([first, *others])
        self.vocab_size = config.vocab_size
        self.d2t: Tensor | None
        """The draft vocabulary, (Vd,) int64 (None: heads 2..n predict all tokens)."""
        self.register_buffer("d2t", None if config.draft_vocab is None else torch.arange(config.draft_vocab))
        self.added: Callable[[Tensor], Tensor] | None = None
        """Function of the first matrix whose result is used in its place (None: the matrix itself)."""
        # A further matrix (V, D) while a run trains with token order prediction; in here, where sharding gathers.
        self.order: nn.Parameter | None
        self.register_parameter("order", None)

    def weight(self, k: int) -> Tensor:
        """Return the matrix of head k: (V, D), or with a draft vocabulary (Vd, D) for k > 1."""
        if len(self.weights) > 1 and k > 1:
            return self.weights[min(k, len(self.weights)) - 1]
        first = self.weights[0] if self.added is None else self.added(self.weights[0])
        return first if k == 1 or self.d2t is None else first[self.d2t]

    def forward(self, z: Tensor, k: int = 1, using: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Return the logits (..., V) of a latent (..., D) of head k; those outside its draft vocabulary are -inf.

        `using(normed latent, weight)` replaces the plain product: the objective passes its chunked cross-entropy, which
        never holds all logits, and gets its scalar back. So the weight is only ever touched inside this module's
        forward, which sharding hooks on to. Its rows are draft ids where head k has a draft vocabulary.
        """
        x = self.norm(z) if k == 1 or self.draft_norm is None else self.draft_norm(z)
        if self.residuals is not None and k > 1:
            x = self.residuals(x, k)
        if using is not None:
            return using(x, self.weight(k))
        logits = F.linear(x, self.weight(k))
        return logits if k == 1 or self.d2t is None else widen(logits, self.d2t, self.vocab_size, -math.inf)


class Transformer(nn.Module):
    """A decoder with n prediction heads (paper section 2): trunk -> tree of heads -> shared unembedding.

    Calling it gives next-token logits (B, T, V), or with `heads=K` the logits of heads 1..K, (B, T, K, V).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        self.heads = config.kind.modules()
        self.unembedding = Unembedding(config, self.trunk.embedding.weight if config.tied else None)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fill all parameters with their first values, see `first_value_`."""
        for name, parameter in self.named_parameters():
            if not parameter.is_meta:  # see Trunk
                self.first_value_(name, parameter, generator)
        self.copy_first_values()

    @torch.no_grad()
    def copy_first_values(self) -> None:
        """Copy head 1's unembedding to those of heads whose own unembeddings begin like it."""
        if self.config.kind.copies_unembedding:
            (first, *others), d2t = self.unembedding.weights, self.unembedding.d2t
            for weight in others:
                weight.copy_(first if d2t is None else first[d2t])

    @torch.no_grad()
    def first_value_(self, name: str, tensor: Tensor, generator: torch.Generator | None = None) -> None:
        """Fill `tensor` with the first value of the parameter `name`.

        Weights are normal with a deviation of 0.02, divided by sqrt(2 x blocks) for maps back into the residual stream,
        like GPT-2's; norms multiply by 1, biases are 0. The paper does not give its initialisation; this is our
        default.
        """
        kind = self.config.kind
        if name.endswith("norm.weight"):
            tensor.fill_(0 if self.config.norm_offset else 1)
        elif name.endswith("bias") or any(part in name for part in kind.zero_at_first):
            tensor.zero_()
        else:
            narrow = name.endswith((".attention.out.weight", ".mlp.down.weight"))
            narrow |= any(part in name for part in kind.narrow_at_first)
            tensor.normal_(0, 0.02 / math.sqrt(2 * self.config.layers) if narrow else 0.02, generator=generator)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the final norm, and so of activations."""
        return cast(Tensor, self.unembedding.norm.weight).dtype

    @property
    def device(self) -> torch.device:
        """The device of the final norm, and so of activations."""
        return cast(Tensor, self.unembedding.norm.weight).device

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin tables (..., 1, E) for integer positions of any shape; see `model_tables`."""
        return model_tables(self.config, positions, dtype)

    def head(self, k: int) -> nn.Module:
        """Return the module of head k."""
        return self.heads[min(k, len(self.heads)) - 1]

    def path(self, k: int) -> list[int]:
        """Return the heads between the trunk and head k in order of computation, head k last."""
        return self.config.path(k)

    def latents(
        self,
        tokens_BT: Tensor,
        ks: list[int],
        documents_BT: Tensor | None = None,
        attention: tuple[Attend, Tensor] | None = None,
    ) -> dict[int, Tensor]:
        """Return the latents (B, T, D) of the heads `ks` and of those on their paths; entry 0 is the trunk's output.

        Sequential head k reads the token k - 1 behind a position. Its latents are NaN in the last k - 1 positions,
        which lack that token: cut them off before the unembedding, not after it, if gradients are needed.

        Attention stays inside the documents of `documents_BT`, a document index per position; `attention` gives in
        their place the attention, and the positions, (T,) or (B, T).
        """
        if attention is None:
            plain: Attend = causal_attention if documents_BT is None else DocumentAttention(documents_BT)
            attention = plain, torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        rows = HeadRows(self, *attention)
        T, reads_ahead = tokens_BT.shape[1], self.config.ahead > 0
        z_BTD = self.trunk(tokens_BT, rows.rotary, lambda layer: rows.attend, T if reads_ahead else None)
        latents = {0: z_BTD[0] if reads_ahead else z_BTD}
        for k in ks:
            for step in self.path(k):
                if step not in latents:
                    ahead = None
                    if reads_ahead and step > 1:
                        # No earlier position attends to the padding at the end.
                        ahead = F.pad(z_BTD[1][:, step - 1 :], (0, 0, 0, min(step - 1, T)))
                    latents[step] = rows.run(step, latents[self.config.parents[step - 1]], ahead)
        if reads_ahead:
            for k in latents.keys() - {0, 1}:
                known = max(0, T - k + 1)
                missing = torch.full_like(latents[k][:, known:], math.nan)
                latents[k] = torch.cat([latents[k][:, :known], missing], 1)
        return latents

    def forward(self, tokens_BT: Tensor, heads: int | None = None, documents_BT: Tensor | None = None) -> Tensor:
        """Return next-token logits (B, T, V) of tokens (B, T) int64; with `heads=K` the logits of heads 1..K.

        These are (B, T, K, V), and entry k-1 predicts token t+k. The last k - 1 positions of sequential head k, which
        lack the tokens between, are NaN. No gradient passes through them, so a loss over the other positions is
        differentiated as usual.
        """
        ks, T = list(range(1, (heads or 1) + 1)), tokens_BT.shape[1]
        latents = self.latents(tokens_BT, ks, documents_BT)
        if heads is None:
            return self.unembedding(latents[1])
        # NaN is added after the product: inside it, 0 x NaN would become the gradient of the whole matrix.
        rows_of_heads = [max(0, T - k + 1) if self.config.ahead else T for k in ks]
        logits = [self.unembedding(latents[k][:, :rows], k) for k, rows in zip(ks, rows_of_heads)]
        return torch.stack([F.pad(row, (0, 0, 0, T - row.shape[1]), value=math.nan) for row in logits], dim=2)


class HeadRows:
    """The heads of a model over whole rows: their attention and rotary tables, in training and for `latents`.

    Args:
        model: the model.
        attend: the attention of trunk and heads.
        positions: rotary positions, (T,) or (B, T).
        detached: whether heads read detached keys and values of other heads, see `StepAttention`.
    """

    def __init__(self, model: Transformer, attend: Attend, positions: Tensor, detached: bool = False) -> None:
        self._model, self.attend, self._positions = model, attend, positions
        self._dtype = compute_dtype(cast(Tensor, model.unembedding.norm.weight))
        self.rotary = model.rotary(positions, self._dtype)
        self._steps = StepAttention(attend, detached) if model.config.kind.one_cache else None

    def run(self, k: int, parent_BTD: Tensor, ahead_BTD: Tensor | None = None) -> Tensor:
        """Return the latent (B, T, D) of head k, given its parent's, and the embeddings that it reads, if any.

        Heads that share one cache run once each, in order.
        """
        attend, rotary, more = self.attend, self.rotary, {} if ahead_BTD is None else {"ahead_BTD": ahead_BTD}
        if self._steps is not None and k > 1:
            attend = self._steps
            if k > 2:
                rotary = self._model.rotary(self._positions + (k - 2), self._dtype)
        return cast(Tensor, self._model.head(k)(parent_BTD, rotary, attend, **more))

    def gradients(self, k: int) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values of head k that other heads read detached, with the gradients of those heads."""
        return [] if self._steps is None or k == 1 else self._steps.gradients(k - 2)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of products with `weight`: the autocast dtype, or the weight's own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
