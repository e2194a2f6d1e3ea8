"""Losses that train a head for acceptance: what it says of a token against what the next-token head says of it later.

Drafts are judged by head 1, not by the text. So head k at position t, which guesses token t+k, learns from head 1 at
position t+k-1, which reads all tokens between and decides. Its distribution p is a teacher: no gradient goes into it.

    kl               KL(p || q), the soft labels of distillation (MTP-D, arXiv 2603.23911)
    total-variation  1 - sum_v min(p_v, q_v): how often a draft sampled from q is refused under rejection sampling, so
                     its sum is the acceptance itself (Bebop, arXiv 2606.12370). Far from p its gradient is small:
                     start from heads that know something, or mix cross-entropy in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from headstart.data.batches import IGNORE
from headstart.model.transformer import compute_dtype
from headstart.objective.cross_entropy import LOGITS_BYTES, CrossEntropy, LinearLoss, chunk_rows

Divergence = Literal["kl", "total-variation"]


def taught_targets(targets_BTn: Tensor, offsets: Sequence[int] | None = None) -> Tensor:
    """`targets_BTn` with `IGNORE` where head k has no teacher: in the last offsets[k-1] - 1 (None: k - 1) positions of
    a row, as head 1 would stand behind the row there."""
    T = targets_BTn.shape[1]
    taught = targets_BTn.clone()
    for i, ahead in enumerate(offsets or range(1, targets_BTn.shape[2] + 1)):
        taught[:, max(0, T - ahead + 1) :, i] = IGNORE
    return taught


def later(x_BTD: Tensor, k: int) -> Tensor:
    """For each position t what `x` holds at t+k-1; zeros where that is behind the row."""
    moved = torch.zeros_like(x_BTD)
    moved[:, : max(0, x_BTD.shape[1] - k + 1)] = x_BTD[:, k - 1 :]
    return moved


def linear_distillation(
    x: Tensor,
    weight_VD: Tensor,
    targets: Tensor,
    teacher: Tensor,
    teacher_weight_VD: Tensor,
    *,
    divergence: Divergence,
    share: float = 1.0,
    budget: int = LOGITS_BYTES,
) -> CrossEntropy:
    """Summed share * D(p, q) + (1 - share) * cross-entropy, with q of `x @ weight.T` and p of `teacher @
    teacher_weight.T`; logits of neither are ever held for more than a chunk.

    Args:
        x: (..., D), floating.
        weight_VD: (V, D).
        targets: (...) int64; `IGNORE` counts for nothing, in D as well.
        teacher, teacher_weight_VD: (..., D) and (V, D), without gradient.
        divergence: D.
        share: of D, the rest is that of cross-entropy, from 0 to 1.
        budget: bytes of logits held at once, the teacher's included.

    Returns:
        As `linear_cross_entropy`: `total` and `correct` are those of the targets, so that runs with different losses
        can be compared.
    """
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        flat, targets_N = x.flatten(0, -2), targets.flatten()
        teacher_ND, teacher_weight = teacher.detach().flatten(0, -2).to(dtype), teacher_weight_VD.detach().to(dtype)
        rows = chunk_rows(weight_VD.shape[0], budget // 2, 4 if x.is_cuda else dtype.itemsize)

        def differentiate(logits_RV: Tensor, where: slice, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
            p = (teacher_ND[where] @ teacher_weight.T).to(wide).log_softmax(-1)
            return _differentiate_(logits_RV, p, targets_N[where], wide, divergence, share)

        return CrossEntropy(*LinearLoss.apply(flat, weight_VD, dtype, rows, differentiate))


def _differentiate_(
    logits_RV: Tensor, log_p_RV: Tensor, targets_R: Tensor, wide: torch.dtype, divergence: Divergence, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cross_entropy._differentiate_`, and the summed mixed loss first."""
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
        distance = 1 - torch.minimum(p, q).sum(-1, keepdim=True)
        # d/dq_v is -1 where q_v < p_v, else 0; then through the softmax.
        gradient = q * ((q * below).sum(-1, keepdim=True) - below.to(wide)).mul_(share)
    if share < 1:
        gradient.add_(q, alpha=1 - share)
        gradient.scatter_add_(1, index, torch.full_like(index, share - 1, dtype=wide))
    logits_RV.copy_(gradient.mul_(valid))
    return share * (distance * valid).sum() + (1 - share) * total, total, correct
