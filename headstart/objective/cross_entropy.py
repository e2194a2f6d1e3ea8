"""Cross-entropy of a linear layer without ever holding all its logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headstart.data.batches import IGNORE

LOGITS_BYTES = 64 * 2**20
"""Budget of one chunk of fp32 logits. Rows of a chunk = budget / (4 V): large vocabularies get few rows at a time,
small ones are done in one piece. A budget in bytes, not a ratio of shapes: each chunk reads the whole weight three
times, so chunks must not become thin."""


def chunk_rows(vocab_size: int, budget: int = LOGITS_BYTES) -> int:
    return max(16, budget // (4 * vocab_size))


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes both gradients during the forward, chunk by chunk, so that logits never outlive their chunk."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
        x, weight = x_ND.to(dtype), weight_VD.to(dtype)
        need_x, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        loss = x.new_zeros((), dtype=wide)
        dx = torch.empty_like(x) if need_x else None
        # Summed over chunks in fp32: in bf16 the error grows with the number of chunks.
        dweight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        for start in range(0, x.shape[0], rows):
            chunk, targets = x[start : start + rows], targets_N[start : start + rows]
            valid = targets != IGNORE
            index = targets.clamp_min(0)[:, None]
            logits = (chunk @ weight.T).to(wide)
            largest = logits.amax(-1, keepdim=True)
            picked = logits.gather(1, index) - largest
            logits = logits.sub_(largest).exp_()
            total = logits.sum(-1, keepdim=True)
            loss += ((total.log() - picked).squeeze(1) * valid).sum()
            if need_x or need_weight:
                # The gradient of the summed loss in the logits: probabilities minus one at the target, 0 where ignored.
                logits.mul_(valid[:, None] / total)
                logits.scatter_add_(1, index, -valid[:, None].to(wide))
                gradient = logits.to(dtype)
                if dx is not None:
                    torch.mm(gradient, weight, out=dx[start : start + rows])
                if dweight is not None:
                    if wide == dtype:
                        dweight.addmm_(gradient.T, chunk)
                    else:
                        dweight += gradient.T @ chunk
        ctx.dx, ctx.dweight = dx, dweight
        ctx.dtypes = x_ND.dtype, weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
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


def linear_cross_entropy(x: Tensor, weight_VD: Tensor, targets: Tensor, *, budget: int = LOGITS_BYTES) -> Tensor:
    """Summed cross-entropy of `x @ weight.T` against `targets` (paper section 2, "memory-efficient implementation").

    Args:
        x: (..., D), floating.
        weight_VD: (V, D).
        targets: (...) int64; `IGNORE` (-100) counts for nothing.
        budget: bytes of fp32 logits held at once.

    Returns:
        The sum over valid targets in nats, an fp32 scalar (fp64 for fp64 input); 0 with zero gradients when none is
        valid. Under autocast the products run in the autocast dtype; the softmax and the weight's gradient are fp32.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        flat = x.flatten(0, -2)
        return _LinearCrossEntropy.apply(
            flat, weight_VD, targets.flatten(), dtype, chunk_rows(weight_VD.shape[0], budget)
        )


@dataclass
class Scores:
    """Sums over valid targets."""

    loss: Tensor
    """Cross-entropy in nats, fp32 scalar."""
    correct: Tensor
    """How often the largest logit was the target, int64 scalar."""
    count: Tensor
    """Valid targets, int64 scalar."""


@torch.no_grad()
def linear_scores(x: Tensor, weight_VD: Tensor, targets: Tensor, *, budget: int = LOGITS_BYTES) -> Scores:
    """As `linear_cross_entropy` without gradients, with top-1 hits: for validation."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    rows = chunk_rows(weight_VD.shape[0], budget)
    x_ND, weight, targets_N = x.flatten(0, -2).to(dtype), weight_VD.to(dtype), targets.flatten()
    loss = x_ND.new_zeros((), dtype=torch.float32)
    correct = targets_N.new_zeros(())
    for start in range(0, x_ND.shape[0], rows):
        chunk_targets = targets_N[start : start + rows]
        logits = (x_ND[start : start + rows] @ weight.T).float()
        loss += torch.nn.functional.cross_entropy(logits, chunk_targets, ignore_index=IGNORE, reduction="sum")
        correct += (logits.argmax(-1) == chunk_targets).sum()
    return Scores(loss, correct, (targets_N != IGNORE).sum())
