"""Losses against head 1's own later distribution, and walks through models that are partly frozen."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.data.batches import IGNORE
from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.objective.backends import HeadLoss, LossConfig
from headstart.objective.distillation import Divergence, linear_distillation
from headstart.objective.inputs import LikelyTokens, StepInputs, Teacher, count_targets, mask_untaught
from headstart.objective.objective import Objective
from headstart.objective.walk import score_step, walk_step
from headstart.training.adapt.new_heads import freeze, new_parameters
from tests.models import random_model

V, D, T = 37, 16, 9
SHAPE = ModelConfig(vocab_size=V, dim=D, layers=4, attention_heads=2, context=32, heads=3)
KINDS = {
    "transformer": replace(SHAPE),
    "causal": replace(SHAPE, wiring="causal"),
    "medusa": replace(SHAPE, head_kind="medusa"),
    "sequential": replace(SHAPE, head_kind="sequential", wiring="causal"),
}
WEIGHTS = [1.0, 0.4, 0.7]


def distance_of(log_q: Tensor, p: Tensor, divergence: Divergence) -> Tensor:
    if divergence == "kl":
        return (torch.xlogy(p, p) - p * log_q).sum()
    acceptance = torch.minimum(p, log_q.exp()).sum(-1)
    return (1 - acceptance if divergence == "total-variation" else -acceptance.log()).sum()


def plain_loss(q: Tensor, p: Tensor, targets: Tensor, divergence: Divergence, share: float) -> Tensor:
    """The slow reference: logits (N, V) of head and teacher, autograd does the rest."""
    valid = targets != IGNORE
    log_q, p = q.log_softmax(-1)[valid], p.softmax(-1)[valid].detach()
    distance = distance_of(log_q, p, divergence)
    return share * distance + (1 - share) * F.nll_loss(log_q, targets[valid], reduction="sum")


def taught_targets(targets: Tensor) -> Tensor:
    return mask_untaught(StepInputs(targets[..., 0], targets), range(1, targets.shape[2] + 1)).targets


def batch(model: Transformer) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, V, (2, T + model.config.ahead), generator=generator)
    targets = torch.randint(0, V, (2, T, 3), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.3] = IGNORE
    return tokens, targets


def gradients(model: Transformer) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_equal(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys() and mine
    for name in mine:
        assert torch.allclose(mine[name], theirs[name], rtol=1e-10, atol=1e-13), name


@pytest.mark.parametrize("divergence", ["kl", "total-variation", "acceptance"])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_the_chunked_loss_is_the_plain_one(divergence: Divergence, share: float) -> None:
    generator = torch.Generator().manual_seed(2)
    x, teacher = (torch.randn(2, T, D, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    weight, matrix = (torch.randn(V, D, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    targets = torch.randint(0, V, (2, T), generator=generator)
    targets[0, 3:5] = IGNORE
    q, p = (x @ weight.T).flatten(0, 1), (teacher @ matrix.T).flatten(0, 1)
    expected = plain_loss(q, p, targets.flatten(), divergence, share)
    (3 * expected).backward()
    theirs = x.grad, weight.grad
    x.grad = weight.grad = None
    out = linear_distillation(
        x, weight, targets, Teacher(teacher, matrix), divergence=divergence, share=share, budget=1
    )
    (3 * out.loss).backward()
    assert torch.allclose(out.loss, expected, rtol=1e-12)
    assert torch.allclose(x.grad, theirs[0], rtol=1e-9, atol=1e-12)
    assert torch.allclose(weight.grad, theirs[1], rtol=1e-9, atol=1e-12)
    assert teacher.grad is None and matrix.grad is None
    valid = targets.flatten() != IGNORE
    assert torch.allclose(out.total, F.cross_entropy(q[valid], targets.flatten()[valid], reduction="sum"))
    assert int(out.correct) == int((q.argmax(-1) == targets.flatten())[valid].sum())


@pytest.mark.parametrize("divergence", ["kl", "total-variation", "acceptance"])
@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_the_loss_against_likely_tokens_is_that_against_a_distribution_of_them(
    divergence: Divergence, share: float, ignored: float
) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, T, D, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = Teacher(torch.randn(2, T, D, generator=generator, dtype=torch.float64), weight.detach().flip(0))
    targets = torch.randint(0, V, (2, T), generator=generator)
    targets[torch.rand(2, T, generator=generator) < ignored] = IGNORE
    logits = (teacher.x @ teacher.weight.T).flatten(0, 1)
    best = logits.topk(6).indices
    kept = torch.full_like(logits, -torch.inf).scatter(1, best, logits.gather(1, best))
    valid = targets.flatten() != IGNORE
    log_q, p = (x @ weight.T).flatten(0, 1).log_softmax(-1)[valid], kept.softmax(-1)[valid]
    cross_entropy = F.nll_loss(log_q, targets.flatten()[valid], reduction="sum")
    expected = share * distance_of(log_q, p, divergence) + (1 - share) * cross_entropy
    (3 * expected).backward()
    theirs = x.grad, weight.grad
    x.grad = weight.grad = None
    likely = LikelyTokens.of(teacher, 6)
    likely = LikelyTokens(likely.ids, likely.p.double())
    out = linear_distillation(x, weight, targets, likely, divergence=divergence, share=share, budget=1)
    (3 * out.loss).backward()
    assert torch.allclose(out.loss, expected, rtol=1e-5) and torch.allclose(out.total, cross_entropy)
    assert torch.allclose(x.grad, theirs[0], rtol=1e-5, atol=1e-6)  # the teacher's p is rounded to float32
    assert torch.allclose(weight.grad, theirs[1], rtol=1e-5, atol=1e-6)
    assert int(out.correct) == int((log_q.argmax(-1) == targets.flatten()[valid]).sum())


@pytest.mark.parametrize("loss", ["kl", "total-variation", "acceptance"])
def test_likely_tokens_teach_what_the_whole_distribution_teaches(loss: HeadLoss) -> None:
    """All tokens are likely ones here."""
    model = random_model(SHAPE, dtype=torch.float64)
    tokens, targets = batch(model)
    objective = Objective([0.0, 0.4, 0.7], LossConfig(heads=loss))
    inputs = objective.mask(StepInputs(tokens, targets), model)
    counts = count_targets(inputs.targets)
    walk_step(model, inputs, counts, objective)
    theirs = gradients(model)
    attend, positions = inputs.attention()
    z = model.latents(tokens, [])[0]
    teacher = Teacher.of_latents(model, z, model.rotary(positions, torch.float64), attend)
    p = (teacher.x @ teacher.weight.T).softmax(-1)
    likely = LikelyTokens(torch.arange(V).expand_as(p), p)
    walk_step(model, replace(inputs, likely=likely), counts, objective)
    assert_equal(gradients(model), theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divergence", ["kl", "total-variation", "acceptance"])
def test_heads_learn_from_head_1_further_on(kind: str, divergence: Divergence) -> None:
    """The walk against joint autograd over all logits; head 1 learns from another model."""
    model, teacher = (
        random_model(KINDS[kind], dtype=torch.float64),
        random_model(replace(KINDS[kind], heads=1, head_kind="transformer", wiring="parallel"), dtype=torch.float64),
    )
    tokens, targets = batch(model)
    targets = taught_targets(targets)
    counts = count_targets(targets)
    original = Teacher.of_tokens(teacher, StepInputs(tokens[:, :T], targets))
    latents = model.latents(tokens, [1, 2, 3])
    logits = torch.stack([model.unembedding(latents[k][:, :T], k) for k in (1, 2, 3)], dim=2)
    total = torch.zeros((), dtype=torch.float64)
    scales = [weight / count for weight, count in zip(WEIGHTS, counts.tolist())]
    for k in (1, 2, 3):
        for t in range(T - k + 1):
            p = logits[:, t + k - 1, 0] if k > 1 else original.x[:, t] @ original.weight.T
            kind_of_loss: Divergence = divergence if k > 1 else "kl"
            part = plain_loss(logits[:, t, k - 1], p, targets[:, t, k - 1], kind_of_loss, 0.6 if k > 1 else 1.0)
            total = total + scales[k - 1] * part
    total.backward()
    theirs = gradients(model)
    objective = Objective(WEIGHTS, LossConfig(heads=divergence, share=0.6), budget=1)
    walk_step(model, StepInputs(tokens, targets, teacher=original), counts, objective)
    assert_equal(gradients(model), theirs)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("kind", [*KINDS, "medusa-own", "replicated"])
@pytest.mark.parametrize("loss", ["cross-entropy", "kl", "total-variation", "acceptance"])
def test_heads_with_a_draft_vocabulary_learn_its_tokens(kind: str, loss: HeadLoss) -> None:
    """The walk against joint autograd over the logits of those tokens, position by position.

    Targets outside have no loss, and the teacher is restricted to the tokens and normalised.
    """
    shape = KINDS.get(kind) or replace(SHAPE, head_kind=kind.removesuffix("-own"), shared="-own" not in kind)
    model = random_model(replace(shape, draft_vocab=11), dtype=torch.float64)
    model.unembedding.d2t.copy_(d2t := torch.tensor([0, 2, 3, 5, 8, 13, 14, 21, 30, 34, 36]))
    tokens, targets = batch(model)
    targets[:, ::2] = torch.where(targets[:, ::2] == IGNORE, IGNORE, d2t[targets[:, ::2] % len(d2t)])
    objective = Objective(WEIGHTS, LossConfig(heads=loss, share=0.6), budget=1)
    inputs = objective.mask(StepInputs(tokens, targets), model)
    counts = count_targets(inputs.targets)
    latents = model.latents(tokens, [1, 2, 3])
    logits = torch.stack([model.unembedding(latents[k][:, :T], k) for k in (1, 2, 3)], dim=2)
    assert bool(logits[:, :, 1:].isinf().any())
    total, sums, counted, hits = torch.zeros((), dtype=torch.float64), [0.0] * 3, [0] * 3, [0] * 3
    share = 0.0 if loss == "cross-entropy" else 0.6
    for b, t, i in product(range(2), range(T), range(3)):
        target = int(targets[b, t, i])
        ids = d2t.tolist() if i else list(range(V))
        if target not in ids or (loss != "cross-entropy" and t + i >= T):
            continue
        counted[i] += 1
        log_q = logits[b, t, i, ids].log_softmax(-1)
        cross_entropy = -log_q[ids.index(target)]
        sums[i] += cross_entropy.item()
        hits[i] += ids[int(log_q.argmax())] == target
        if i == 0 or not share:
            total = total + WEIGHTS[i] / int(counts[i]) * cross_entropy
            continue
        p = logits[b, t + i, 0].detach().softmax(-1)[ids]
        p = p / p.sum()
        mixed = share * distance_of(log_q, p, loss) + (1 - share) * cross_entropy
        total = total + WEIGHTS[i] / int(counts[i]) * mixed
    assert counts.tolist() == counted and 0 < counted[1] < int((targets[..., 1] != IGNORE).sum())
    total.backward()
    theirs = gradients(model)
    seen = walk_step(model, inputs, counts, objective)
    assert_equal(gradients(model), theirs)
    assert torch.allclose(seen.sums, torch.tensor(sums, dtype=torch.float64)) and seen.correct.tolist() == hits
    if loss == "cross-entropy":  # scores are given token ids
        scores = score_step(model, StepInputs(tokens, targets))
        assert torch.allclose(torch.stack([score.loss for score in scores]), seen.sums)
        assert [int(score.count) for score in scores] == counted and [int(score.correct) for score in scores] == hits


def test_the_last_positions_have_no_teacher() -> None:
    taught = taught_targets(torch.zeros(1, T, 3, dtype=torch.int64))
    assert count_targets(taught).tolist() == [T, T - 1, T - 2]
    assert taught[0, -2:].tolist() == [[0, 0, IGNORE], [0, IGNORE, IGNORE]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", ["cross-entropy", "kl"])
def test_what_is_frozen_changes_no_gradient_of_the_rest(kind: str, heads: str) -> None:
    """And the trunk's output may come from elsewhere. No graph is made where nothing is trained."""
    model = random_model(KINDS[kind], dtype=torch.float64)
    tokens, targets = batch(model)
    targets = taught_targets(targets)
    counts, loss, weights = count_targets(targets), LossConfig(heads=heads), [0.0, 0.4, 0.7]  # type: ignore[arg-type]
    walk_step(model, StepInputs(tokens, targets), counts, Objective(weights, loss=loss))
    trained = new_parameters(model)
    theirs = {name: gradient for name, gradient in gradients(model).items() if name in trained}
    assert theirs.keys() == trained
    freeze(model)
    seen = walk_step(model, StepInputs(tokens, targets), counts, Objective(weights, loss=loss))
    assert_equal(gradients(model), theirs)
    z = model.latents(tokens[:, :T], [])[0] if not model.config.ahead else model.latents(tokens, [])[0][:, :T]
    again = walk_step(model, StepInputs(tokens, targets, z=z), counts, Objective(weights, loss=loss))
    assert_equal(gradients(model), theirs)
    assert torch.equal(seen.sums, again.sums)
    # Head 1 is scored where it has a weight, and is still left alone.
    walk_step(model, StepInputs(tokens, targets), counts, Objective([1.0, 0.4, 0.7], loss=loss))
    assert gradients(model).keys() == trained


def test_what_cannot_be_combined_is_refused() -> None:
    with pytest.raises(UsageError, match=r"loss\.heads 'entropy' is unknown"):
        LossConfig(heads="entropy")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"needs loss\.backend headstart"):
        LossConfig(heads="kl", backend="torch")
    with pytest.raises(UsageError, match=r"loss\.share is 0"):
        LossConfig(heads="kl", share=0)
