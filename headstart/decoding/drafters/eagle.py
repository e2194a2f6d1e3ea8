"""EAGLE's steps: drafts made one after another by one module over one cache.

Head 2 at position p is step 1: it reads the states of the trunk at p and the token at p + 1. Its entry in the cache is
right as soon as that token is decided, so a pass that feeds rows from position L on writes the entries of all rows, and
those up to the last accepted row stay. From there the module drafts: step d stands d - 1 positions behind that row,
reads the output of step d - 1 and the draft before, and writes an entry that the next pass overwrites.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from headstart.decoding.cache import CachedAttention, gather_row
from headstart.decoding.drafters.candidates import Proposal
from headstart.decoding.drafters.interface import PromptPiece, Verified
from headstart.decoding.drafters.sequential import Chain
from headstart.decoding.latents import Latents
from headstart.decoding.state import DecodingState


class EagleSteps:
    """Drafts one chain with the steps of one module; a `HeadDrafter`."""

    def draft(self, verified: Verified) -> Proposal:
        """Write the drafts of heads 2..K into the windows, and return them with their logits."""
        state, plan, accepted_S = verified.state, verified.plan, verified.verdict.accepted_S
        chain = Chain(verified)
        latent = _read_states(verified.latents, verified.verdict.tokens_SD, accepted_S if plan.deferred else None)
        latent = latent if latent.shape[1] == 1 else gather_row(latent, accepted_S, 1)
        chain.add(2, latent)
        model, span = verified.model, min(plan.span + plan.heads, state.cache.capacity)
        for k in range(3, plan.heads + 1):
            # Slots that take no part stand before the sequence, and stay there.
            position_S = verified.length_S + accepted_S + (k - 2)
            position_S1 = torch.where(verified.length_S >= 0, position_S, -1)[:, None]
            attention = CachedAttention(state.cache, plan.slots, position_S1, span)
            attend, ahead_S1D = attention(model.config.trunk_layers), model.trunk.embedding(chain.last)
            latent = model.head(k)(latent, state.rotary_at(position_S1), attend, ahead_BTD=ahead_S1D)
            chain.add(k, latent)
        return chain.propose()

    def read(self, state: DecodingState, latents: Latents, piece: PromptPiece) -> None:
        """Fill the cache of step 1, given the trunk's states and the token after each position."""
        if piece.heads > 1:
            assert piece.root_1 is not None
            follow_1W = torch.cat([piece.tokens_T[1:], piece.root_1])[None]
            _read_states(latents, follow_1W, follow_1W.new_zeros(1))


def _read_states(latents: Latents, follow_SW: Tensor, row_S: Tensor | None) -> Tensor:
    """Run step 1 over all rows, given the token after each. Return its output; with `row_S` that of one row each."""
    model = latents.model
    select = None if row_S is None else (lambda x: gather_row(x, row_S, 1))
    attend = latents.attention(model.config.trunk_layers, row_S)
    ahead_SWD = model.trunk.embedding(follow_SW)
    return cast(Tensor, model.head(2)(latents.of[0], latents.rotary, attend, select, ahead_BTD=ahead_SWD))
