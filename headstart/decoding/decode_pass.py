"""The decoding pass: feed the windows, verify them with head 1, commit, draft the next ones. One run of the trunk.

This is the merged form of blockwise parallel decoding (Stern et al. 2018, section 4; paper section 2, inference). The
state of a slot is how many positions its caches hold (`length_S`) and a window: its first token, the root, is decided
but not cached yet; drafts follow it. A window of one token is plain decoding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headstart.decoding.cache import CachedAttention
from headstart.decoding.drafters.interface import PromptPiece, Verified
from headstart.decoding.drafters.registry import head_drafter
from headstart.decoding.drafters.tree import RowPaths
from headstart.decoding.latents import Latents
from headstart.decoding.sampling import Noise
from headstart.decoding.state import DecodingState, PassPlan
from headstart.decoding.verify import Evidence, Verdict, verify
from headstart.model.transformer import Transformer


def decode_pass(model: Transformer, state: DecodingState, plan: PassPlan) -> tuple[Tensor, Tensor]:
    """Run one pass over the windows of `plan.slots`; update `state` in place, with no value read by the host.

    `model` is in decoding form (`kernels.pack`). Return tokens (S, R) int64, for a tree (S, depth + 1), and accepted
    (S,) int64: the pass commits tokens[s, : accepted[s] + 1].
    """
    slots, tree = plan.slots, state.windows.trees(plan.slots, plan.rows, plan.tree)
    length = state.length_S[slots].clone()  # a slice is a view, and verification changes it
    latents = _feed(model, state, plan, length, tree)
    logits = _logits(model, state, plan, latents.head(1))
    if plan.keep_logits:
        state.logits_SRV = logits
    if state.penalties.any(slots):
        logits = state.penalties.apply(logits, state.windows.tokens_SW[slots, 1 : plan.rows], slots, tree)
    logits = state.constraints.apply(logits, slots)
    noise = fed_noise = None
    if state.sampling.any_sampled(slots):
        # The noise of all positions that this pass decides or drafts: both share it.
        reach = plan.rows if tree is None else tree.path_SRD.shape[2]
        decided = length[:, None] + torch.arange(1, reach + plan.heads, device=length.device)
        noise = state.sampling.noise(decided, slots)
        fed_noise = (
            noise.rows(slice(plan.rows)) if tree is None else noise.gather(tree.depth_SR.expand(len(length), -1))
        )
    tokens = state.sampling.choose(logits, fed_noise, slots)
    verdict = verify(state, Evidence(slots, tokens, logits, fed_noise, length, plan.heads, tree))
    if tree is not None and state.logits_SRV is not None and plan.keep_logits:
        path = tree.path_to(verdict.row_S)[..., None]
        state.logits_SRV = state.logits_SRV.gather(1, path.expand(-1, -1, logits.shape[-1]))
    state.penalties.wrote(verdict.tokens_SD, verdict.accepted_S, slots)
    noise = _draft_noise(state, plan, verdict, noise) if plan.heads > 1 else None
    verified = Verified(model, state, plan, latents, verdict, length, noise, tree)
    if plan.heads > 1:
        _draft(verified)
    verified.compact()
    return verdict.tokens_SD, verdict.accepted_S


def _feed(model: Transformer, state: DecodingState, plan: PassPlan, length_S: Tensor, tree: RowPaths | None) -> Latents:
    """Run the trunk over the windows, writing keys and values to the caches."""
    window = state.windows.tokens_SW[plan.slots, : plan.rows]
    places = state.positions(length_S, plan.rows, plan.starts)
    if tree is None:
        rotary = state.rotary_at(places, plan.starts)
    else:
        rotary = state.rotary_at(length_S[:, None] + tree.depth_SR)
    attention = CachedAttention(state.cache, plan.slots, places, plan.span, plan.starts, tree, plan.row_by_row)
    return Latents(model, window, rotary, attention)


def _logits(model: Transformer, state: DecodingState, plan: PassPlan, z_SRD: Tensor) -> Tensor:
    """Return head 1's logits (S, R, V); where rows are independent, those of slots without a request are 0."""
    live = [i for i, start in enumerate(plan.starts or ()) if start >= 0]
    if not state.cache.compiled or len(live) in (0, len(z_SRD)):
        return model.unembedding(z_SRD)
    logits_LRV = model.unembedding(z_SRD[live])
    return logits_LRV.new_zeros(len(z_SRD), *logits_LRV.shape[1:]).index_copy_(0, torch.tensor(live), logits_LRV)


def _draft_noise(state: DecodingState, plan: PassPlan, verdict: Verdict, noise_SR: Noise | None) -> Noise | None:
    """Return the noise (S, K-1) of the drafts to make, given that of all positions from the old root on."""
    if noise_SR is None:
        return None
    offset = torch.arange(1, plan.heads, device=state.length_S.device)
    if state.sampling.plain_rules(plan.slots):
        return noise_SR.gather(verdict.accepted_S[:, None] + offset)
    # The lengths have advanced: each is the position of the next root.
    return state.sampling.draft_noise(state.length_S[plan.slots], offset, plan.slots)


def _draft(verified: Verified) -> None:
    """Draft the next windows with heads 2..K, and keep what verification and the policy need of the drafts."""
    state, plan, slots = verified.state, verified.plan, verified.plan.slots
    config, windows = verified.model.config, state.windows
    proposal = head_drafter(config).draft(verified)
    logits = proposal.logits_SKC
    state.constraints.keep(logits, slots)
    q_SKV = None
    if not state.sampling.plain_rules(slots):
        q_SKV = state.sampling.probabilities(logits, slots)
        windows.q_SKV[slots, : plan.heads - 1] = q_SKV
    if plan.confident:
        expected = None if q_SKV is None else expected_confidence(q_SKV, config.ahead > 0)
        windows.confidence_SK[slots, : plan.heads - 1] = confidence_to_feed(
            state, logits, proposal.chosen_SK, expected, slots
        )


def confidence_to_feed(
    state: DecodingState, logits_SKV: Tensor, drafts_SK: Tensor, expected_SK: Tensor | None, slots: slice
) -> Tensor:
    """Return the probability (S, K-1) of each draft under its head, or its expectation where a rule weighs drafts.

    There, whether a draft is fed must not depend on which one was drawn: that would bend the distribution.
    """
    confidence = state.sampling.confidence(logits_SKV, drafts_SK, slots)
    return (
        confidence if expected_SK is None else torch.where(state.sampling.weighs[slots, None], expected_SK, confidence)
    )


def expected_confidence(q_SKV: Tensor, chained: bool) -> Tensor:
    """Return the expected probability (S, K-1) of a draft drawn from q.

    In a chain q depends on the drafts before it, so head 2's stands for all.
    """
    expected_SK = q_SKV.square().sum(-1)
    return expected_SK[:, :1].expand_as(expected_SK) if chained else expected_SK


@torch.no_grad()
def prefill(
    model: Transformer, state: DecodingState, piece: PromptPiece, score: Callable[[Tensor], None] | None = None
) -> None:
    """Fill the caches of a slot with a piece of a prompt; its length is left to the caller, and no logits are made.

    `score` is called with head 1's latents (1, T, D), for log-probabilities of the prompt.
    """
    start, end = piece.start, piece.start + len(piece.tokens_T)
    positions = torch.arange(start, end, device=piece.tokens_T.device)[None]
    slots = slice(piece.slot, piece.slot + 1)
    attention = CachedAttention(state.cache, slots, positions, end, [start])
    latents = Latents(model, piece.tokens_T[None], state.rotary_at(positions), attention)
    if score is not None:
        score(latents.head(1))
    head_drafter(model.config).read(state, latents, piece)
