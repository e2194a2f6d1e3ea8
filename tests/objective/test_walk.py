"""The walk's gradients are those of joint autograd, for every tree of heads."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from headstart.data.batches import IGNORE
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.objective.backends import LossConfig
from headstart.objective.inputs import StepInputs, count_targets
from headstart.objective.objective import Objective
from headstart.objective.walk import HeadLosses, score_step, walk_step
from tests.cases import pairwise
from tests.models import WIRINGS, every_wiring, random_model, with_heads_of
from tests.reference import joint_step

SMALL = ModelConfig(vocab_size=61, dim=16, layers=6, attention_heads=4, kv_heads=2, context=64, heads=4)
IN_UNEMBEDDING = ("replicated", "medusa", "medusa-own", "stern")
WEIGHTS = [1.0, 0.3, 0.0, 2.5]


shaped = partial(with_heads_of, SMALL)


def lively(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Transformer:
    return random_model(config, dtype=dtype)


def batch(model: Transformer, rows: int = 4, time: int = 11, n: int = 4) -> tuple[Tensor, Tensor]:
    """Tokens (B, T), more where heads read ahead, and targets (B, T, n), ragged: each row and head lacks others, the
    last row nearly all."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, SMALL.vocab_size, (rows, time + model.config.ahead), generator=generator)
    targets = torch.randint(0, SMALL.vocab_size, (rows, time, n), generator=generator)
    rate = torch.linspace(0.1, 0.9, rows)[:, None, None]
    targets[torch.rand(targets.shape, generator=generator) < rate] = IGNORE
    return tokens, targets


def gradients(model: Transformer) -> dict[str, Tensor]:
    """And forgets them."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_equal(mine: dict[str, Tensor], theirs: dict[str, Tensor], bound: float = 1e-12) -> None:
    """A parameter that the walk leaves alone has no gradient where the joint step has zeros."""
    assert mine.keys() <= theirs.keys()
    for name in theirs:
        difference = mine[name] - theirs[name] if name in mine else theirs[name]
        assert difference.norm() <= bound * theirs[name].norm(), name


def assert_losses_equal(mine: HeadLosses, theirs: HeadLosses) -> None:
    assert torch.equal(mine.counts, theirs.counts)
    assert mine.sums.dtype == torch.float64 and not mine.sums.requires_grad
    assert torch.allclose(mine.sums, theirs.sums, rtol=1e-13, atol=0)
    assert mine.correct is not None and theirs.correct is not None
    assert mine.correct.dtype == torch.int64 and torch.equal(mine.correct, theirs.correct)


@pairwise({
    "kind,wiring": WIRINGS,
    "tied": [False, True],
    "budget": [1, 4 * 61 * 17, 2**26],
    "weights": {"equal": None, "weighted": WEIGHTS},
})  # fmt: skip
def test_walk_equals_joint(kind: str, wiring: str, tied: bool, budget: int, weights: list[float] | None) -> None:
    model = lively(shaped(kind, wiring, tied=tied))
    tokens, targets = batch(model)
    counts = count_targets(targets)
    assert len(set(counts.tolist())) > 1
    expected = joint_step(model, StepInputs(tokens, targets), counts, Objective(weights))
    theirs = gradients(model)
    losses = walk_step(model, StepInputs(tokens, targets), counts, Objective(weights, budget=budget))
    mine = gradients(model)
    assert_equal(mine, theirs)
    assert_losses_equal(losses, expected)
    assert len(theirs) == len(list(model.parameters()))
    # What only head 3, of weight 0, reads.
    own = ("unembedding.weights.2", "unembedding.residuals.maps.1.", "unembedding.residuals.outputs.1.")
    skipped = (*own, *(["heads.2."] if wiring == "parallel" else [])) if weights else ("none",)
    assert mine.keys() == {name for name in theirs if not name.startswith(skipped)}


def by_hand(model: Transformer, tokens: Tensor, targets: Tensor, weights: list[float], z_loss: float) -> Tensor:
    """The loss without anything of `headstart.objective`: softmax, sums and divisions written out, in float64."""
    latents = model.latents(tokens, list(range(1, 5)))
    result = torch.zeros((), dtype=torch.float64)
    for k, weight in enumerate(weights, start=1):
        exponentials = model.unembedding(latents[k][:, : targets.shape[1]], k).exp()
        where = (targets[..., k - 1] != IGNORE).nonzero().tolist()
        for row, t in where:
            normaliser = exponentials[row, t].sum()
            loss = (normaliser / exponentials[row, t, targets[row, t, k - 1]]).log() + z_loss * normaliser.log() ** 2
            result = result + weight / len(where) * loss
    return result


@every_wiring
def test_in_float64_gradients_have_all_their_digits(kind: str, wiring: str) -> None:
    """Counts and weights whose quotients float32 does not hold."""
    model, weights = lively(shaped(kind, wiring, tied=True)), [1.0, 0.3, 0.7, 2.5]
    tokens, targets = batch(model, rows=2)
    by_hand(model, tokens, targets, weights, 0.03).backward()
    theirs = gradients(model)
    for step in (walk_step, joint_step):
        step(model, StepInputs(tokens, targets), count_targets(targets), Objective(weights, LossConfig(z_loss=0.03)))
        assert_equal(gradients(model), theirs, 2e-14)


@every_wiring
@pytest.mark.parametrize("tied", [False, True])
def test_z_loss_is_differentiated_and_not_reported(kind: str, wiring: str, tied: bool) -> None:
    model = lively(shaped(kind, wiring, tied=tied))
    tokens, targets = batch(model)
    counts = count_targets(targets)
    plain = joint_step(model, StepInputs(tokens, targets), counts, Objective(WEIGHTS))
    without = gradients(model)
    expected = joint_step(model, StepInputs(tokens, targets), counts, Objective(WEIGHTS, loss=LossConfig(z_loss=0.03)))
    theirs = gradients(model)
    losses = walk_step(
        model, StepInputs(tokens, targets), counts, Objective(WEIGHTS, loss=LossConfig(z_loss=0.03), budget=1)
    )
    assert_equal(gradients(model), theirs)
    assert_losses_equal(losses, expected)
    assert_losses_equal(losses, plain)
    name = "trunk.embedding.weight"
    assert (theirs[name] - without[name]).norm() > 1e-3 * theirs[name].norm()


RUN = {  # heads that run with weights 1 0 0 0, 0 0 1 0: those that have a weight, and those they hang on
    "parallel": ([1], [3]),
    "causal": ([1], [1, 2, 3]),
    "anticausal": ([1, 2, 3, 4], [3, 4]),
}


@every_wiring
@pytest.mark.parametrize("alone", [1, 3])
def test_heads_of_weight_zero_cost_nothing(kind: str, wiring: str, alone: int) -> None:
    model = lively(shaped(kind, wiring))
    tokens, targets = batch(model)
    ran: list[int] = []
    asked: list[int] = []
    # A shared module is that of head 2 and all after it; EAGLE's steps do not hang on head 1.
    repeated, before = model.config.kind.repeats_module, 2 if kind == "eagle3" and alone == 3 else 1
    for k, head in enumerate(model.heads, start=1):
        head.register_forward_hook(lambda *_, k=k: ran.append(len(ran) + before if repeated else k))
    model.unembedding.register_forward_pre_hook(lambda _, args: asked.append(args[1]))
    weights = [float(k == alone) for k in range(1, 5)]
    losses = walk_step(model, StepInputs(tokens, targets), count_targets(targets), Objective(weights))
    expected = RUN[wiring][alone == 3]
    assert sorted(ran) == (expected if kind != "eagle3" else expected[-2:]) and asked == [alone]
    others = [k for k in range(4) if k != alone - 1]
    assert losses.sums[others].tolist() == [0, 0, 0] and losses.sums[alone - 1] > 0
    assert losses.counts[others].tolist() == [0, 0, 0] and losses.counts[alone - 1] > 0
    touched = {int(name.split(".")[1]) + 1 for name in gradients(model) if name.startswith("heads.")}
    assert touched <= set(ran)


def test_without_any_weight_nothing_happens() -> None:
    model = lively(SMALL)
    tokens, targets = batch(model)
    losses = walk_step(model, StepInputs(tokens, targets), count_targets(targets), Objective([0.0] * 4))
    assert losses.sums.tolist() == [0] * 4 and gradients(model) == {}


@every_wiring
def test_walk_equals_joint_inside_documents(kind: str, wiring: str) -> None:
    model = lively(shaped(kind, wiring))
    tokens, targets = batch(model)
    documents = (torch.arange(11) // torch.tensor([[3], [4], [5], [11]])).long()
    counts = count_targets(targets)
    joint_step(model, StepInputs(tokens, targets, documents), counts)
    theirs = gradients(model)
    walk_step(model, StepInputs(tokens, targets, documents), counts)
    mine = gradients(model)
    assert_equal(mine, theirs)
    walk_step(model, StepInputs(tokens, targets), counts)
    name = "trunk.blocks.0.attention.qkv.weight"
    assert (gradients(model)[name] - mine[name]).norm() > 1e-3 * mine[name].norm()


@pytest.mark.parametrize("parents", [(0, 1, 1, 0), (2, 4, 2, 0), (0, 0, 2, 2), (3, 3, 0, 3)], ids=str)
def test_walk_equals_joint_on_trees_no_wiring_makes(parents: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelConfig, "parents", property(lambda self: parents))
    for kind in ("transformer", "linear"):
        model = lively(shaped(kind))
        tokens, targets = batch(model)
        counts = count_targets(targets)
        expected = joint_step(model, StepInputs(tokens, targets), counts, Objective(WEIGHTS))
        theirs = gradients(model)
        losses = walk_step(model, StepInputs(tokens, targets), counts, Objective(WEIGHTS, budget=1))
        assert_equal(gradients(model), theirs)
        assert_losses_equal(losses, expected)


@every_wiring
def test_walk_adds_to_gradients_that_are_there(kind: str, wiring: str) -> None:
    model = lively(shaped(kind, wiring, tied=True))
    tokens, targets = batch(model)
    counts = count_targets(targets)
    walk_step(model, StepInputs(tokens, targets), counts)
    once = {name: gradient.clone() for name, gradient in gradients(model).items()}
    for _ in range(2):
        walk_step(model, StepInputs(tokens, targets), counts)
    assert_equal(gradients(model), {name: 2 * gradient for name, gradient in once.items()})


@every_wiring
def test_accumulation_is_exact_with_global_counts(kind: str, wiring: str) -> None:
    """1 x 4 micro-batches equal 4 x 1, whatever each one holds; per-micro-batch counts would not."""
    model = lively(shaped(kind, wiring))
    tokens, targets = batch(model)
    targets[3, :, 1] = IGNORE  # a micro-batch without any target for head 2
    counts = count_targets(targets)
    whole = walk_step(model, StepInputs(tokens, targets), counts)
    at_once = gradients(model)
    pieces = [walk_step(model, StepInputs(t, y), counts) for t, y in zip(tokens.split(1), targets.split(1))]
    assert_equal(gradients(model), at_once)
    assert torch.allclose(sum(piece.sums for piece in pieces), whole.sums, rtol=1e-6)
    assert torch.equal(sum(piece.counts for piece in pieces), whole.counts)

    for t, y in zip(tokens.split(1), targets.split(1)):
        walk_step(model, StepInputs(t, y), count_targets(y) * 4)
    wrong = gradients(model)["trunk.embedding.weight"]
    right = at_once["trunk.embedding.weight"]
    assert (wrong - right).norm() > 0.1 * right.norm()


@every_wiring
def test_a_head_without_targets_is_silent(kind: str, wiring: str) -> None:
    model = lively(shaped(kind, wiring))
    tokens, targets = batch(model)
    targets[..., 2] = IGNORE
    counts = count_targets(targets)
    joint_step(model, StepInputs(tokens, targets), counts)
    theirs = gradients(model)
    losses = walk_step(model, StepInputs(tokens, targets), counts)
    mine = gradients(model)
    assert_equal(mine, theirs)
    assert losses.sums[2] == 0 and losses.counts[2] == 0
    walk_step(model, StepInputs(tokens, torch.full_like(targets, IGNORE)), torch.zeros_like(counts))
    assert all((gradient == 0).all() for gradient in gradients(model).values())


@every_wiring
def test_the_trunk_may_be_frozen(kind: str, wiring: str) -> None:
    """Heads added to an existing model are trained alone: the same gradients, and none below."""
    model = lively(shaped(kind, wiring))
    tokens, targets = batch(model)
    counts = count_targets(targets)
    walk_step(model, StepInputs(tokens, targets), counts)
    expected = gradients(model)
    model.trunk.requires_grad_(False)
    walk_step(model, StepInputs(tokens, targets), counts)
    mine = gradients(model)
    assert mine.keys() == {name for name in expected if not name.startswith("trunk.")}
    assert_equal(mine, {name: expected[name] for name in mine})


@pytest.mark.parametrize("wiring", ["parallel", "causal", "anticausal"])
def test_bf16_is_near(wiring: str) -> None:
    """Per parameter within 5 % of fp64 on the same bf16 weights; joint autograd in bf16 fares no better."""
    model = lively(replace(SMALL, wiring=wiring), torch.bfloat16)
    wide = lively(replace(SMALL, wiring=wiring))
    wide.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    tokens, targets = batch(model)
    counts = count_targets(targets)
    expected = joint_step(wide, StepInputs(tokens, targets), counts)
    losses = walk_step(model, StepInputs(tokens, targets), counts)
    assert torch.allclose(losses.sums.double(), expected.sums, rtol=1e-2)
    theirs, mine = gradients(wide), gradients(model)
    for name in theirs:
        assert (mine[name].double() - theirs[name]).norm() < 0.05 * theirs[name].norm(), name


def test_autocast_keeps_fp32_gradients() -> None:
    model = lively(SMALL, torch.float32)
    tokens, targets = batch(model)
    counts = count_targets(targets)
    walk_step(model, StepInputs(tokens, targets), counts)
    expected = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        walk_step(model, StepInputs(tokens, targets), counts)
    mine = gradients(model)
    for name in expected:
        assert mine[name].dtype == torch.float32
        assert (mine[name] - expected[name]).norm() < 0.05 * expected[name].norm(), name


@every_wiring
@torch.no_grad()
def test_scores_are_losses_and_hits(kind: str, wiring: str) -> None:
    model = lively(shaped(kind, wiring))
    tokens, targets = batch(model)
    logits = model(tokens, heads=4)[:, :11]
    # Let a known number of targets be right.
    targets[0, :5] = logits[0, :5].argmax(-1)
    scores = score_step(model, StepInputs(tokens, targets))
    with torch.enable_grad():
        losses = joint_step(model, StepInputs(tokens, targets), count_targets(targets))
    for k in range(1, 5):
        right = (logits[:, :, k - 1].argmax(-1) == targets[..., k - 1]).sum()
        assert scores[k - 1].correct == right >= 5
        assert scores[k - 1].count == losses.counts[k - 1]
        assert torch.allclose(scores[k - 1].loss, losses.sums[k - 1], rtol=1e-5)
    documents = (torch.arange(11) // 4).expand(4, -1)
    inside = score_step(model, StepInputs(tokens, targets, documents))
    with torch.enable_grad():
        losses = joint_step(model, StepInputs(tokens, targets, documents), count_targets(targets))
    assert all(torch.allclose(inside[k].loss, losses.sums[k], rtol=1e-5) for k in range(4))


def test_no_graph_is_left_behind() -> None:
    """Losses can neither be scaled nor differentiated by mistake."""
    model = lively(SMALL)
    tokens, targets = batch(model)
    losses = walk_step(model, StepInputs(tokens, targets), count_targets(targets))
    assert losses.sums.grad_fn is None and losses.counts.tolist() == count_targets(targets).tolist()
    with pytest.raises(RuntimeError):
        losses.sums.sum().backward()


@pytest.mark.parametrize("kind", ["sequential", "sequential-own"])
def test_ordinary_autograd_over_the_logits_of_sequential_heads(kind: str) -> None:
    """The logits that lack a token are NaN; a loss over the others has the walk's gradients."""
    model = lively(shaped(kind, "causal"))
    tokens, targets = batch(model)
    counts, T = count_targets(targets), targets.shape[1]
    walk_step(model, StepInputs(tokens, targets), counts)
    walked = gradients(model)
    logits = model(tokens, heads=4)
    for k in range(1, 5):
        losses = torch.nn.functional.cross_entropy(
            logits[:, :T, k - 1].flatten(0, 1), targets[..., k - 1].flatten(), ignore_index=IGNORE, reduction="sum"
        )
        (losses / counts[k - 1]).backward(retain_graph=k < 4)
    assert logits[:, -1, 1:].isnan().all()
    ours = gradients(model)
    assert ours and all(gradient.isfinite().all() for gradient in ours.values())
    assert_equal(walked, ours, 1e-6)
    model(tokens[:, :2], heads=4).nan_to_num().sum().backward()  # shorter than what heads read ahead
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
