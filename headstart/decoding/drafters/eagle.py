"""Steps of one module over one cache, EAGLE's and MiMo's: drafts made one after another, as a chain or as a tree.

Head 2 at position p is step 1: it reads the states of the trunk at p and the token at p + 1. Its entry in the cache is
right as soon as that token is decided, so a pass that feeds rows from position L on writes the entries of all rows, and
those up to the last accepted row stay. From there the module drafts: step d stands d - 1 positions behind that row,
reads the output of step d - 1 and the draft before, and writes an entry that the next pass overwrites.

A tree grows depth by depth (EAGLE-2, arXiv 2406.16858). The confidence of a node is the product of the probabilities
along its path. Of the candidates of a depth those of the highest confidences are expanded, in one run of the module
over all of them; of all candidates those of the highest become the nodes of the window, best first.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from headstart.decoding.cache import CachedAttention, gather_row
from headstart.decoding.drafters.candidates import Proposal
from headstart.decoding.drafters.interface import PromptPiece, Verified
from headstart.decoding.drafters.sequential import Chain
from headstart.decoding.drafters.tree import DynamicTree, RowPaths
from headstart.decoding.kernels.pack import PackedUnembedding
from headstart.decoding.latents import Latents
from headstart.decoding.state import DecodingState

LEAST = -60.0
"""The least logarithm of a confidence that counts; less is the same."""
STEP = 1e-4
"""Subtracted from the logarithm of each confidence: a node is then worth less than its parent after any rounding."""


class EagleSteps:
    """Drafts with the steps of one module; a `HeadDrafter`."""

    def draft(self, verified: Verified) -> Proposal:
        """Write the drafts of heads 2..K into the windows, and return them with their logits."""
        plan, verdict = verified.plan, verified.verdict
        follow_SR = verdict.tokens_SD
        if verified.tree is not None:  # rows that are not on the accepted path read any token
            follow_SR = follow_SR.gather(1, verified.tree.depth_SR.expand(len(follow_SR), -1))
        latent = _read_states(verified.latents, follow_SR, verdict.row_S if plan.deferred else None)
        latent = latent if latent.shape[1] == 1 else gather_row(latent, verdict.row_S, 1)
        verified.compact()  # further steps read the accepted path
        if isinstance(plan.draft_tree, DynamicTree):
            return _Growth(verified, plan.draft_tree).grow(latent)
        chain = Chain(verified)
        chain.add(2, latent)
        for k in range(3, plan.heads + 1):
            latent = _step(verified, k, latent, chain.last, None)
            chain.add(k, latent)
        return chain.propose()

    def read(self, state: DecodingState, latents: Latents, piece: PromptPiece) -> None:
        """Fill the cache of step 1, given the trunk's states and the token after each position."""
        if piece.heads > 1:
            assert piece.root_1 is not None
            follow_1W = torch.cat([piece.tokens_T[1:], piece.root_1])[None]
            _read_states(latents, follow_1W, follow_1W.new_zeros(1))


class _Growth:
    """The growth of the trees of one pass, depth by depth: S slots, M nodes expanded at a depth, N candidates."""

    def __init__(self, verified: Verified, tree: DynamicTree) -> None:
        self.verified, self.tree, self.candidates = verified, tree, verified.candidates
        self.tokens: list[Tensor] = []
        self.values: list[Tensor] = []
        self.parents: list[Tensor] = []
        """(S, N) of each depth: the tokens of candidates, the logarithms of their paths' confidences, and the numbers
        of the candidates before them among all candidates, from 1 (0: the root)."""
        self._logits: list[Tensor] = []
        self._chosen: list[Tensor] = []

    def grow(self, latent_S1D: Tensor) -> Proposal:
        """Write trees into the windows. Return the logits after the best node of each depth, and its best draft."""
        width, slots = self.tree.width, len(latent_S1D)
        latent, value_SM = latent_S1D, latent_S1D.new_zeros(slots, 1, dtype=torch.float32)
        number_SM, path_SMJ = torch.zeros_like(value_SM, dtype=torch.int64), None
        for k in range(2, self.verified.plan.heads + 1):
            before = sum(x.shape[1] for x in self.tokens)
            self.branch(k, latent, value_SM, number_SM)
            if k == self.verified.plan.heads:
                break
            value_SM, best_SM = self.values[-1].topk(width)
            number_SM, parent_SM = before + 1 + best_SM, best_SM // width
            # A row's path leads over expanded nodes, whose rows follow those of the depth before.
            own_SM1 = (torch.arange(width, device=best_SM.device) + (k - 2) * width).expand(slots, -1)[..., None]
            path_SMJ = own_SM1 if path_SMJ is None else torch.cat([_rows(path_SMJ, parent_SM), own_SM1], 2)
            rows = RowPaths(torch.full_like(best_SM, k - 2), path_SMJ.contiguous(), (k - 2) * width)
            latent = _step(self.verified, k + 1, _rows(latent, parent_SM), self.tokens[-1].gather(1, best_SM), rows)
        self.select()
        return Proposal(torch.cat(self._logits, 1), torch.cat(self._chosen, 1))

    def branch(self, k: int, latent_SMD: Tensor, value_SM: Tensor, number_SM: Tensor) -> None:
        """Add the candidates of head k that follow the expanded nodes, given their latents, values and numbers."""
        verified, state, slots = self.verified, self.verified.state, self.verified.plan.slots
        unembedding = cast(PackedUnembedding, verified.model.unembedding)
        logits_SMC = self.candidates.logits(unembedding.draft(latent_SMD, k))
        logits_SMC = state.penalties.apply(logits_SMC, None, slots)  # those of the drafts on the path are left out
        noise_S1C = None
        if verified.noise_SK is not None:
            noise_S1C = self.candidates.noise(verified.noise_SK.rows(slice(k - 2, k - 1)))
        chosen, confidence = state.sampling.candidates(logits_SMC, noise_S1C, slots, self.tree.width)
        value = value_SM[..., None] + confidence.clamp(LEAST, 0) - STEP
        self.tokens.append(self.candidates.tokens(chosen).flatten(1))
        self.values.append(value.flatten(1))
        self.parents.append(number_SM.repeat_interleave(self.tree.width, 1))
        self._logits.append(logits_SMC[:, :1])
        self._chosen.append(chosen[:, :1, 0])

    def select(self) -> None:
        """Write the candidates of the likeliest paths into the windows, each before those that follow it."""
        value_SN, token_SN, parent_SN = (torch.cat(x, 1) for x in (self.values, self.tokens, self.parents))
        S, N = value_SN.shape
        best_SG = value_SN.topk(min(self.tree.nodes, N)).indices
        row_G = torch.arange(1, 1 + best_SG.shape[1], device=best_SG.device)
        row_SN = best_SG.new_zeros(S, N + 1).scatter_(1, best_SG + 1, row_G.expand(S, -1))
        if (lacking := self.tree.nodes - best_SG.shape[1]) > 0:  # few heads draft: the best node fills the window
            best_SG = torch.cat([best_SG, best_SG[:, :1].expand(-1, lacking)], 1)
        parent_SR = torch.cat([best_SG.new_zeros(S, 1), row_SN.gather(1, parent_SN.gather(1, best_SG))], 1)
        depth_N = torch.cat([torch.full_like(x[0], depth) for depth, x in enumerate(self.tokens, start=1)])
        depth_SR = torch.cat([best_SG.new_zeros(S, 1), depth_N.expand(S, -1).gather(1, best_SG)], 1)
        row_SR = torch.arange(self.tree.rows, device=best_SG.device).expand(S, -1)
        path_SRD = row_SR[..., None].repeat(1, 1, len(self.tokens) + 1)
        for _ in self.tokens:
            row_SR = parent_SR.gather(1, row_SR)
            path_SRD.scatter_(2, depth_SR.gather(1, row_SR)[..., None], row_SR[..., None])
        windows, slots = self.verified.state.windows, self.verified.plan.slots
        worth_SG = value_SN.gather(1, best_SG).exp()
        windows.put_trees(slots, token_SN.gather(1, best_SG), worth_SG, RowPaths(depth_SR, path_SRD))


def _rows(x_SMD: Tensor, row_SM: Tensor) -> Tensor:
    """Return some rows of each slot."""
    return x_SMD.gather(1, row_SM[..., None].expand(-1, -1, x_SMD.shape[2]))


def _step(verified: Verified, k: int, latent_SMD: Tensor, token_SM: Tensor, rows: RowPaths | None) -> Tensor:
    """Run head k > 2 on outputs of the head before and the drafts after them: one row of each slot, or `rows` of trees.

    Return its outputs (S, M, D).
    """
    model, state, plan = verified.model, verified.state, verified.plan
    next_S, first = verified.length_S + verified.verdict.accepted_S + 1, k - 3 if rows is None else rows.first_row
    # Slots that take no part stand before the sequence, and stay there.
    start_S = torch.where(verified.length_S >= 0, next_S + first, -1 if rows is None else state.parked + first)
    place_SM = start_S[:, None] + torch.arange(token_SM.shape[1], device=token_SM.device)
    position_SM = torch.where(verified.length_S >= 0, next_S + (k - 3), -1)[:, None].expand_as(place_SM)
    span = min(plan.span + plan.heads + first + token_SM.shape[1], state.cache.capacity)
    attention = CachedAttention(state.cache, plan.slots, place_SM, span, tree=rows)
    ahead_SMD = model.trunk.embedding(token_SM)
    attend = attention(model.config.trunk_layers)
    return cast(Tensor, model.head(k)(latent_SMD, state.rotary_at(position_SM), attend, ahead_BTD=ahead_SMD))


def _read_states(latents: Latents, follow_SW: Tensor, row_S: Tensor | None) -> Tensor:
    """Run step 1 over all rows, given the token after each. Return its output; with `row_S` that of one row each."""
    model = latents.model
    select = None if row_S is None else (lambda x: gather_row(x, row_S, 1))
    attend = latents.attention(model.config.trunk_layers, row_S)
    ahead_SWD = model.trunk.embedding(follow_SW)
    return cast(Tensor, model.head(2)(latents.of[0], latents.rotary, attend, select, ahead_BTD=ahead_SWD))
