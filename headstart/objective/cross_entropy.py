"""Cross-entropy of a linear layer that never holds all its logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headstart.data.batches import IGNORE
from headstart.model.transformer import compute_dtype

LOGITS_BYTES = 64 * 2**20
"""Bytes of one chunk of logits. Each chunk reads the whole weight three times, so chunks must not become thin: hence a
budget in bytes, not a ratio of shapes."""
PIECE_BYTES = 2**22
"""Bytes of fp32 logits in one piece of the softmax on a CPU. A piece stays in the caches; a whole chunk would go to
memory and back for each of a dozen operations."""


def chunk_rows(vocab_size: int, budget: int = LOGITS_BYTES, bytes_per_logit: int = 4) -> int:
    """Return the rows of a chunk.

    On a GPU all its logits are held in fp32; on a CPU in the dtype of the products, and only a piece of them in fp32.
    """
    return max(16, budget // (bytes_per_logit * vocab_size))


MOSTLY = 0.95
"""Share of rows with targets above which no row is left out."""


class CrossEntropy(NamedTuple):
    """The loss of one head. It is a tuple because the hooks of sharded modules look for tensors in tuples."""

    loss: Tensor
    """Differentiable loss, regularization included, fp32 scalar."""
    total: Tensor
    """Cross-entropy alone, summed over valid targets, in nats; fp32 scalar without a graph."""
    correct: Tensor | None
    """Number of rows in which no logit exceeds the target's, int64 scalar; None if the backend does not count it."""


Differentiate = Callable[[Tensor, slice, torch.dtype], tuple[Tensor, Tensor, Tensor]]
"""(logits (R, V), their rows among all, a dtype to sum in) -> summed loss, summed cross-entropy and hits. It replaces
the logits by the gradient of the summed loss."""


class LinearLoss(torch.autograd.Function):
    """A loss of `x @ weight.T`, given by `differentiate`.

    The forward computes both gradients chunk by chunk, so that logits never outlive their chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, dtype: torch.dtype, rows: int, differentiate: Differentiate
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return summed loss, summed cross-entropy and hits; keep the gradients of the loss."""
        x, weight = x_ND.to(dtype), weight_VD.to(dtype)
        need_x, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        loss, total = x.new_zeros((), dtype=wide), x.new_zeros((), dtype=wide)
        correct = x.new_zeros((), dtype=torch.int64)
        dx = torch.empty_like(x) if need_x else None
        dweight: Tensor | None = None
        piece = rows if x.is_cuda else max(1, PIECE_BYTES // (4 * weight.shape[0]))
        for start in range(0, x.shape[0], rows):
            chunk = x[start : start + rows]
            logits = chunk @ weight.T
            for first in range(0, len(logits), piece):
                part = logits[first : first + piece]
                where = slice(start + first, start + first + len(part))
                part_loss, part_total, part_correct = differentiate(part, where, wide)
                loss += part_loss
                total += part_total
                correct += part_correct
            if dx is not None:
                torch.mm(logits, weight, out=dx[start : start + rows])
            if need_weight and dweight is None:
                dweight = (logits.T @ chunk).to(wide)
            elif dweight is not None:
                # Summed over chunks in fp32: in bf16 the error grows with the number of chunks.
                dweight = dweight.addmm_(logits.T, chunk) if wide == dtype else dweight.add_(logits.T @ chunk)
        ctx.dx, ctx.dweight = dx, dweight
        ctx.dtypes = x_ND.dtype, weight_VD.dtype
        ctx.mark_non_differentiable(total, correct)
        return loss, total, correct

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward has computed."""
        # Both buffers belong to this call and are used once, so they are scaled in place.
        dx, dweight = ctx.dx, ctx.dweight
        ctx.dx = ctx.dweight = None
        return (
            None if dx is None else dx.mul_(scale).to(ctx.dtypes[0]),
            None if dweight is None else dweight.mul_(scale).to(ctx.dtypes[1]),
            None,
            None,
            None,
        )


def _differentiate_(
    logits_RV: Tensor, targets_R: Tensor, wide: torch.dtype, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace logits by the gradient of the summed loss.

    Return the summed cross-entropy, the summed squares of the normalizer (0 without z-loss), and the hits.
    """
    valid = (targets_R != IGNORE)[:, None]
    index = targets_R.clamp_min(0)[:, None]
    values = logits_RV.to(wide)
    largest = values.amax(-1, keepdim=True)
    picked = values.gather(1, index) - largest
    # An argmax would read all logits once more and take five times as long as the maximum on a CPU.
    correct = ((picked >= 0) & valid).sum()
    values.sub_(largest).exp_()
    denominator = values.sum(-1, keepdim=True)
    log_denominator = denominator.log()
    total = ((log_denominator - picked) * valid).sum()
    squares, share = torch.zeros_like(total), valid / denominator
    if z_loss:
        normalizer = log_denominator + largest
        squares = (normalizer.square() * valid).sum()
        share = share * (1 + 2 * z_loss * normalizer)
    # Probabilities minus one at the target, 0 where ignored. The gradient of the squared normalizer is probabilities
    # again, so it only scales them.
    values.mul_(share)
    values.scatter_add_(1, index, -valid.to(wide))
    if values.dtype != logits_RV.dtype:
        logits_RV.copy_(values)
    return total, squares, correct


def rows_with_targets(targets_N: Tensor) -> Tensor | None:
    """Return the numbers of the rows that have a target, (M,) int64, on a CPU where many have none; else None.

    There it pays to leave the others out. On a GPU the host would wait for their number.
    """
    if targets_N.device.type != "cpu" or not len(targets_N):
        return None
    kept = (targets_N != IGNORE).nonzero()[:, 0]
    return kept if 0 < len(kept) < MOSTLY * len(targets_N) else None


def linear_cross_entropy(
    x: Tensor, weight_VD: Tensor, targets: Tensor, *, z_loss: float = 0.0, budget: int = LOGITS_BYTES
) -> CrossEntropy:
    """Return the cross-entropy of `x @ weight.T` against `targets`, summed (paper section 2, "memory-efficient").

    Args:
        x: (..., D), floating.
        weight_VD: (V, D).
        targets: (...) int64; `IGNORE` (-100) counts for nothing.
        z_loss: coefficient of the sum over valid targets of logsumexp(logits)^2 in the differentiated loss. It keeps
            the logits from drifting away together (PaLM, section 5, with 1e-4; the paper has none).
        budget: bytes of logits held at once.

    Returns:
        Sums over valid targets, fp32 (fp64 for fp64 input); 0 with zero gradients if none is valid. Under autocast the
        products run in the autocast dtype; the softmax and the weight's gradient are fp32. `correct` counts ties with
        the largest logit as hits; products in bf16 make some ties.
    """
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        flat, bytes_per_logit, targets_N = x.flatten(0, -2), 4 if x.is_cuda else dtype.itemsize, targets.flatten()
        if (kept := rows_with_targets(targets_N)) is not None:
            flat, targets_N = flat.index_select(0, kept), targets_N[kept]
        rows = chunk_rows(weight_VD.shape[0], budget, bytes_per_logit)

        def differentiate(logits_RV: Tensor, where: slice, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
            total, squares, correct = _differentiate_(logits_RV, targets_N[where], wide, z_loss)
            return (total + z_loss * squares if z_loss else total), total, correct

        return CrossEntropy(*LinearLoss.apply(flat, weight_VD, dtype, rows, differentiate))


@dataclass
class Scores:
    """Sums over valid targets."""

    loss: Tensor
    """Cross-entropy in nats, fp32 scalar (fp64 for fp64 input)."""
    correct: Tensor
    """Number of targets that have the largest logit, int64 scalar."""
    count: Tensor
    """Valid targets, int64 scalar."""


@torch.no_grad()
def linear_scores(x: Tensor, weight_VD: Tensor, targets: Tensor, *, budget: int = LOGITS_BYTES) -> Scores:
    """Return cross-entropy and top-1 hits of `x @ weight.T` against `targets`, without gradients."""
    dtype, rows = compute_dtype(x), chunk_rows(weight_VD.shape[0], budget)
    x_ND, weight, targets_N = x.flatten(0, -2).to(dtype), weight_VD.to(dtype), targets.flatten()
    if (kept := rows_with_targets(targets_N)) is not None:
        x_ND, targets_N = x_ND.index_select(0, kept), targets_N[kept]
    wide = torch.promote_types(dtype, torch.float32)
    loss = x_ND.new_zeros((), dtype=wide)
    correct = targets_N.new_zeros(())
    for start in range(0, x_ND.shape[0], rows):
        chunk_targets = targets_N[start : start + rows]
        logits = (x_ND[start : start + rows] @ weight.T).to(wide)
        loss += torch.nn.functional.cross_entropy(logits, chunk_targets, ignore_index=IGNORE, reduction="sum")
        correct += (logits.argmax(-1) == chunk_targets).sum()
    return Scores(loss, correct, (targets_N != IGNORE).sum())
