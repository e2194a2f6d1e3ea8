"""The training step: one depth-first walk over the tree of heads, and the joint reference tests compare it with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.data.batches import IGNORE
from headstart.errors import UsageError
from headstart.model.attention import DocumentAttention, causal_attention
from headstart.model.layers import Attend
from headstart.model.transformer import Transformer, compute_dtype
from headstart.objective.backends import LossConfig
from headstart.objective.cross_entropy import LOGITS_BYTES, Scores, linear_scores


@dataclass
class HeadLosses:
    """What a step saw, without any graph: nothing here can be scaled or differentiated by mistake. A head of weight 0
    is not asked: its entries are 0."""

    sums: Tensor
    """(n,) fp32: summed unweighted cross-entropy of each head, in nats; without z-loss."""
    counts: Tensor
    """(n,) int64: valid targets of each head."""
    correct: Tensor | None
    """(n,) int64: how often no logit was above that of the target; None where the loss backend does not tell."""


Seen = tuple[Tensor, Tensor | None]
"""Summed cross-entropy and hits of one head."""


def count_targets(targets_BTn: Tensor) -> Tensor:
    """(B, T, n) int64 -> (n,) int64 valid targets of each head."""
    return (targets_BTn != IGNORE).sum((0, 1))


def walk_step(
    model: Transformer,
    tokens_BT: Tensor,
    targets_BTn: Tensor,
    counts_n: Tensor,
    weights: Sequence[float] | None = None,
    documents_BT: Tensor | None = None,
    loss: LossConfig | None = None,
    budget: int = LOGITS_BYTES,
) -> HeadLosses:
    """Adds to each parameter's gradient that of sum_k weights[k-1] / counts[k-1] * sum_t CE(head k at t, its target).

    The paper's memory-efficient forward and backward (section 2), for any tree of heads: each head is entered with a
    detached alias of its parent's latent, its own loss is differentiated at once and its logits freed, its children
    are visited, and only then is it differentiated, once, with the sum of their gradients. At any moment one head's
    chunk of logits exists, on the parallel tree one head's activations: O(V + d) instead of O(nV + d). Gradients equal
    those of `joint_step` to rounding.

    Args:
        tokens_BT: (B, T) int64; for sequential heads (B, T + n - 1), with the tokens that follow each row.
        targets_BTn: (B, T, n) int64, entry k-1 the target of head k, `IGNORE` where there is none.
        counts_n: (n,) valid targets of each head in the *whole* optimiser step: with accumulation or several processes
            the sum over all of them, so that 1 x 4 micro-batches equal 4 x 1 whatever they hold.
        weights: n head weights; None: all 1, as the paper. A head of weight 0 has no loss computed, and does not run at
            all unless a head of another weight hangs on it: its parameters then keep the gradients they have.
        documents_BT: (B, T) int64, to keep attention inside documents; None: rows are plain.
        loss: z-loss and who computes the cross-entropy; None: ours, plain.
        budget: bytes of logits held at once.
    """
    config, T = model.config, targets_BTn.shape[1]
    _check_width(model, tokens_BT, targets_BTn)
    attend: Attend = causal_attention if documents_BT is None else DocumentAttention(documents_BT)
    dtype = compute_dtype(model.trunk.embedding.weight)
    rotary = model.rotary(torch.arange(T, device=tokens_BT.device), dtype)
    weights = weights or [1.0] * config.heads
    # A head without valid targets has loss 0; dividing by at least 1 keeps it from becoming NaN.
    scales = torch.as_tensor(weights, device=tokens_BT.device) / counts_n.clamp_min(1)
    function = (loss or LossConfig()).function(budget)
    seen: dict[int, Seen] = {}

    def needed(parent: int) -> list[int]:
        """The heads on `parent` that have a weight, or carry one that has."""
        return [k for k in config.children(parent) if weights[k - 1] or needed(k)]

    def visit(k: int, parent: Tensor) -> Tensor:
        """Differentiates head k and all that hangs on it; gives the gradient in its parent's latent (B, T, D)."""
        alias = parent.detach().requires_grad_()
        ahead = embeddings.of(k)
        latent = model.head(k)(alias, rotary, attend, **ahead)
        leaf = latent.detach().requires_grad_()
        if weights[k - 1]:
            targets = targets_BTn[..., k - 1]
            out = model.unembedding(leaf, k, using=lambda x, weight: function(x, weight, targets))
            (out.loss * scales[k - 1]).backward()
            seen[k] = out.total, out.correct
        gradient = _sum_gradients(leaf, (visit(child, leaf) for child in needed(k)))
        latent.backward(gradient)
        embeddings.add(k, ahead)
        assert alias.grad is not None
        return alias.grad

    if needed(0):
        out = model.trunk(tokens_BT, rotary, lambda layer: attend, T if config.ahead else None)
        z_BTD, embeddings = (out[0], _Ahead(out[1], T)) if config.ahead else (out, _Ahead(None, T))
        leaf = z_BTD.detach()
        gradient = _sum_gradients(leaf, (visit(k, leaf) for k in needed(0)))
        # A frozen trunk, under heads that are trained alone, has no graph.
        if z_BTD.requires_grad:
            pairs = [(z_BTD, gradient), *embeddings.gradients()]
            torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
    return _head_losses(seen, targets_BTn)


class _Ahead:
    """The embeddings of the tokens behind each position, which sequential heads read, and their summed gradients."""

    def __init__(self, looked_up_BTD: Tensor | None, length: int) -> None:
        self._all, self._length = looked_up_BTD, length
        self._sum: Tensor | None = None

    def of(self, k: int) -> dict[str, Tensor]:
        """What head k is called with beside its parent's latent: an alias, as of that."""
        if self._all is None or k == 1:
            return {}
        alias = self._all[:, k - 1 : k - 1 + self._length].detach()
        return {"ahead_BTD": alias.requires_grad_(self._all.requires_grad)}

    def add(self, k: int, given: dict[str, Tensor]) -> None:
        """Takes in the gradient of what `of` gave, in fp32 at least."""
        gradient = given["ahead_BTD"].grad if given else None
        if gradient is None:
            return
        assert self._all is not None
        if self._sum is None:
            self._sum = gradient.new_zeros(self._all.shape, dtype=torch.promote_types(gradient.dtype, torch.float32))
        self._sum[:, k - 1 : k - 1 + self._length] += gradient

    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """The embeddings with the sum of their gradients, if there is one."""
        return [] if self._all is None or self._sum is None else [(self._all, self._sum.to(self._all.dtype))]


def _check_width(model: Transformer, tokens_BT: Tensor, targets_BTn: Tensor) -> None:
    """Sequential heads without the tokens that follow would be trained on others, and say nothing."""
    wanted = targets_BTn.shape[1] + model.config.ahead
    if tokens_BT.shape[1] != wanted:
        raise UsageError(
            f"tokens are {tokens_BT.shape[1]} wide; {targets_BTn.shape[1]} positions of a model with "
            f"{model.config.heads} {model.config.head_kind} heads need {wanted}"
        )


def _head_losses(seen: dict[int, Seen], targets_BTn: Tensor) -> HeadLosses:
    """From the summed cross-entropy and the hits of the heads in `seen`; the entries of others are 0."""
    counts = count_targets(targets_BTn)
    losses = HeadLosses(counts.new_zeros(len(counts), dtype=torch.float32), torch.zeros_like(counts), None)
    hits = torch.zeros_like(counts)
    for k, (total, correct) in seen.items():
        losses.sums[k - 1], losses.counts[k - 1] = total, counts[k - 1]
        if correct is not None:
            hits[k - 1], losses.correct = correct, hits
    return losses


def _sum_gradients(leaf: Tensor, others: Iterator[Tensor]) -> Tensor:
    """The gradient already in `leaf` plus `others`, added in fp32 at least: n heads meet here, bf16 rounds each sum."""
    total = None if leaf.grad is None else leaf.grad
    for gradient in others:
        wide = gradient.float() if gradient.dtype in (torch.bfloat16, torch.float16) else gradient
        total = wide if total is None else total + wide
    assert total is not None
    return total.to(leaf.dtype)


def joint_step(
    model: Transformer,
    tokens_BT: Tensor,
    targets_BTn: Tensor,
    counts_n: Tensor,
    weights: Sequence[float] | None = None,
    documents_BT: Tensor | None = None,
    z_loss: float = 0.0,
) -> HeadLosses:
    """The same gradients as `walk_step` by ordinary autograd over all heads' logits at once: slow, large, obvious.

    Heads of weight 0 get gradients of 0, where the walk leaves them without.
    """
    n, T = model.config.heads, targets_BTn.shape[1]
    weights = weights or [1.0] * n
    _check_width(model, tokens_BT, targets_BTn)
    latents = model.latents(tokens_BT, list(range(1, n + 1)), _widened(documents_BT, tokens_BT))
    logits_BTnV = torch.stack([model.unembedding(latents[k][:, :T], k) for k in range(1, n + 1)], dim=2)
    losses: list[Tensor] = []
    seen: dict[int, Seen] = {}
    for k in range(1, n + 1):
        logits, targets = logits_BTnV[..., k - 1, :].flatten(0, 1), targets_BTn[..., k - 1].flatten()
        total = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        valid = targets != IGNORE
        losses.append(total + z_loss * (logits.logsumexp(-1)[valid] ** 2).sum() if z_loss else total)
        if weights[k - 1]:
            logits = logits.detach()  # counting hits is no part of what is differentiated, nor of its memory
            correct = (logits.gather(-1, targets.clamp_min(0)[:, None]) >= logits.amax(-1, keepdim=True))[valid].sum()
            seen[k] = total.detach(), correct
    scales = torch.as_tensor(weights, device=tokens_BT.device) / counts_n.clamp_min(1)
    (torch.stack(losses) * scales).sum().backward()
    return _head_losses(seen, targets_BTn)


def _widened(documents_BT: Tensor | None, tokens_BT: Tensor) -> Tensor | None:
    """The documents of tokens that go on behind the rows: any will do there, for no row attends to them."""
    if documents_BT is None or documents_BT.shape == tokens_BT.shape:
        return documents_BT
    return torch.cat([documents_BT, documents_BT[:, -1:].expand(-1, tokens_BT.shape[1] - documents_BT.shape[1])], 1)


@torch.no_grad()
def score_step(
    model: Transformer, tokens_BT: Tensor, targets_BTn: Tensor, documents_BT: Tensor | None = None
) -> list[Scores]:
    """Loss, top-1 hits and counts of every head, without gradients: entry k-1 is head k's. Tokens as in `walk_step`."""
    ks, T = list(range(1, model.config.heads + 1)), targets_BTn.shape[1]
    _check_width(model, tokens_BT, targets_BTn)
    latents = model.latents(tokens_BT, ks, _widened(documents_BT, tokens_BT))
    scores: list[Scores] = []
    for k in ks:
        model.unembedding(
            latents[k][:, :T], k, using=lambda x, w, k=k: scores.append(linear_scores(x, w, targets_BTn[..., k - 1]))
        )
    return scores
