"""Verification: which drafts of the windows fed are accepted, and the token after them.

`match` compares a draft with the token that plain decoding chooses there, greedily or with the position's noise, so the
output is plain decoding's token for token. The other rules weigh probabilities. `rejection` and `block` are lossless in
distribution: other tokens for a seed, the same law. Lossy rules change the law.

Target p and draft q are the distributions after temperature, top-k, top-p and min-p. Head 1's rows give p; q is kept
from the pass that drafted. The proofs (Leviathan et al. 2211.17192; block verification: Sun et al. 2403.10444) need
two things: q is the distribution of a draft given the committed tokens and the drafts before it, and no draw was read
by an earlier window (`sampling.window_key`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.decoding.drafters.tree import RowPaths, TreeRows
from headstart.decoding.kernels import cpu
from headstart.decoding.sampling import Noise, draw
from headstart.decoding.settings import Rule
from headstart.decoding.state import DecodingState


@dataclass
class Evidence:
    """Everything a pass computed of the windows fed: S slots, R rows of each window."""

    slots: slice
    tokens_SR: Tensor
    """(S, R) int64: the token of plain decoding after each row."""
    logits_SRV: Tensor
    """(S, R, V): head 1's logits, after penalties and constraints."""
    noise_SR: Noise | None
    """(S, R): noise of the position after each row; None where all slots are greedy."""
    length_S: Tensor
    """(S,) int64: positions cached before the pass."""
    heads: int
    """Most heads K of the slots; heads 2..K draft next."""
    tree: RowPaths | None = None
    """Trees that the rows are nodes of (None: chains)."""


@dataclass
class Verdict:
    """The tokens that a pass commits: tokens[s, : accepted[s] + 1]."""

    tokens_SD: Tensor
    """(S, R) int64, for a tree (S, depth + 1): accepted drafts, then the token after them."""
    accepted_S: Tensor
    """(S,) int64: how many drafts are accepted."""
    row_S: Tensor
    """(S,) int64: the last accepted row of each window; in a chain the same as `accepted_S`."""


def verify(state: DecodingState, evidence: Evidence) -> Verdict:
    """Accept drafts by the rules of the slots, and advance the slots: lengths, roots and numbers of drafts to come."""
    plain, tree = state.sampling.plain_rules(evidence.slots), evidence.tree
    if tree is None:
        return match_chain(state, evidence) if plain else weigh_chain(state, evidence)
    return match_tree(state, evidence, tree) if plain else weigh_tree(state, evidence, tree)


def match_chain(state: DecodingState, evidence: Evidence) -> Verdict:
    """Accept the drafts of chains up to the first that differs from plain decoding's token."""
    slots, tokens_SR, heads = evidence.slots, evidence.tokens_SR, evidence.heads
    compiled = cpu.chooser() if tokens_SR.device.type == "cpu" else None
    if compiled is not None:
        accepted, tokens_SR = torch.empty_like(evidence.length_S), tokens_SR.contiguous()
        pointers = (tokens_SR.data_ptr(), *_addresses(state, slots.start), accepted.data_ptr())
        compiled.settle(*pointers, *tokens_SR.shape, state.windows.tokens_SW.shape[1], heads - 1)
        return Verdict(tokens_SR, accepted, accepted)
    length, window, drafted = state.length_S[slots], state.windows.tokens_SW[slots], state.windows.drafted_S[slots]
    rows = tokens_SR.shape[1]
    fed = torch.arange(1, rows, device=window.device) <= drafted[:, None]
    accepted = ((window[:, 1:rows] == tokens_SR[:, :-1]) & fed).long().cumprod(1).sum(1)
    state.advance(slots, length + accepted + 1, tokens_SR.gather(1, accepted[:, None])[:, 0], heads)
    return Verdict(tokens_SR, accepted, accepted)


def _addresses(state: DecodingState, first: int) -> list[int]:
    """Return where windows, numbers of drafts, lengths and heads of slots from `first` on begin in memory."""
    tensors = (state.windows.tokens_SW, state.windows.drafted_S, state.length_S, state.heads_S)
    return [cpu.address(x, first) for x in tensors]


def match_tree(state: DecodingState, evidence: Evidence, tree: RowPaths) -> Verdict:
    """Walk down each tree, from a row to the child that is plain decoding's token there."""
    slots, tokens_SR, heads = evidence.slots, evidence.tokens_SR, evidence.heads
    compiled = cpu.chooser() if tokens_SR.device.type == "cpu" else None
    if compiled is not None:
        tokens_SR = tokens_SR.contiguous()
        accepted, row = torch.empty_like(evidence.length_S), torch.empty_like(evidence.length_S)
        results = [x.data_ptr() for x in (accepted, row, tree.parent_SR, tree.depth_SR)]
        pointers = (tokens_SR.data_ptr(), *_addresses(state, slots.start), *results)
        compiled.settle_tree(*pointers, *tokens_SR.shape, state.windows.tokens_SW.shape[1], heads - 1, tree.stride)
        return Verdict(tokens_SR.gather(1, tree.path_to(row)), accepted, row)
    length, window, drafted = state.length_S[slots], state.windows.tokens_SW[slots], state.windows.drafted_S[slots]
    drafts = tree.depth_SR[:, 1:] <= drafted[:, None]
    right = torch.ones_like(tokens_SR, dtype=torch.bool)
    before = tokens_SR.gather(1, tree.parent_SR[:, 1:].expand(len(drafts), -1))
    right[:, 1:] = (window[:, 1 : tokens_SR.shape[1]] == before) & drafts
    whole = (right[:, None] | ~tree.sees_SRT).all(-1)  # (S, R): the row and all rows before it on its path
    row = (whole * (tree.depth_SR + 1)).argmax(1)
    accepted = tree.depth_of(row)
    tokens_SD = tokens_SR.gather(1, tree.path_to(row))
    state.advance(slots, length + accepted + 1, tokens_SR.gather(1, row[:, None])[:, 0], heads)
    return Verdict(tokens_SD, accepted, row)


def weigh_chain(state: DecodingState, evidence: Evidence) -> Verdict:
    """Judge the drafts of chains, each slot by its own rule."""
    slots, tokens_SR, sampling = evidence.slots, evidence.tokens_SR, state.sampling
    G = tokens_SR.shape[1] - 1
    drafts_SG = state.windows.tokens_SW[slots, 1 : G + 1]
    fed_S = state.windows.drafted_S[slots].clamp_max(G)
    p_SRV = sampling.probabilities(evidence.logits_SRV, slots)
    kept = drafts_SG == tokens_SR[:, :-1]
    for s, rule in enumerate(sampling.rules[slots]):
        if not rule.lossless:
            kept[s] = lossy(rule, p_SRV[s], drafts_SG[s], tokens_SR[s])
    number = torch.arange(1, G + 1, device=kept.device)
    accepted = (kept & (number <= fed_S[:, None])).long().cumprod(1).sum(1)
    last = tokens_SR.gather(1, accepted[:, None])[:, 0]
    if evidence.noise_SR is not None:
        q_SGV = state.windows.q_SKV[slots, :G]
        uniform = sampling.uniform(evidence.length_S, number, slots)
        weighed_accepted, after_SV = weighed(p_SRV, q_SGV, drafts_SG, fed_S, sampling.block[slots], uniform)
        weighs = sampling.weighs[slots]
        last = torch.where(weighs, _drawn(after_SV, evidence.noise_SR, weighed_accepted), last)
        accepted = torch.where(weighs, weighed_accepted, accepted)
    committed = _committed(torch.cat([drafts_SG, tokens_SR[:, :1]], 1), accepted, last)
    state.advance(slots, evidence.length_S + accepted + 1, last, evidence.heads)
    return Verdict(committed, accepted, accepted)


def weigh_tree(state: DecodingState, evidence: Evidence, tree: RowPaths) -> Verdict:
    """Judge the drafts of trees, each slot by its own rule: recursive rejection, a lossy rule, or matching."""
    slots, sampling, length, tokens_SR = evidence.slots, state.sampling, evidence.length_S, evidence.tokens_SR
    window = state.windows.tokens_SW[slots, : tokens_SR.shape[1]].clone()  # matching overwrites them
    drafted, rules = state.windows.drafted_S[slots].clone(), sampling.rules[slots]
    matched = match_tree(state, evidence, tree)
    p_SRV, row = sampling.probabilities(evidence.logits_SRV, slots), matched.row_S.clone()
    for s, rule in enumerate(rules):
        if not rule.lossless:
            row[s] = lossy_row(rule, p_SRV[s], window[s], tokens_SR[s], drafted[s], tree, s)
    last = tokens_SR.gather(1, row[:, None])[:, 0]
    if isinstance(tree, TreeRows) and evidence.noise_SR is not None and any(rule.weighs for rule in rules):
        D, C = tree.tree.depth, tree.tree.ranks
        # One draw for each depth and rank of a slot: at most one family of siblings of a depth is judged.
        depth, rank = (torch.arange(count, device=length.device) for count in (D, C))
        uniform = sampling.uniform(length, (depth[:, None] + 1 + (rank << 16)).flatten(), slots).view(-1, D, C)
        by_row = None
        if state.constraints.any(slots):
            by_row = torch.tensor(state.constraints.has[slots], device=length.device)
        weighed_row, after_SV = recursive_rejection(
            p_SRV, state.windows.q_SKV[slots], tree, window, drafted, uniform, by_row
        )
        weighs = sampling.weighs[slots]
        row = torch.where(weighs, weighed_row, row)
        last = torch.where(weighs, _drawn(after_SV, evidence.noise_SR, row), last)
    accepted = tree.depth_of(row)
    drafts = window.gather(1, tree.path_to(row)[:, 1:])
    tokens = _committed(torch.cat([drafts, last[:, None]], 1), accepted, last)
    state.advance(slots, length + accepted + 1, last, evidence.heads)
    return Verdict(tokens, accepted, row)


def _drawn(after_SV: Tensor, noise_SR: Noise, row_S: Tensor) -> Tensor:
    """Draw the token after row `row_S` from `after_SV`, with that position's noise, which nothing has used yet."""
    x_SV = after_SV.log()
    return draw((x_SV - x_SV.amax(-1, keepdim=True))[:, None], noise_SR.gather(row_S[:, None]))[:, 0, 0]


def _committed(drafts_SD: Tensor, accepted_S: Tensor, last_S: Tensor) -> Tensor:
    """Return the drafts (S, D) with the token after the accepted ones in its place."""
    place = torch.arange(drafts_SD.shape[1], device=drafts_SD.device)
    return torch.where(place == accepted_S[:, None], last_S[:, None], drafts_SD)


def chain_probabilities(p_SGV: Tensor, q_SGV: Tensor, drafts_SG: Tensor) -> Tensor:
    """Return h (S, G): the probability min(1, p_i(x_i) / q_i(x_i)) of accepting draft i after those before it."""
    return _ratios(p_SGV, q_SGV, drafts_SG).clamp_max(1)


def _ratios(p_SGV: Tensor, q_SGV: Tensor, drafts_SG: Tensor) -> Tensor:
    index = drafts_SG[..., None]
    return (p_SGV.gather(-1, index) / q_SGV.gather(-1, index).clamp_min(1e-30))[..., 0]


def block_probabilities(p_SGV: Tensor, q_SGV: Tensor, drafts_SG: Tensor, fed_S: Tensor) -> tuple[Tensor, Tensor]:
    """Return h (S, G) and weights w (S, G + 1) of block verification.

    It accepts the first i drafts, for the largest i whose draw is below h_i. w_0 = 1, and w_i = min(1, w_{i-1} p_i(x_i)
    / q_i(x_i)). With g drafts fed, h_g = w_g; for i < g it is S_i / (S_i + 1 - w_i), where S_i is the mass of (w_i
    p_{i+1} - q_{i+1})+. For drafts beyond `fed_S` (S,) h is 0.
    """
    ratios = _ratios(p_SGV, q_SGV, drafts_SG)
    weights = [torch.ones_like(fed_S, dtype=p_SGV.dtype)]
    kept = []
    G = drafts_SG.shape[1]
    for i in range(1, G + 1):
        w = (weights[-1] * ratios[:, i - 1]).clamp_max(1)
        weights.append(w)
        if i < G:
            mass = (w[:, None] * p_SGV[:, i] - q_SGV[:, i]).clamp_min(0).sum(-1)
            inside = mass / (mass + 1 - w).clamp_min(1e-30)
        else:
            inside = torch.zeros_like(w)
        kept.append(torch.where(fed_S == i, w, torch.where(fed_S > i, inside, 0)))
    return torch.stack(kept, 1), torch.stack(weights, 1)


def residual(p_SV: Tensor, q_SV: Tensor, weight_S: Tensor, whole_S: Tensor) -> Tensor:
    """Return the distribution (S, V), not normalised, of the token after the accepted drafts.

    It is (w p - q)+, or p where all drafts fed were accepted (`whole_S`), or where rounding leaves nothing of it.
    """
    left = (weight_S[:, None] * p_SV - q_SV).clamp_min(0)
    return torch.where((whole_S | (left.sum(-1) <= 1e-12))[:, None], p_SV, left)


def weighed(
    p_SRV: Tensor, q_SGV: Tensor, drafts_SG: Tensor, fed_S: Tensor, block_S: Tensor, uniform_SG: Tensor
) -> tuple[Tensor, Tensor]:
    """Judge the drafts of chains by rejection, or by block verification.

    Args:
        p_SRV: target distributions, R = G + 1; row i-1 is that of draft i.
        q_SGV: draft distributions.
        drafts_SG: the drafts.
        fed_S: number of drafts of each slot that count.
        block_S: whether the slot's rule is block verification.
        uniform_SG: independent draws in (0, 1).

    Returns:
        accepted (S,), and the distribution (S, V), not normalised, of the token after the accepted drafts.
    """
    G = drafts_SG.shape[1]
    if G == 0:
        return torch.zeros_like(fed_S), p_SRV[:, 0]
    number = torch.arange(1, G + 1, device=drafts_SG.device)
    fed = number <= fed_S[:, None]
    p = p_SRV[:, :G]
    in_chain = ((uniform_SG < chain_probabilities(p, q_SGV, drafts_SG)) & fed).long().cumprod(1).sum(1)
    kept, weights = block_probabilities(p, q_SGV, drafts_SG, fed_S)
    in_block = ((uniform_SG < kept) & fed).long().mul(number).amax(1)
    accepted = torch.where(block_S, in_block, in_chain)
    at = accepted[:, None, None].expand(-1, 1, p_SRV.shape[-1])
    weight = torch.where(block_S, weights.gather(1, accepted[:, None])[:, 0], 1)
    q = q_SGV.gather(1, at.clamp_max(G - 1))[:, 0]
    return accepted, residual(p_SRV.gather(1, at)[:, 0], q, weight, accepted == fed_S)


def without(q_SV: Tensor, token_S1: Tensor) -> Tensor:
    """Return the distributions without a token that was drawn from them, normalised."""
    others = q_SV.scatter(1, token_S1, 0)
    return others / others.sum(-1, keepdim=True).clamp_min(1e-30)


def recursive_rejection(
    p_SRV: Tensor,
    q_SQV: Tensor,
    tree: TreeRows,
    window_SR: Tensor,
    drafted_S: Tensor,
    uniform_SDC: Tensor,
    by_row_S: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Judge trees whose siblings were drawn from q without replacement (SpecInfer 2305.09781, Sequoia 2402.12374).

    A sibling is accepted with probability min(1, p / q); else p becomes its residual (p - q)+, and q loses the token.
    All families of a depth share their candidates, which changes nothing: which family is judged depends on the depths
    before it alone. Families with a distribution of their own change nothing either.

    Args:
        p_SRV: target distributions after each row.
        q_SQV: draft distributions: entry j is that of depth j + 1, or where `by_row_S` that of the children of row j.
        tree: the tree of the windows.
        window_SR: the tokens of the windows.
        drafted_S: number of depths that hold drafts.
        uniform_SDC: independent draws in (0, 1), for each depth and rank.
        by_row_S: whether the slot has one distribution for each row (None: no slot has).

    Returns:
        the last accepted row (S,), and the distribution (S, V), not normalised, of the token after it.
    """
    row = torch.zeros_like(drafted_S)
    alive = torch.ones_like(drafted_S, dtype=torch.bool)
    target = p_SRV[:, 0]
    for d in range(tree.tree.depth):
        q, moved = q_SQV[:, d], torch.zeros_like(alive)
        if by_row_S is not None:  # rows without children have none, and judge none
            of_row = q_SQV.gather(1, row.clamp_max(q_SQV.shape[1] - 1)[:, None, None].expand(-1, 1, q.shape[-1]))[:, 0]
            q = torch.where(by_row_S[:, None], of_row, q)
        children = tree.children_RC[row]
        for r in range(tree.tree.ranks):
            child = children[:, r, None]
            token = window_SR.gather(1, child)
            # Where q has run out of tokens nothing was drawn, whatever the window holds.
            judged = alive & ~moved & (child[:, 0] > 0) & (d < drafted_S) & (q.gather(1, token)[:, 0] > 0)
            chance = chain_probabilities(target[:, None], q[:, None], token)[:, 0]
            kept = judged & (uniform_SDC[:, d, r] < chance)
            left = residual(target, q, torch.ones_like(chance), torch.zeros_like(kept))
            rejected = (judged & ~kept)[:, None]
            target = torch.where(rejected, left / left.sum(-1, keepdim=True), target)
            q = torch.where(rejected, without(q, token), q)
            row, moved = torch.where(kept, child[:, 0], row), moved | kept
        alive = moved
        at = row[:, None, None].expand(-1, 1, p_SRV.shape[-1])
        target = torch.where(moved[:, None], p_SRV.gather(1, at)[:, 0], target)
    return row, target


Lossy = Callable[[tuple[float, ...], Tensor, Tensor, Tensor, Tensor], Tensor]
"""(numbers of the rule, p (G, V), drafts (G,), tokens of plain decoding (G,), number of each draft in its window from 1
(G,)) -> the drafts to accept, (G,) bool."""


def _typical(numbers: tuple[float, ...], p_GV: Tensor, drafts_G: Tensor, tokens_G: Tensor, number_G: Tensor) -> Tensor:
    epsilon, delta = numbers
    entropy = -(p_GV * p_GV.clamp_min(1e-30).log()).sum(-1)
    return _of_drafts(p_GV, drafts_G) > torch.minimum(torch.full_like(entropy, epsilon), delta * (-entropy).exp())


def _top_k(numbers: tuple[float, ...], p_GV: Tensor, drafts_G: Tensor, tokens_G: Tensor, number_G: Tensor) -> Tensor:
    return (p_GV > _of_drafts(p_GV, drafts_G)[:, None]).sum(-1) < numbers[0]


def _distance(numbers: tuple[float, ...], p_GV: Tensor, drafts_G: Tensor, tokens_G: Tensor, number_G: Tensor) -> Tensor:
    return (drafts_G - p_GV.argmax(-1)).abs() <= numbers[0]


def _minimum(numbers: tuple[float, ...], p_GV: Tensor, drafts_G: Tensor, tokens_G: Tensor, number_G: Tensor) -> Tensor:
    return (drafts_G == tokens_G) | (number_G < numbers[0])


LOSSY: dict[str, Lossy] = {
    "lossy-typical": _typical,
    "lossy-top-k": _top_k,
    "lossy-distance": _distance,
    "lossy-minimum": _minimum,
}
"""Lossy rules by kind; each judges every draft alone."""


def lossy(rule: Rule, p_RV: Tensor, drafts_G: Tensor, tokens_R: Tensor) -> Tensor:
    """Return the drafts (G,) of one slot that a lossy rule accepts, given p and the tokens of plain decoding by row."""
    G = len(drafts_G)
    number_G = torch.arange(1, G + 1, device=p_RV.device)
    return LOSSY[rule.kind](rule.numbers, p_RV[:G], drafts_G, tokens_R[:G], number_G)


def lossy_row(
    rule: Rule, p_RV: Tensor, window_R: Tensor, tokens_R: Tensor, drafted: Tensor, tree: RowPaths, slot: int
) -> Tensor:
    """Return the last row of a slot's tree that a lossy rule accepts: of the longest paths the likeliest, as in Medusa.

    p and the tokens of plain decoding are those after each row; `drafted` depths hold drafts.
    """
    depth_R, parent_R, sees_RT = (x[slot if len(x) > 1 else 0] for x in (tree.depth_SR, tree.parent_SR, tree.sees_SRT))
    before, drafts = parent_R[1:], window_R[1:]
    kept = torch.ones_like(sees_RT[0])
    kept[1:] = LOSSY[rule.kind](rule.numbers, p_RV[before], drafts, tokens_R[before], depth_R[1:])
    kept[1:] &= depth_R[1:] <= drafted
    whole = (kept | ~sees_RT).all(-1)
    likelihood = torch.zeros_like(p_RV[:, 0])
    likelihood[1:] = _of_drafts(p_RV[before], drafts).clamp_min(1e-30).log()
    score = torch.where(sees_RT, likelihood, 0).sum(-1)
    longest = whole & (depth_R == (whole * depth_R).max())
    return score.masked_fill(~longest, -math.inf).argmax()


def _of_drafts(p_GV: Tensor, drafts_G: Tensor) -> Tensor:
    return p_GV.gather(-1, drafts_G[:, None])[:, 0]
