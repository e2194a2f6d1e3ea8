"""Which drafts are kept: rules other than "the draft is what plain decoding would say".

The default rule compares a draft with the token that plain decoding chooses there, greedily or with the position's
noise, so the output is plain decoding's token for token. The rules here weigh probabilities instead. `rejection` and
`block` are lossless in distribution: other tokens for a seed, the same law. Rules called lossy are just that.

Target p and draft q are the distributions after temperature, top-k, top-p and min-p. Head 1's rows give p; q is kept
from the pass that drafted. The proofs (Leviathan et al. 2211.17192; block verification: Sun et al. 2403.10444) need
two things: q is the distribution of a draft given the committed tokens and the drafts before it, and no draw was read
by an earlier window (`sampling.window_key`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from headstart.decoding.drafters.tree import TreeRows
from headstart.decoding.settings import Rule


def chain_probabilities(p_SGV: Tensor, q_SGV: Tensor, drafts_SG: Tensor) -> Tensor:
    """h (S, G): draft i is kept, given that those before it are, with probability h_i = min(1, p_i(x_i) / q_i(x_i))."""
    return _ratios(p_SGV, q_SGV, drafts_SG).clamp_max(1)


def _ratios(p_SGV: Tensor, q_SGV: Tensor, drafts_SG: Tensor) -> Tensor:
    index = drafts_SG[..., None]
    return (p_SGV.gather(-1, index) / q_SGV.gather(-1, index).clamp_min(1e-30))[..., 0]


def block_probabilities(p_SGV: Tensor, q_SGV: Tensor, drafts_SG: Tensor, fed_S: Tensor) -> tuple[Tensor, Tensor]:
    """h (S, G) and weights w (S, G + 1): the drafts kept are the first i, for the largest i whose draw is below h_i.

    w_0 = 1, w_i = min(1, w_{i-1} p_i(x_i) / q_i(x_i)). With g drafts fed, h_g = w_g; for i < g it is S_i / (S_i + 1 -
    w_i), S_i the mass of (w_i p_{i+1} - q_{i+1})+. Of drafts beyond `fed_S` (S,) h is 0.
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
    """The distribution (S, V), up to its sum, of the token after the last draft kept: (w p - q)+, or p where all drafts
    fed were kept (`whole_S`), or where rounding has left nothing of it."""
    rest = (weight_S[:, None] * p_SV - q_SV).clamp_min(0)
    return torch.where((whole_S | (rest.sum(-1) <= 1e-12))[:, None], p_SV, rest)


def weighed(
    p_SRV: Tensor, q_SGV: Tensor, drafts_SG: Tensor, fed_S: Tensor, block_S: Tensor, uniform_SG: Tensor
) -> tuple[Tensor, Tensor]:
    """Rejection, or where `block_S` block verification, of G drafts of which `fed_S` (S,) count.

    Args:
        p_SRV: target distributions, R = G + 1; row i-1 is that of draft i.
        q_SGV: draft distributions. uniform_SG: independent draws in (0, 1).

    Returns:
        accepted (S,), and the distribution (S, V), up to its sum, of the token after them.
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
    """What is left of distributions once a token of theirs was drawn and is out."""
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
    """Rejection on a tree whose siblings were drawn from q one after another without replacement (SpecInfer 2305.09781,
    Sequoia 2402.12374): a sibling is kept with probability min(1, p / q), else p becomes what is left of it, (p - q)+,
    and q what is left without the token. The candidates of a depth are shared by all families of it, which changes
    nothing: which family is asked depends on the depths before it alone. Nor does it where each family's are drawn from
    a distribution of its own.

    Args:
        p_SRV: target distributions after each row. q_SQV: draft distributions, entry j those of depth j + 1, or where
            `by_row_S` (bool) those of the children of row j.
        window_SR: the tokens. drafted_S: of how many depths there are drafts.
        uniform_SDC: independent draws in (0, 1), for each depth and rank.

    Returns:
        the last row kept (S,), and the distribution (S, V), up to its sum, of the token after it.
    """
    row = torch.zeros_like(drafted_S)
    alive = torch.ones_like(drafted_S, dtype=torch.bool)
    rest = p_SRV[:, 0]
    for d in range(tree.tree.depth):
        q, moved = q_SQV[:, d], torch.zeros_like(alive)
        if by_row_S is not None:  # of a row without children there are none, nor does it ask
            of_row = q_SQV.gather(1, row.clamp_max(q_SQV.shape[1] - 1)[:, None, None].expand(-1, 1, q.shape[-1]))[:, 0]
            q = torch.where(by_row_S[:, None], of_row, q)
        children = tree.children_RC[row]
        for r in range(tree.tree.ranks):
            child = children[:, r, None]
            token = window_SR.gather(1, child)
            # Where q has run out of tokens nothing was drawn, whatever the window holds.
            asked = alive & ~moved & (child[:, 0] > 0) & (d < drafted_S) & (q.gather(1, token)[:, 0] > 0)
            chance = chain_probabilities(rest[:, None], q[:, None], token)[:, 0]
            kept = asked & (uniform_SDC[:, d, r] < chance)
            left = residual(rest, q, torch.ones_like(chance), torch.zeros_like(kept))
            lost = (asked & ~kept)[:, None]
            rest = torch.where(lost, left / left.sum(-1, keepdim=True), rest)
            q = torch.where(lost, without(q, token), q)
            row, moved = torch.where(kept, child[:, 0], row), moved | kept
        alive = moved
        at = row[:, None, None].expand(-1, 1, p_SRV.shape[-1])
        rest = torch.where(moved[:, None], p_SRV.gather(1, at)[:, 0], rest)
    return row, rest


def lossy(rule: Rule, p_RV: Tensor, drafts_G: Tensor, tokens_R: Tensor) -> Tensor:
    """Which drafts (G,) of one slot a lossy rule keeps, each judged alone. p (R, V) of the rows; tokens (R,) of head
    1."""
    G = len(drafts_G)
    p = p_RV[:G]
    mine = p.gather(-1, drafts_G[:, None])[:, 0]
    if rule.kind == "lossy-typical":
        epsilon, delta = rule.numbers
        entropy = -(p * p.clamp_min(1e-30).log()).sum(-1)
        return mine > torch.minimum(torch.full_like(entropy, epsilon), delta * (-entropy).exp())
    if rule.kind == "lossy-top-k":
        return (p > mine[:, None]).sum(-1) < rule.numbers[0]
    if rule.kind == "lossy-distance":
        return (drafts_G - p.argmax(-1)).abs() <= rule.numbers[0]
    return (drafts_G == tokens_R[:G]) | (torch.arange(1, G + 1, device=p.device) < rule.numbers[0])
