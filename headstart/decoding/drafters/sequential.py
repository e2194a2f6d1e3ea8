"""Sequential heads: drafts made one after another, each head reading the draft of the one before.

Head k at position p reads head k-1's latent at p and the token at p + k - 1, and attends to its own keys and values up
to p, as in training. So each head has a cache of its own, and its entry at p is right as soon as the token at p + k - 1
is decided: one position later for each head. A pass that decides the tokens up to position R leaves head k right up to
R - k + 1. From there on it drafts, over rows that hold drafts, and the next pass writes those rows anew, over the
tokens that were decided. For that each head but the last keeps its latent at the last right position of each slot
(`KVCache.carried`): the row before those of the next pass.

With L the slot's length and i a row, head k thus runs at positions L - (k-2) + i, and for every head row i reads the
token at L + 1 + i: decided for i up to the number of accepted drafts, and the draft of head 2, 3, ... after that.

Drafts depend only on committed tokens and on noise. The distribution that head k drafts from is the one given the
drafts before it, as rejection sampling and block verification require of a chain that is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from headstart.decoding.cache import CachedAttention, gather_row
from headstart.decoding.drafters.candidates import Proposal
from headstart.decoding.drafters.interface import PromptPiece, Verified
from headstart.decoding.kernels.pack import PackedUnembedding
from headstart.decoding.latents import Latents
from headstart.decoding.state import DecodingState
from headstart.model.transformer import Transformer


class SequentialHeads:
    """Drafts one chain, each head after the one before; a `HeadDrafter`."""

    def draft(self, verified: Verified) -> Proposal:
        """Write the drafts of heads 2..K into the windows, and return them with their logits."""
        state, plan, verdict = verified.state, verified.plan, verified.verdict
        rows, accepted_S = verified.rows, verdict.accepted_S
        tokens_SW = verdict.tokens_SD[:, :rows]
        run = _Run(verified.model, state, plan.slots, verified.length_S, plan.span)
        follow_SN = torch.cat([tokens_SW, tokens_SW.new_zeros(len(tokens_SW), plan.heads - 2)], 1)
        inputs, chain = verified.latents.of[0][:, :rows], Chain(verified)
        for k in range(2, plan.heads + 1):
            row_S = accepted_S + (k - 2)
            asked_S = row_S if plan.deferred and k == plan.heads else None
            latents = run.head(k, inputs, follow_SN[:, : inputs.shape[1]], asked_S)
            latent = latents if latents.shape[1] == 1 else gather_row(latents, row_S, 1)
            chain.add(k, latent)
            if k < plan.heads:
                follow_SN.scatter_(1, row_S[:, None] + 1, chain.last)
                inputs = run.carry(k, latents, accepted_S)
        return chain.propose()

    def read(self, state: DecodingState, latents: Latents, piece: PromptPiece) -> None:
        """Fill the caches of heads 2..K, given the trunk's latents and the token after each position."""
        assert piece.root_1 is not None
        z_1WD, follow_1W = latents.of[0], torch.cat([piece.tokens_T[1:], piece.root_1])[None]
        length_S = torch.full((1,), piece.start, device=z_1WD.device)
        last_S = torch.full((1,), z_1WD.shape[1] - 1, device=z_1WD.device)
        slots, end = slice(piece.slot, piece.slot + 1), piece.start + z_1WD.shape[1]
        run = _Run(latents.model, state, slots, length_S, end, piece.first)
        inputs = z_1WD
        for k in range(2, piece.heads + 1):
            computed = run.head(k, inputs, follow_1W, last_S if k == piece.heads else None)
            if k < piece.heads:
                inputs = run.carry(k, computed, last_S)[:, :-1]


class Chain:
    """The drafts of one pass, each chosen given those before it."""

    def __init__(self, verified: Verified) -> None:
        self._verified, self._candidates = verified, verified.candidates
        self._logits: list[Tensor] = []
        self._chosen: list[Tensor] = []
        self._drafts: list[Tensor] = []

    def add(self, k: int, latent_S1D: Tensor) -> None:
        """Choose the draft of head k from its latent."""
        verified, state, slots, i = self._verified, self._verified.state, self._verified.plan.slots, len(self._drafts)
        unembedding = cast(PackedUnembedding, verified.model.unembedding)
        logits_S1C = self._candidates.logits(unembedding.draft(latent_S1D, k))
        if state.penalties.any(slots):  # each draft counts for those after it
            every = logits_S1C.expand(-1, i + 1, -1)
            logits_S1C = state.penalties.apply(every, torch.cat(self._drafts, 1) if i else None, slots)[:, -1:]
        noise = None if verified.noise_SK is None else verified.noise_SK.rows(slice(i, i + 1))
        self._logits.append(logits_S1C)
        self._chosen.append(state.sampling.choose(logits_S1C, noise, slots))
        self._drafts.append(self._candidates.tokens(self._chosen[-1]))

    @property
    def last(self) -> Tensor:
        """The last draft, (S, 1) token ids."""
        return self._drafts[-1]

    def propose(self) -> Proposal:
        """Write the drafts into the windows, and return them."""
        self._verified.state.windows.put(self._verified.plan.slots, torch.cat(self._drafts, 1))
        return Proposal(torch.cat(self._logits, 1), torch.cat(self._chosen, 1))


@dataclass
class _Run:
    """One run of the heads over cached slots, one head after another."""

    model: Transformer
    state: DecodingState
    slots: slice
    length_S: Tensor
    """Position of the first row of head 2."""
    span: int
    first: int = 0
    """Position before which nothing is read."""

    def head(self, k: int, inputs_SWD: Tensor, follow_SW: Tensor, row_S: Tensor | None) -> Tensor:
        """Return the latents of head k, whose first row is at position length - (k-2); with `row_S` only that row."""
        model, state = self.model, self.state
        positions = (self.length_S - (k - 2))[:, None] + torch.arange(inputs_SWD.shape[1], device=inputs_SWD.device)
        # Rows before the sequence go to the end of the buffers, which no sequence reaches and no row reads. Slots that
        # take no part stand before it as a whole, and stay there.
        before = (positions < self.first) & (self.length_S >= 0)[:, None]
        positions = torch.where(before, positions - self.first + len(state.rotary[0]), positions)
        attention = CachedAttention(state.cache, self.slots, positions, self.span)
        attend = attention(model.config.trunk_layers + k - 2, row_S)
        select = None if row_S is None else (lambda x: gather_row(x, row_S, 1))
        ahead_SWD = model.trunk.embedding(follow_SW)
        rotary = state.rotary_at(positions)
        return cast(Tensor, model.head(k)(inputs_SWD, rotary, attend, select, ahead_BTD=ahead_SWD))

    def carry(self, k: int, latents_SWD: Tensor, right_S: Tensor) -> Tensor:
        """Return head k+1's inputs: the latent carried over from the pass before, then those of this pass.

        Row `right_S` of this pass is carried on to the next one.
        """
        live_S1 = (self.length_S >= 0)[:, None]
        carried_SD = self.state.cache.carried[k - 2, self.slots]
        inputs_SWD = torch.cat([carried_SD[:, None].to(latents_SWD.dtype), latents_SWD], 1)
        latest_SD = gather_row(latents_SWD, right_S, 1)[:, 0].to(carried_SD.dtype)
        carried_SD.copy_(torch.where(live_S1, latest_SD, carried_SD))
        return inputs_SWD
