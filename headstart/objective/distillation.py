"""Losses that train a head for acceptance: its distribution of a token against the next-token head's.

Head 1 accepts or rejects drafts, not the text. So head k at position t, which predicts token t+k, learns from head 1 at
position t+k-1, which reads all tokens between. The distribution p of head 1 is a teacher: no gradient goes into it.

    kl               KL(p || q), the soft labels of distillation (MTP-D, arXiv 2603.23911)
    total-variation  1 - sum_v min(p_v, q_v): the rate at which rejection sampling rejects a draft sampled from q
                     (Bebop, arXiv 2606.12370). Its gradient is small far from p: start from trained heads, or mix
                     cross-entropy in.
    acceptance       -log sum_v min(p_v, q_v), the logarithm of that acceptance rate. Its gradient is that of total
                     variation over the acceptance, so it is not small far from p.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from headstart.data.batches import IGNORE
from headstart.model.transformer import compute_dtype
from headstart.objective.cross_entropy import LOGITS_BYTES, CrossEntropy, LinearLoss, chunk_rows, rows_with_targets
from headstart.objective.inputs import LikelyTokens, Teacher

Divergence = Literal["kl", "total-variation", "acceptance"]
TINY = 1e-30
"""Least acceptance rate whose logarithm is taken."""


def linear_distillation(
    x: Tensor,
    weight_VD: Tensor,
    targets: Tensor,
    teacher: Teacher | LikelyTokens,
    *,
    divergence: Divergence,
    share: float = 1.0,
    budget: int = LOGITS_BYTES,
) -> CrossEntropy:
    """Return the sum of share * D(p, q) + (1 - share) * cross-entropy, q of `x @ weight.T`, p of `teacher`.

    Only a chunk of the logits of either exists at a time: `budget` bytes, the teacher's included. No gradient goes into
    `teacher`, which gives p for each row of `x` (..., D). Targets (...) of `IGNORE` count for nothing, in D as well.
    `total` and `correct` of the result refer to the targets, so that runs with different losses can be compared.
    """
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        flat, targets_N = x.flatten(0, -2), targets.flatten()
        parts = [part.detach().flatten(0, -2) for part in teacher.by_row]
        if (kept := rows_with_targets(targets_N)) is not None:
            flat, targets_N = flat.index_select(0, kept), targets_N[kept]
            parts = [part.index_select(0, kept) for part in parts]
        rows = chunk_rows(weight_VD.shape[0], budget // 2, 4 if x.is_cuda else dtype.itemsize)

        def differentiate(logits_RV: Tensor, where: slice, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
            here, goal = [part[where] for part in parts], (targets_N[where], wide, divergence, share)
            if isinstance(teacher, LikelyTokens):
                return _differentiate_likely_(logits_RV, here[0], here[1].to(wide), *goal)
            p = (here[0].to(dtype) @ teacher.weight.detach().to(dtype).T).to(wide).log_softmax(-1)
            return _differentiate_(logits_RV, p, *goal)

        return CrossEntropy(*LinearLoss.apply(flat, weight_VD, dtype, rows, differentiate))


def _differentiate_(
    logits_RV: Tensor, log_p_RV: Tensor, targets_R: Tensor, wide: torch.dtype, divergence: Divergence, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn logits into the gradient of the summed loss, in place; return that loss, cross-entropy and hits."""
    valid = (targets_R != IGNORE)[:, None]
    index = targets_R.clamp_min(0)[:, None]
    correct = ((logits_RV.gather(1, index) >= logits_RV.amax(-1, keepdim=True)) & valid).sum()
    log_q = logits_RV.to(wide).log_softmax(-1)
    total = -(log_q.gather(1, index) * valid).sum()
    p, q = log_p_RV.exp(), log_q.exp()
    if divergence == "kl":
        distance = ((log_p_RV - log_q) * p).sum(-1, keepdim=True)
        gradient = (q - p).mul_(share)
    else:
        below = q < p
        distance, factor = _distance(torch.minimum(p, q).sum(-1, keepdim=True), divergence)
        # d/dq_v is -1 if q_v < p_v, else 0; the rest is the gradient of the softmax.
        gradient = q * ((q * below).sum(-1, keepdim=True) - below.to(wide)).mul_(share * factor)
    if share < 1:
        gradient.add_(q, alpha=1 - share)
        gradient.scatter_add_(1, index, torch.full_like(index, share - 1, dtype=wide))
    logits_RV.copy_(gradient.mul_(valid))
    return share * (distance * valid).sum() + (1 - share) * total, total, correct


def _distance(acceptance_R1: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor | float]:
    """Return the distance of distributions that overlap by `acceptance_R1`, and minus its derivative by the overlap."""
    if divergence == "total-variation":
        return 1 - acceptance_R1, 1.0
    acceptance_R1 = acceptance_R1.clamp_min(TINY)
    return -acceptance_R1.log(), 1 / acceptance_R1


def _differentiate_likely_(
    logits_RV: Tensor,
    ids_RL: Tensor,
    p_RL: Tensor,
    targets_R: Tensor,
    wide: torch.dtype,
    divergence: Divergence,
    share: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `_differentiate_` does for a p that is 0 outside some tokens: only those are read of p and of log q."""
    valid = (targets_R != IGNORE)[:, None]
    index = targets_R.clamp_min(0)[:, None]
    values = logits_RV.to(wide)
    largest = values.amax(-1, keepdim=True)
    picked, log_q_RL = values.gather(1, index) - largest, values.gather(1, ids_RL) - largest
    correct = ((picked >= 0) & valid).sum()
    values.sub_(largest).exp_()
    denominator = values.sum(-1, keepdim=True)
    log_q_RL -= denominator.log()
    total = ((denominator.log() - picked) * valid).sum()
    q_RL = log_q_RL.exp()
    of_q = torch.ones_like(denominator)
    if divergence == "kl":
        distance, at_ids = (torch.xlogy(p_RL, p_RL) - p_RL * log_q_RL).sum(-1, keepdim=True), p_RL
    else:
        distance, factor = _distance(torch.minimum(p_RL, q_RL).sum(-1, keepdim=True), divergence)
        at_ids = q_RL * (q_RL < p_RL) * factor
        of_q = at_ids.sum(-1, keepdim=True)
    values.mul_(valid * (share * of_q + 1 - share) / denominator)
    values.scatter_add_(1, ids_RL, at_ids * valid * -share)
    if share < 1:
        values.scatter_add_(1, index, (share - 1) * valid.to(wide))
    if values.dtype != logits_RV.dtype:
        logits_RV.copy_(values)
    return share * (distance * valid).sum() + (1 - share) * total, total, correct
