"""The training step: one depth-first walk over the tree of heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from headstart.model.transformer import Transformer, compute_dtype
from headstart.objective.cross_entropy import CrossEntropy, Scores, linear_scores
from headstart.objective.distillation import linear_distillation
from headstart.objective.inputs import LikelyTokens, StepInputs, Teacher, count_targets, draft_targets
from headstart.objective.objective import AuxiliaryLoss, Objective


@dataclass
class HeadLosses:
    """The losses of a step, without a graph: nothing here can be scaled or differentiated by mistake.

    The entries of a head of weight 0 are 0.
    """

    sums: Tensor
    """(n,) fp32, fp64 of fp64 models: unweighted cross-entropy of each head, summed, in nats; without z-loss."""
    counts: Tensor
    """(n,) int64: valid targets of each head."""
    correct: Tensor | None
    """(n,) int64: how often no logit exceeds the target's; None if the loss backend does not count it."""

    @staticmethod
    def collect(seen: dict[int, tuple[Tensor, Tensor | None]], targets_BTn: Tensor) -> HeadLosses:
        """Gather the summed cross-entropy and the hits of the heads in `seen`."""
        counts = count_targets(targets_BTn)
        wide = torch.float64 if any(total.dtype == torch.float64 for total, _ in seen.values()) else torch.float32
        losses = HeadLosses(counts.new_zeros(len(counts), dtype=wide), torch.zeros_like(counts), None)
        hits = torch.zeros_like(counts)
        for k, (total, correct) in seen.items():
            losses.sums[k - 1], losses.counts[k - 1] = total, counts[k - 1]
            if correct is not None:
                hits[k - 1], losses.correct = correct, hits
        return losses


def walk_step(
    model: Transformer, inputs: StepInputs, counts_n: Tensor, objective: Objective | None = None
) -> HeadLosses:
    """Add to each parameter's gradient that of sum_k weights[k-1] / counts[k-1] * sum_t CE(head k at t, its target).

    This is the paper's memory-efficient forward and backward (section 2), for any tree of heads. The walk enters each
    head with a detached alias of its parent's latent, differentiates the head's own loss at once and frees its logits,
    visits the head's children, and then differentiates the head once, with the sum of their gradients. At any moment
    one head's chunk of logits exists, on the parallel tree one head's activations: O(V + d) instead of O(nV + d).
    Gradients equal those of joint autograd to rounding.

    Args:
        model: the model; parameters that need no gradient are left alone, and no graph is made below the lowest that
            needs one.
        inputs: the rows, with the targets that `Objective.mask` leaves, which matter if heads learn from head 1 or have
            a draft vocabulary.
        counts_n: (n,) valid targets of each head in the *whole* optimizer step: with accumulation or several processes
            the sum over all of them, so that 1 x 4 micro-batches equal 4 x 1 whatever they hold.
        objective: weights and losses (None: cross-entropy, all weights 1).

    A head of weight 0 that does not run leaves its parameters with the gradients they have.
    """
    inputs.check(model)
    return _Walk(model, inputs, counts_n, objective or Objective()).run()


class _Walk:
    """One walk: the state that all visits read, and the losses they report."""

    def __init__(self, model: Transformer, inputs: StepInputs, counts_n: Tensor, objective: Objective) -> None:
        self.model, self.inputs, self.objective = model, inputs, objective
        self.weights = objective.weights_of(model.config.heads)
        dtype = compute_dtype(model.trunk.embedding.weight)
        self.rows = inputs.rows(model, detached=True)
        # The scales have the dtype of the losses: in float32 they would leave seven digits of float64 gradients.
        # Dividing by at least 1 keeps the loss of a head without targets at 0.
        wide = torch.promote_types(dtype, torch.float32)
        self.scales = torch.as_tensor(self.weights, dtype=wide, device=inputs.tokens.device) / counts_n.clamp_min(1)
        self.cross_entropy = objective.loss.function(objective.budget)
        self.seen: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.ahead = _Ahead(None, 0)
        self.teacher: Teacher | LikelyTokens | None = inputs.likely if self.objective.distills else None

    def run(self) -> HeadLosses:
        """Run the trunk, visit the heads on it, and differentiate the trunk once."""
        if self.needed(0):
            z_BTD, embeddings = self.run_trunk()
            self.ahead = _Ahead(embeddings, self.inputs.length)
            if self.objective.distills and any(self.weights[1:]) and self.teacher is None:
                teacher = Teacher.of_latents(self.model, z_BTD.detach(), self.rows.rotary, self.rows.attend)
                self.teacher = teacher.among(self.model.unembedding.d2t)
            leaf = z_BTD.detach()
            # A frozen trunk, under heads that are trained alone, has no graph.
            gradient = _sum_gradients(leaf, (self.visit(k, leaf, z_BTD.requires_grad) for k in self.needed(0)))
            if z_BTD.requires_grad:
                outputs, gradients = zip((z_BTD, gradient), *self.ahead.gradients())
                torch.autograd.backward(outputs, gradients)
        return HeadLosses.collect(self.seen, self.inputs.targets)

    def needed(self, parent: int) -> list[int]:
        """Return the heads on `parent` that have a weight, or carry a head that has one."""
        return [k for k in self.model.config.children(parent) if self.weights[k - 1] or self.needed(k)]

    def run_trunk(self) -> tuple[Tensor, Tensor | None]:
        """Return the trunk's output, and for sequential heads the embeddings of all tokens."""
        model, inputs, reads_ahead = self.model, self.inputs, self.model.config.ahead > 0
        if inputs.z is not None:
            return inputs.z, model.trunk.embedding(inputs.tokens) if reads_ahead else None
        output = model.trunk(
            inputs.read, self.rows.rotary, lambda layer: self.rows.attend, inputs.length if reads_ahead else None
        )
        return output if reads_ahead else (output, None)

    def visit(self, k: int, parent: Tensor, differentiate: bool) -> Tensor | None:
        """Differentiate head k and all that hangs on it.

        Return the gradient in the latent of its parent, (B, T, D), if `differentiate`.
        """
        alias = parent.detach().requires_grad_(differentiate)
        ahead = self.ahead.alias(k)
        latent = self.rows.run(k, alias, ahead)
        leaf = latent.detach().requires_grad_(latent.requires_grad)
        if self.weights[k - 1]:
            out: CrossEntropy = self.model.unembedding(leaf, k, using=partial(self.loss, k))
            if out.loss.requires_grad:
                (out.loss * self.scales[k - 1]).backward()
            self.seen[k] = out.total, out.correct
        gradient = _sum_gradients(leaf, (self.visit(child, leaf, leaf.requires_grad) for child in self.needed(k)))
        if gradient is not None:
            outputs, gradients = zip((latent, gradient), *self.rows.gradients(k))
            torch.autograd.backward(outputs, gradients)
        self.ahead.add(k, ahead)
        return alias.grad

    def loss(self, k: int, x: Tensor, weight_VD: Tensor) -> CrossEntropy:
        """Return the loss of head k, given its normed latent; head 1's with the auxiliary losses."""
        out = self.head_loss(k, x if self.inputs.registers is None else x[:, : self.inputs.length], weight_VD)
        if k > 1 or not self.objective.auxiliaries:
            return out
        return out._replace(loss=out.loss + sum(each(self.inputs, x, weight_VD) for each in self.objective.auxiliaries))

    def head_loss(self, k: int, x_BTD: Tensor, weight_VD: Tensor) -> CrossEntropy:
        """Return the loss of head k over its targets."""
        targets, loss, budget = self.inputs.targets[..., k - 1], self.objective.loss, self.objective.budget
        if k == 1 and self.inputs.teacher is not None:
            original = self.inputs.teacher
            return linear_distillation(x_BTD, weight_VD, targets, original, divergence="kl", budget=budget)
        if k == 1 or self.teacher is None or loss.heads == "cross-entropy":
            return self.cross_entropy(x_BTD, weight_VD, targets)
        teacher = self.teacher.ahead(self.model.config.offset_of_heads[k - 1], self.inputs.length)
        return linear_distillation(
            x_BTD, weight_VD, targets, teacher, divergence=loss.heads, share=loss.share, budget=budget
        )


class _Ahead:
    """The embeddings of the tokens behind each position, which sequential heads read, and their summed gradients."""

    def __init__(self, embeddings_BTD: Tensor | None, length: int) -> None:
        self._all, self._length = embeddings_BTD, length
        self._sum: Tensor | None = None

    def alias(self, k: int) -> Tensor | None:
        """Return a detached alias of the embeddings that head k reads; None if it reads none."""
        if self._all is None or k == 1:
            return None
        alias = self._all[:, k - 1 : k - 1 + self._length].detach()
        return alias.requires_grad_(self._all.requires_grad)

    def add(self, k: int, alias: Tensor | None) -> None:
        """Add the gradient of head k's alias, in fp32 at least."""
        if alias is None or alias.grad is None:
            return
        assert self._all is not None
        if self._sum is None:
            self._sum = alias.grad.new_zeros(
                self._all.shape, dtype=torch.promote_types(alias.grad.dtype, torch.float32)
            )
        self._sum[:, k - 1 : k - 1 + self._length] += alias.grad

    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Return the embeddings with the sum of their gradients, if there is one."""
        return [] if self._all is None or self._sum is None else [(self._all, self._sum.to(self._all.dtype))]


def _sum_gradients(leaf: Tensor, others: Iterator[Tensor | None]) -> Tensor | None:
    """Return the gradient in `leaf` plus `others`, or None if `leaf` needs none.

    The sum is in fp32 at least: n heads meet here, and bf16 would round each addition.
    """
    total = None if leaf.grad is None else leaf.grad
    for gradient in others:
        if gradient is None:
            continue
        wide = gradient.float() if gradient.dtype in (torch.bfloat16, torch.float16) else gradient
        total = wide if total is None else total + wide
    return None if total is None else total.to(leaf.dtype)


@torch.no_grad()
def score_step(
    model: Transformer, inputs: StepInputs, auxiliaries: tuple[AuxiliaryLoss, ...] = (), first: int = 1
) -> list[Scores]:
    """Return loss, top-1 hits and counts of the heads from head `first` on, without gradients, in order.

    The targets are token ids; those outside a head's draft vocabulary count for nothing. The `auxiliaries` are computed
    too; their values are theirs to keep.
    """
    inputs.check(model)
    inputs = draft_targets(inputs, model.unembedding.d2t)
    ks, scores, T = range(first, model.config.heads + 1), list[Scores](), inputs.length
    latents = inputs.latents(model, ks)

    def score(k: int, x: Tensor, weight_VD: Tensor) -> None:
        scores.append(linear_scores(x[:, :T], weight_VD, inputs.targets[..., k - 1]))
        for auxiliary in auxiliaries if k == 1 else ():
            auxiliary(inputs, x, weight_VD.detach())  # a weight that needs gradients would have them computed

    for k in ks:
        latent = latents[k] if inputs.registers is not None else latents[k][:, :T]
        model.unembedding(latent, k, using=partial(score, k))
    return scores
