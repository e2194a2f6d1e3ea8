"""The chunked cross-entropy against torch's, in value, in both gradients, and at its edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.data.batches import IGNORE
from headstart.objective.cross_entropy import chunk_rows, linear_cross_entropy, linear_scores

V, D = 37, 12
BUDGETS = [1, 4 * V * 16, 4 * V * 21, 2**20]


def problem(dtype: torch.dtype, rows: int = 60, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, rows // 3, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (3, rows // 3), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < ignored] = IGNORE
    return x, weight, targets


def reference(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("ignored", [0.0, 0.3, 0.95])
def test_value_and_gradients_are_those_of_torch(budget: int, ignored: float) -> None:
    x, weight, targets = problem(torch.float64, ignored=ignored)
    expected = reference(x, weight, targets)
    dx, dweight = torch.autograd.grad(expected, (x, weight))
    loss = linear_cross_entropy(x, weight, targets, budget=budget).loss
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert relative(loss, expected) < 1e-14
    mine = torch.autograd.grad(loss, (x, weight))
    assert relative(mine[0], dx) < 1e-13 and relative(mine[1], dweight) < 1e-13
    assert (mine[0][targets == IGNORE] == 0).all()


def test_gradients_are_those_of_finite_differences() -> None:
    x, weight, targets = problem(torch.float64)
    mine = torch.autograd.grad(linear_cross_entropy(x, weight, targets, budget=1).loss, (x, weight))
    generator = torch.Generator().manual_seed(5)
    for variable, gradient in ((x, mine[0]), (weight, mine[1])):
        direction = torch.randn(variable.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            variable += 1e-5 * direction
            above = linear_cross_entropy(x, weight, targets).loss
            variable -= 2e-5 * direction
            below = linear_cross_entropy(x, weight, targets).loss
            variable += 1e-5 * direction
        slope = (above - below) / 2e-5
        assert abs(slope - (gradient * direction).sum()) < 1e-7 * abs(slope)


@pytest.mark.parametrize("budget", BUDGETS)
def test_bf16_is_as_good_as_its_inputs(budget: int) -> None:
    """Against fp64 on the same bf16 inputs: the loss to 1e-3, gradients to 1e-2 (bf16 rounds to 4e-3), however many
    chunks. The loss itself is fp32."""
    x, weight, targets = problem(torch.bfloat16, rows=600)
    wide_x, wide_weight = (v.detach().double().requires_grad_() for v in (x, weight))
    expected = reference(wide_x, wide_weight, targets)
    expected_gradients = torch.autograd.grad(expected, (wide_x, wide_weight))
    loss = linear_cross_entropy(x, weight, targets, budget=budget).loss
    assert loss.dtype == torch.float32
    assert relative(loss, expected) < 1e-3
    for mine, right in zip(torch.autograd.grad(loss, (x, weight)), expected_gradients):
        assert mine.dtype == torch.bfloat16
        assert relative(mine, right) < 1e-2


def test_the_weight_gradient_does_not_decay_with_the_number_of_chunks() -> None:
    """Summed in bf16, 375 chunks would lose the small terms; summed in fp32, they cost nothing over one chunk."""
    x, weight, targets = problem(torch.bfloat16, rows=6000)
    wide_x, wide_weight = (v.detach().double().requires_grad_() for v in (x, weight))
    (right,) = torch.autograd.grad(reference(wide_x, wide_weight, targets), wide_weight)
    one, many = (
        relative(torch.autograd.grad(linear_cross_entropy(x, weight, targets, budget=budget).loss, weight)[0], right)
        for budget in (2**26, 1)
    )
    assert many < 1.2 * one, (many, one)


def test_autocast_sets_the_products_and_keeps_the_rest() -> None:
    x, weight, targets = problem(torch.float32, rows=600)
    expected = torch.autograd.grad(linear_cross_entropy(x, weight, targets).loss, (x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets, budget=1).loss
    mine = torch.autograd.grad(loss, (x, weight))
    assert loss.dtype == mine[0].dtype == mine[1].dtype == torch.float32
    for a, b in zip(mine, expected):
        assert 0 < relative(a, b) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scaling_the_loss_scales_the_gradients(dtype: torch.dtype) -> None:
    """A bridge that hands out stored gradients would ignore it, and train with gradients four times too large."""
    x, weight, targets = problem(dtype)
    whole = torch.autograd.grad(linear_cross_entropy(x, weight, targets).loss, (x, weight))
    quarter = torch.autograd.grad(linear_cross_entropy(x, weight, targets).loss * 0.25, (x, weight))
    assert all(torch.equal(a, b * 0.25) for a, b in zip(quarter, whole))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", BUDGETS)
def test_nothing_to_predict_is_exactly_nothing(dtype: torch.dtype, budget: int) -> None:
    x, weight, targets = problem(dtype, ignored=1.1)
    assert (targets == IGNORE).all()
    loss = linear_cross_entropy(x, weight, targets, budget=budget).loss
    assert loss.item() == 0.0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (x, weight)))


def test_huge_logits_do_not_overflow() -> None:
    x, weight, targets = problem(torch.float32)
    with torch.no_grad():
        x.mul_(1e4)
    loss = linear_cross_entropy(x, weight, targets).loss
    gradients = torch.autograd.grad(loss, (x, weight))
    assert relative(loss, reference(x, weight, targets)) < 1e-6
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_gradients_only_where_they_are_wanted(frozen: str) -> None:
    x, weight, targets = problem(torch.float64)
    expected = dict(zip(("x", "weight"), torch.autograd.grad(reference(x, weight, targets), (x, weight))))
    (x if frozen == "x" else weight).requires_grad_(False)
    linear_cross_entropy(x, weight, targets, budget=1).loss.backward()
    for name, variable in (("x", x), ("weight", weight)):
        if name == frozen:
            assert variable.grad is None
        else:
            assert relative(variable.grad, expected[name]) < 1e-13


def test_chunks_follow_the_budget_and_never_get_thin() -> None:
    assert chunk_rows(256, 2**20) == 1024
    assert chunk_rows(128_000, 64 * 2**20) == 131
    assert chunk_rows(10**6, 1) == 16


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_hits_are_counted_with_ties(budget: int, dtype: torch.dtype) -> None:
    x, weight, targets = problem(dtype)
    with torch.no_grad():
        weight[5] = weight[9]  # the same logit, whatever x
        logits = x @ weight.T
        targets[0, :7] = logits[0, :7].argmax(-1)
        x[1, 0] = 100 * weight[9]
        targets[1, 0] = 9
    out = linear_cross_entropy(x, weight, targets, budget=budget)
    logits = (x @ weight.T).detach()
    best = logits.gather(-1, targets.clamp_min(0)[..., None])[..., 0] == logits.amax(-1)
    assert out.correct is not None and out.correct.dtype == torch.int64
    assert out.correct == (best & (targets != IGNORE)).sum() >= 8
    assert logits[1, 0].argmax() == 5  # an argmax would have missed this one
    nothing = linear_cross_entropy(x, weight, torch.full_like(targets, IGNORE), budget=budget)
    assert nothing.correct == 0


@pytest.mark.parametrize("budget", BUDGETS)
def test_z_loss_is_torchs_in_value_and_gradient(budget: int) -> None:
    x, weight, targets = problem(torch.float64)
    plain = reference(x, weight, targets)
    squares = ((x @ weight.T).logsumexp(-1)[targets != IGNORE] ** 2).sum()
    expected = torch.autograd.grad(plain + 0.1 * squares, (x, weight))
    out = linear_cross_entropy(x, weight, targets, z_loss=0.1, budget=budget)
    assert relative(out.loss, plain + 0.1 * squares) < 1e-14
    assert relative(out.total, plain) < 1e-14 and not out.total.requires_grad
    mine = torch.autograd.grad(out.loss, (x, weight))
    assert relative(mine[0], expected[0]) < 1e-13 and relative(mine[1], expected[1]) < 1e-13
    nothing = linear_cross_entropy(x, weight, torch.full_like(targets, IGNORE), z_loss=0.1, budget=budget)
    assert nothing.loss == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(nothing.loss, (x, weight)))


@pytest.mark.parametrize("budget", BUDGETS)
def test_scores(budget: int) -> None:
    x, weight, targets = problem(torch.float32)
    targets[0, :7] = (x[0, :7] @ weight.T).argmax(-1)
    scores = linear_scores(x, weight, targets, budget=budget)
    assert relative(scores.loss, reference(x, weight, targets)) < 1e-6
    right = ((x @ weight.T).argmax(-1) == targets) & (targets != IGNORE)
    assert scores.correct.item() == right.sum().item() >= 7
    assert scores.count.item() == (targets != IGNORE).sum().item()
    nothing = linear_scores(x, weight, torch.full_like(targets, IGNORE), budget=budget)
    assert (nothing.loss.item(), nothing.correct.item(), nothing.count.item()) == (0.0, 0, 0)
