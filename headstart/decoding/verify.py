"""What a pass over windows that are trees does otherwise than one over chains: which row is the last one accepted, and
where the next drafts go."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headstart.decoding.acceptance import recursive_rejection
from headstart.decoding.cache import pick
from headstart.decoding.drafters.tree import TreeRows
from headstart.decoding.kernels import cpu

if TYPE_CHECKING:
    from headstart.decoding.decode_pass import DecodingState


def settle_tree(
    state: DecodingState, slots: slice, tokens_SR: Tensor, tree: TreeRows, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The walk down each window's tree, from a row to the child that is what head 1 says there; moves the slots on.

    Returns:
        the tokens (S, D + 1) along the path, its length (S,) without the root, and its last row (S,).
    """
    length, window, drafted = state.length_S[slots], state.window_SW[slots], state.drafted_S[slots]
    compiled = cpu.chooser() if tokens_SR.device.type == "cpu" else None
    if compiled is not None:
        accepted, row, tokens_SR = torch.empty_like(length), torch.empty_like(length), tokens_SR.contiguous()
        tensors = (tokens_SR, window, drafted, length, state.heads_S[slots], accepted, row)
        pointers = [x.data_ptr() for x in (*tensors, tree.parent_R, tree.depth_R)]
        compiled.settle_tree(*pointers, *tokens_SR.shape, window.shape[1], heads - 1)
        return tokens_SR.gather(1, tree.path_RD[row]), accepted, row
    there = tree.depth_R[1:] <= drafted[:, None]
    right = torch.ones_like(tokens_SR, dtype=torch.bool)
    right[:, 1:] = (window[:, 1 : tree.rows] == tokens_SR[:, tree.parent_R[1:]]) & there
    whole = (right[:, None] | ~tree.sees_RR).all(-1)  # (S, R): right with all before it
    row = (whole * (tree.depth_R + 1)).argmax(1)
    accepted = tree.depth_R[row]
    tokens_SD = tokens_SR.gather(1, tree.path_RD[row])
    state.move_on(slots, length + accepted + 1, tokens_SR.gather(1, row[:, None])[:, 0], heads)
    return tokens_SD, accepted, row


def judge_tree(
    state: DecodingState,
    slots: slice,
    tokens_SR: Tensor,
    logits_SRV: Tensor,
    noise_SRV: Tensor | None,
    tree: TreeRows,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`settle_tree` where slots have the rule `rejection`: for those, recursive rejection sampling."""
    sampling, length = state.sampling, state.length_S[slots].clone()
    window, drafted = state.window_SW[slots, : tree.rows].clone(), state.drafted_S[slots].clone()
    matched = settle_tree(state, slots, tokens_SR, tree, heads)
    if noise_SRV is None:
        return matched
    D, C = tree.tree.depth, tree.tree.ranks
    # A draw for each depth and rank of a slot: of all siblings' families one at most is asked.
    depth, rank = (torch.arange(count, device=length.device) for count in (D, C))
    uniform = sampling.uniform(length, (depth[:, None] + 1 + (rank << 16)).flatten(), slots).view(-1, D, C)
    by_row = None
    if state.constraints.any(slots):
        by_row = torch.tensor(state.constraints.has[slots], device=length.device)
    p_SRV, q_SQV = sampling.probabilities(logits_SRV, slots), state.draft_q()[slots]
    row, rest_SV = recursive_rejection(p_SRV, q_SQV, tree, window, drafted, uniform, by_row)
    accepted = tree.depth_R[row]
    # The noise of the position after the last draft kept: nothing was drawn with it yet.
    last = (rest_SV.log() + pick(noise_SRV, row, 1)[:, 0]).argmax(-1)
    path = tree.path_RD[row]
    drafts = window.gather(1, path[:, 1:])
    tokens = torch.cat([drafts, last[:, None]], 1)
    tokens = torch.where(torch.arange(D + 1, device=row.device) == accepted[:, None], last[:, None], tokens)
    weighs = sampling.weighs[slots]
    row = torch.where(weighs, row, matched[2])
    accepted = torch.where(weighs, accepted, matched[1])
    tokens = torch.where(weighs[:, None], tokens, matched[0])
    state.move_on(slots, length + accepted + 1, tokens.gather(1, accepted[:, None])[:, 0], heads)
    return tokens, accepted, row


def fill_tree(state: DecodingState, slots: slice, logits_SKV: Tensor, noise: Tensor | None, tree: TreeRows) -> Tensor:
    """The candidates of the drafting heads go to their nodes. Returns the best of each head, (S, K-1)."""
    candidates = state.sampling.best(logits_SKV, noise, slots, tree.tree.ranks)  # (S, K-1, C)
    flat = candidates.flatten(1)
    # Nodes of heads that do not draft get any token: `drafted_S` says that they do not count.
    state.window_SW[slots, 1 : tree.rows] = flat[:, tree.candidate_G.clamp_max(flat.shape[1] - 1)]
    return candidates[..., 0]
