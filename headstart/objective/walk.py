"""The training step: one depth-first walk over the tree of heads, and the joint reference tests compare it with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.data.batches import IGNORE, Registers, appended
from headstart.errors import UsageError
from headstart.model.attention import DocumentAttention, RegisterAttention, causal_attention
from headstart.model.layers import Attend
from headstart.model.transformer import Transformer, compute_dtype
from headstart.objective.backends import LossConfig
from headstart.objective.cross_entropy import LOGITS_BYTES, CrossEntropy, Scores, linear_scores
from headstart.objective.distillation import later, linear_distillation, taught_targets


@dataclass
class HeadLosses:
    """What a step saw, without any graph: nothing here can be scaled or differentiated by mistake. A head of weight 0
    is not asked: its entries are 0."""

    sums: Tensor
    """(n,) fp32, fp64 of fp64 models: summed unweighted cross-entropy of each head, in nats; without z-loss."""
    counts: Tensor
    """(n,) int64: valid targets of each head."""
    correct: Tensor | None
    """(n,) int64: how often no logit was above that of the target; None where the loss backend does not tell."""


Seen = tuple[Tensor, Tensor | None]
"""Summed cross-entropy and hits of one head."""
Extra = Callable[[Tensor, Tensor], Tensor]
"""(what head 1's logits are made of (B, T, D), with registers (B, T + R, D); its matrix (V, D)) -> a summed loss,
scalar, that is added to head 1's and scaled as it is."""


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
    *,
    z_BTD: Tensor | None = None,
    original: tuple[Tensor, Tensor] | None = None,
    registers: Registers | None = None,
    extras: Sequence[Extra] = (),
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
        loss: z-loss, what heads 2..n learn from, and who computes the cross-entropy; None: ours, plain. Where they
            learn from head 1, only the targets that `taught_targets` leaves count.
        budget: bytes of logits held at once.
        z_BTD: the trunk's output, where it is known: it then does not run. For a trunk that is not trained.
        original: (B, T, D) and (V, D), of which the logits of a teacher of head 1 are made; head 1's loss is then
            KL(teacher || head 1) in place of cross-entropy (self-distillation, arXiv 2401.10774, section 2.3.2).
        registers: read beside the tokens; what they learn one of the `extras` says. Not with sequential heads, nor with
            `z_BTD`.
        extras: what head 1's latent is trained for besides; not reported here.

    Parameters that need no gradient are run through and left alone; below the lowest that does no graph is made.
    """
    config, T = model.config, targets_BTn.shape[1]
    _check_width(model, tokens_BT, targets_BTn)
    attend, positions = _attention(T, documents_BT, registers, tokens_BT.device)
    rotary = model.rotary(positions, compute_dtype(model.trunk.embedding.weight))
    tokens_BT = appended(tokens_BT, registers)
    weights = weights or [1.0] * config.heads
    # In the dtype of the losses: a scale in float32 would leave seven digits of gradients in float64. A head without
    # valid targets has loss 0; dividing by at least 1 keeps it from becoming NaN.
    wide = torch.promote_types(compute_dtype(model.trunk.embedding.weight), torch.float32)
    scales = torch.as_tensor(weights, dtype=wide, device=tokens_BT.device) / counts_n.clamp_min(1)
    loss = loss or LossConfig()
    function = loss.function(budget)
    if loss.heads != "cross-entropy":
        targets_BTn = taught_targets(targets_BTn, config.offset_of_heads)
    seen: dict[int, Seen] = {}
    head_1: tuple[Tensor, Tensor] | None = None
    """What head 1's logits are made of, for the heads that learn from it."""

    def needed(parent: int) -> list[int]:
        """The heads on `parent` that have a weight, or carry one that has."""
        return [k for k in config.children(parent) if weights[k - 1] or needed(k)]

    def loss_of(k: int, x: Tensor, weight: Tensor) -> CrossEntropy:
        out = loss_of_row(k, x if registers is None else x[:, :T], weight)
        more = sum(extra(x, weight) for extra in extras) if k == 1 and extras else None
        return out if more is None else out._replace(loss=out.loss + more)

    def loss_of_row(k: int, x: Tensor, weight: Tensor) -> CrossEntropy:
        targets = targets_BTn[..., k - 1]
        if k == 1 and original is not None:
            return linear_distillation(x, weight, targets, *original, divergence="kl", budget=budget)
        if k > 1 and head_1 is not None and loss.heads != "cross-entropy":
            teacher, matrix = later(head_1[0][:, :T], config.offset_of_heads[k - 1]), head_1[1]
            return linear_distillation(
                x, weight, targets, teacher, matrix, divergence=loss.heads, share=loss.share, budget=budget
            )
        return function(x, weight, targets)

    def visit(k: int, parent: Tensor, wanted: bool) -> Tensor | None:
        """Differentiates head k and all that hangs on it; gives the gradient in its parent's latent (B, T, D), if that
        is wanted."""
        alias = parent.detach().requires_grad_(wanted)
        ahead = embeddings.of(k)
        latent = model.head(k)(alias, rotary, attend, **ahead)
        leaf = latent.detach().requires_grad_(latent.requires_grad)
        if weights[k - 1]:
            out: CrossEntropy = model.unembedding(leaf, k, using=lambda x, weight: loss_of(k, x, weight))
            if out.loss.requires_grad:
                (out.loss * scales[k - 1]).backward()
            seen[k] = out.total, out.correct
        gradient = _sum_gradients(leaf, (visit(child, leaf, leaf.requires_grad) for child in needed(k)))
        if gradient is not None:
            latent.backward(gradient)
        embeddings.add(k, ahead)
        return alias.grad

    if needed(0):
        if z_BTD is None:
            found = model.trunk(tokens_BT, rotary, lambda layer: attend, T if config.ahead else None)
            z_BTD, looked_up = found if config.ahead else (found, None)
        else:
            looked_up = model.trunk.embedding(tokens_BT) if config.ahead else None
        assert z_BTD is not None
        embeddings = _Ahead(looked_up, T)
        if loss.heads != "cross-entropy" and any(weights[1:]):
            head_1 = _made_of(model, z_BTD.detach(), rotary, attend)
        leaf = z_BTD.detach()
        # A frozen trunk, under heads that are trained alone, has no graph.
        gradient = _sum_gradients(leaf, (visit(k, leaf, z_BTD.requires_grad) for k in needed(0)))
        if z_BTD.requires_grad:
            pairs = [(z_BTD, gradient), *embeddings.gradients()]
            torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
    return _head_losses(seen, targets_BTn)


@torch.no_grad()
def _made_of(model: Transformer, z_BTD: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> tuple[Tensor, Tensor]:
    """What the logits of head 1 are the product of: its normed latent (B, T, D) and the matrix (V, D)."""
    for k in model.path(1):
        z_BTD = model.head(k)(z_BTD, rotary, attend)
    return cast(tuple[Tensor, Tensor], model.unembedding(z_BTD, using=lambda x, weight: (x, weight.detach())))


@torch.no_grad()
def made_of(model: Transformer, tokens_BT: Tensor, documents_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `_made_of`, from tokens (B, T): what `walk_step` takes as `original`."""
    attend: Attend = causal_attention if documents_BT is None else DocumentAttention(documents_BT)
    dtype = compute_dtype(model.trunk.embedding.weight)
    rotary = model.rotary(torch.arange(tokens_BT.shape[1], device=tokens_BT.device), dtype)
    return _made_of(model, model.trunk(tokens_BT, rotary, lambda layer: attend), rotary, attend)


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


def _attention(
    T: int, documents_BT: Tensor | None, registers: Registers | None, device: torch.device
) -> tuple[Attend, Tensor]:
    """What positions see, and the positions themselves, (T,), or with registers (B, T + R)."""
    attend: Attend = causal_attention if documents_BT is None else DocumentAttention(documents_BT)
    positions = torch.arange(T, device=device)
    if registers is None:
        return attend, positions
    attend = RegisterAttention(attend, T, registers.after, documents_BT)
    return attend, torch.cat([positions.expand(len(registers.after), -1), registers.positions], 1)


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
    wide = torch.float64 if any(total.dtype == torch.float64 for total, _ in seen.values()) else torch.float32
    losses = HeadLosses(counts.new_zeros(len(counts), dtype=wide), torch.zeros_like(counts), None)
    hits = torch.zeros_like(counts)
    for k, (total, correct) in seen.items():
        losses.sums[k - 1], losses.counts[k - 1] = total, counts[k - 1]
        if correct is not None:
            hits[k - 1], losses.correct = correct, hits
    return losses


def _sum_gradients(leaf: Tensor, others: Iterator[Tensor | None]) -> Tensor | None:
    """The gradient already in `leaf` plus `others`, added in fp32 at least: n heads meet here, bf16 rounds each sum.
    None where there is none, because `leaf` needs none."""
    total = None if leaf.grad is None else leaf.grad
    for gradient in others:
        if gradient is None:
            continue
        wide = gradient.float() if gradient.dtype in (torch.bfloat16, torch.float16) else gradient
        total = wide if total is None else total + wide
    return None if total is None else total.to(leaf.dtype)


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
    # Divides in float64 and on its own: a reference that shared the walk's scales would share their errors.
    means = [total.double() / max(1, count) for total, count in zip(losses, counts_n.tolist())]
    torch.stack([weight * mean for weight, mean in zip(weights, means)]).sum().backward()
    return _head_losses(seen, targets_BTn)


def _widened(documents_BT: Tensor | None, tokens_BT: Tensor) -> Tensor | None:
    """The documents of tokens that go on behind the rows: any will do there, for no row attends to them."""
    if documents_BT is None or documents_BT.shape == tokens_BT.shape:
        return documents_BT
    return torch.cat([documents_BT, documents_BT[:, -1:].expand(-1, tokens_BT.shape[1] - documents_BT.shape[1])], 1)


@torch.no_grad()
def score_step(
    model: Transformer,
    tokens_BT: Tensor,
    targets_BTn: Tensor,
    documents_BT: Tensor | None = None,
    *,
    registers: Registers | None = None,
    extras: Sequence[Extra] = (),
) -> list[Scores]:
    """Loss, top-1 hits and counts of every head, without gradients: entry k-1 is head k's. Arguments as of `walk_step`;
    the `extras` are asked, and keep what they saw."""
    ks, T = list(range(1, model.config.heads + 1)), targets_BTn.shape[1]
    _check_width(model, tokens_BT, targets_BTn)
    attention = None if registers is None else _attention(T, documents_BT, registers, tokens_BT.device)
    latents = model.latents(appended(tokens_BT, registers), ks, _widened(documents_BT, tokens_BT), attention)
    scores: list[Scores] = []

    def score(k: int, x: Tensor, weight: Tensor) -> None:
        scores.append(linear_scores(x[:, :T], weight, targets_BTn[..., k - 1]))
        for extra in extras if k == 1 else ():
            extra(x, weight.detach())  # or its gradient would be computed

    for k in ks:
        latent = latents[k] if registers is not None else latents[k][:, :T]
        model.unembedding(latent, k, using=partial(score, k))
    return scores
