"""Cross-entropy of a linear layer without ever holding all its logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headstart.data.batches import IGNORE
from headstart.model.transformer import compute_dtype

LOGITS_BYTES = 64 * 2**20
"""Budget of one chunk of logits. Large vocabularies get few rows at a time, small ones are done in one chunk. A budget
in bytes, not a ratio of shapes: each chunk reads the whole weight three times, so chunks must not become thin."""


PIECE_BYTES = 2**22
"""On a CPU the softmax runs over pieces of this many bytes of fp32 logits, which stay in the
caches; a chunk in fp32 would go to memory and back for every one of a dozen operations."""


def chunk_rows(vocab_size: int, budget: int = LOGITS_BYTES, bytes_per_logit: int = 4) -> int:
    """Rows of a chunk. On a GPU all its logits are held in fp32; on a CPU in the dtype of the products, and only a
    piece of them in fp32."""
    return max(16, budget // (bytes_per_logit * vocab_size))


class CrossEntropy(NamedTuple):
    """What one head's loss gives. A tuple, because the hooks of sharded modules look for tensors in tuples."""

    loss: Tensor
    """To be differentiated: the cross-entropy and what regularises it, fp32 scalar."""
    total: Tensor
    """Cross-entropy alone, summed over valid targets, in nats; fp32 scalar without a graph."""
    correct: Tensor | None
    """How often no logit is above that of the target, int64 scalar; None where a backend does not tell."""


Differentiate = Callable[[Tensor, slice, torch.dtype], tuple[Tensor, Tensor, Tensor]]
"""(logits (R, V), their rows among all, a dtype to sum in) -> summed loss, summed cross-entropy and hits; the logits
are turned into the gradient of the summed loss in them, where they lie."""


class LinearLoss(torch.autograd.Function):
    """A loss of `x @ weight.T`, with both gradients computed during the forward, chunk by chunk, so that logits never
    outlive their chunk. What the loss is, `differentiate` says."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, dtype: torch.dtype, rows: int, differentiate: Differentiate
    ) -> tuple[Tensor, Tensor, Tensor]:
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
        # The scale of the loss reaches both gradients: a loss multiplied after the fact keeps its meaning. Both buffers
        # are ours alone and used once, so they are scaled where they lie.
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
    """Turns logits into the gradient of the summed loss in them, where they lie.

    Returns the summed cross-entropy, the summed squares of the normaliser (0 without z-loss), and the hits.
    """
    valid = (targets_R != IGNORE)[:, None]
    index = targets_R.clamp_min(0)[:, None]
    values = logits_RV.to(wide)
    largest = values.amax(-1, keepdim=True)
    picked = values.gather(1, index) - largest
    # An argmax would read all logits once more, at five times the price of the maximum on a CPU.
    correct = ((picked >= 0) & valid).sum()
    values.sub_(largest).exp_()
    denominator = values.sum(-1, keepdim=True)
    log_denominator = denominator.log()
    total = ((log_denominator - picked) * valid).sum()
    squares, share = torch.zeros_like(total), valid / denominator
    if z_loss:
        normaliser = log_denominator + largest
        squares = (normaliser.square() * valid).sum()
        share = share * (1 + 2 * z_loss * normaliser)
    # Probabilities minus one at the target, 0 where ignored. The gradient of the squared normaliser is probabilities
    # again, so it only scales them.
    values.mul_(share)
    values.scatter_add_(1, index, -valid.to(wide))
    if values.dtype != logits_RV.dtype:
        logits_RV.copy_(values)
    return total, squares, correct


def linear_cross_entropy(
    x: Tensor, weight_VD: Tensor, targets: Tensor, *, z_loss: float = 0.0, budget: int = LOGITS_BYTES
) -> CrossEntropy:
    """Summed cross-entropy of `x @ weight.T` against `targets` (paper section 2, "memory-efficient implementation").

    Args:
        x: (..., D), floating.
        weight_VD: (V, D).
        targets: (...) int64; `IGNORE` (-100) counts for nothing.
        z_loss: what is added to the differentiated loss, times the sum over valid targets of logsumexp(logits)^2. It
            keeps the logits from drifting away together (PaLM, section 5, with 1e-4; the paper has none).
        budget: bytes of logits held at once.

    Returns:
        Sums over valid targets, fp32 (fp64 for fp64 input); 0 with zero gradients when none is valid. Under autocast
        the products run in the autocast dtype; the softmax and the weight's gradient are fp32. `correct` counts ties
        with the largest logit as hits, which products in bf16 have now and then.
    """
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        flat, bytes_per_logit, targets_N = x.flatten(0, -2), 4 if x.is_cuda else dtype.itemsize, targets.flatten()
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
    """How often the largest logit was the target, int64 scalar."""
    count: Tensor
    """Valid targets, int64 scalar."""


@torch.no_grad()
def linear_scores(x: Tensor, weight_VD: Tensor, targets: Tensor, *, budget: int = LOGITS_BYTES) -> Scores:
    """As `linear_cross_entropy` without gradients, with top-1 hits: for validation."""
    dtype, rows = compute_dtype(x), chunk_rows(weight_VD.shape[0], budget)
    x_ND, weight, targets_N = x.flatten(0, -2).to(dtype), weight_VD.to(dtype), targets.flatten()
    wide = torch.promote_types(dtype, torch.float32)
    loss = x_ND.new_zeros((), dtype=wide)
    correct = targets_N.new_zeros(())
    for start in range(0, x_ND.shape[0], rows):
        chunk_targets = targets_N[start : start + rows]
        logits = (x_ND[start : start + rows] @ weight.T).to(wide)
        loss += torch.nn.functional.cross_entropy(logits, chunk_targets, ignore_index=IGNORE, reduction="sum")
        correct += (logits.argmax(-1) == chunk_targets).sum()
    return Scores(loss, correct, (targets_N != IGNORE).sum())
