"""Sequential heads in decoding: drafts made one after another, each head reading the draft of the one before.

Head k at position p reads head k-1's latent at p and the token at p + k - 1, and attends to its own keys and values up
to p: what it computed in training. So each head has a cache of its own, and what lies in it at p is right as soon as
the token at p + k - 1 is decided: one position later for each head. A pass that decides the tokens up to position R
leaves head k right up to R - k + 1; from there on it drafts, over rows that hold drafts, and the next pass writes those
rows anew, over the tokens that were decided. For that each head but the last keeps, of each slot, its latent at the
last position that is right (`KVCache.carried`): the one row before those that the next pass brings.

With L the slot's length and i a row, head k thus runs at positions L - (k-2) + i, and for every head row i reads the
token at L + 1 + i: decided for i up to the number of accepted drafts, and the draft of head 2, 3, ... behind that.

Drafts depend on what is committed alone, and on noise. The distribution that head k drafts from is the one given the
drafts before it, which is what rejection sampling and block verification want of a chain that is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from headstart.decoding.cache import CachedAttention, pick
from headstart.decoding.kernels.pack import PackedUnembedding
from headstart.model.transformer import Transformer

if TYPE_CHECKING:
    from headstart.decoding.decode_pass import DecodingState

Decide = Callable[[Tensor, list[Tensor]], tuple[Tensor, Tensor]]
"""(logits (S, 1, V) of a draft, the drafts (S, 1) before it) -> (logits as penalised, the draft (S, 1) int64)."""


def draft_chain(
    model: Transformer,
    state: DecodingState,
    slots: slice,
    z_SWD: Tensor,
    tokens_SW: Tensor,
    accepted_S: Tensor,
    length_S: Tensor,
    *,
    heads: int,
    span: int,
    deferred: bool,
    decide: Decide,
) -> tuple[Tensor, Tensor]:
    """Logits (S, K-1, V) of heads 2..K and the drafts (S, K-1) chosen from them, after a pass that fed W rows.

    Args:
        z_SWD: the trunk's latents of the rows fed.
        tokens_SW: the token behind each row, right in the first `accepted_S` + 1 of them.
        length_S: positions cached before the pass.
        deferred: as in `decode_step`.
    """
    unembedding = cast(PackedUnembedding, model.unembedding)
    follow_SN = torch.cat([tokens_SW, tokens_SW.new_zeros(len(tokens_SW), heads - 2)], 1)
    inputs = z_SWD
    logits: list[Tensor] = []
    drafts: list[Tensor] = []
    for k in range(2, heads + 1):
        row_S = accepted_S + (k - 2)
        asked_S = row_S if deferred and k == heads else None
        latents = _run(model, state, slots, k, inputs, follow_SN[:, : inputs.shape[1]], length_S, span, 0, asked_S)
        latent = latents if latents.shape[1] == 1 else pick(latents, row_S, 1)
        penalised, draft = decide(unembedding(latent, k), drafts)
        logits.append(penalised)
        drafts.append(draft)
        if k < heads:
            follow_SN.scatter_(1, row_S[:, None] + 1, draft)
            inputs = _carry(state, slots, k, latents, accepted_S, length_S >= 0)
    return torch.cat(logits, 1), torch.cat(drafts, 1)


def read_chain(
    model: Transformer,
    state: DecodingState,
    slot: int,
    z_1WD: Tensor,
    follow_1W: Tensor,
    start: int,
    first: int,
    heads: int,
) -> None:
    """Caches of heads 2..K for W positions from `start` on of a prompt that is read from position `first` on, given the
    trunk's latents and the token behind each."""
    slots = slice(slot, slot + 1)
    length_S = torch.full((1,), start, device=z_1WD.device)
    last_S = torch.full((1,), z_1WD.shape[1] - 1, device=z_1WD.device)
    inputs, end = z_1WD, start + z_1WD.shape[1]
    for k in range(2, heads + 1):
        latents = _run(model, state, slots, k, inputs, follow_1W, length_S, end, first, last_S if k == heads else None)
        if k < heads:
            inputs = _carry(state, slots, k, latents, last_S, length_S >= 0)[:, :-1]


def _run(
    model: Transformer,
    state: DecodingState,
    slots: slice,
    k: int,
    inputs_SWD: Tensor,
    follow_SW: Tensor,
    length_S: Tensor,
    span: int,
    first: int,
    row_S: Tensor | None,
) -> Tensor:
    """The latents of head k, whose first row stands at position length - (k-2); with `row_S` of that row alone."""
    positions = (length_S - (k - 2))[:, None] + torch.arange(inputs_SWD.shape[1], device=inputs_SWD.device)
    # What would stand before the text is kept at the end of the buffers, which no text reaches and no row of it reads.
    # Slots that take no part stand before it as a whole, and stay there.
    before = (positions < first) & (length_S >= 0)[:, None]
    positions = torch.where(before, positions - first + len(state.rotary[0]), positions)
    attention = CachedAttention(state.cache, slots, positions, span)
    attend = attention(model.config.trunk_layers + k - 2, row_S)
    select = None if row_S is None else (lambda x: pick(x, row_S, 1))
    ahead_SWD = model.trunk.embedding(follow_SW)
    return cast(Tensor, model.head(k)(inputs_SWD, state.rotary_at(positions), attend, select, ahead_BTD=ahead_SWD))


def _carry(state: DecodingState, slots: slice, k: int, latents_SWD: Tensor, right_S: Tensor, live_S: Tensor) -> Tensor:
    """Head k+1's inputs: the latent carried over from the pass before, then those of this one, of which row `right_S`
    is carried on."""
    carried_SD = state.cache.carried[k - 2, slots]
    inputs_SWD = torch.cat([carried_SD[:, None].to(latents_SWD.dtype), latents_SWD], 1)
    carried_SD.copy_(torch.where(live_S[:, None], pick(latents_SWD, right_S, 1)[:, 0].to(carried_SD.dtype), carried_SD))
    return inputs_SWD
