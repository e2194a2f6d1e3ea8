"""Weights of the heads over training."""

from __future__ import annotations

import pytest

from headstart.errors import UsageError
from headstart.objective.head_weights import HeadWeights, draw_head


def test_the_paper_weighs_every_head_alike() -> None:
    for fraction in (0.0, 0.5, 1.0):
        assert HeadWeights().at(fraction, 4) == [1.0] * 4
    HeadWeights().check(4)


def test_constant_weights() -> None:
    weights = HeadWeights(initial=(1.0, 0.5))
    assert weights.at(0.0, 2) == weights.at(0.7, 2) == [1.0, 0.5]


@pytest.mark.parametrize(
    ("shape", "fraction", "expected"),
    [
        ("linear", 0.0, [1.0, 1.0]),
        ("linear", 0.2, [1.0, 1.0]),
        ("linear", 0.35, [1.0, 0.75]),
        ("linear", 0.5, [1.0, 0.5]),
        ("linear", 0.8, [1.0, 0.0]),
        ("linear", 1.0, [1.0, 0.0]),
        ("cosine", 0.2, [1.0, 1.0]),
        ("cosine", 0.35, [1.0, 0.8535533905932737]),
        ("cosine", 0.5, [1.0, 0.5]),
        ("cosine", 0.8, [1.0, 0.0]),
        ("sine", 0.2, [1.0, 1.0]),
        ("sine", 0.4, [1.0, 0.5]),
        ("sine", 0.8, [1.0, 0.0]),
    ],
)
def test_weights_move_between_begin_and_end(shape: str, fraction: float, expected: list[float]) -> None:
    weights = HeadWeights(initial=(1.0, 1.0), final=(1.0, 0.0), begin=0.2, end=0.8, shape=shape)
    weights.check(2)
    assert weights.at(fraction, 2) == pytest.approx(expected)


def test_final_alone_starts_from_one() -> None:
    assert HeadWeights(final=(1.0, 0.0)).at(0.25, 2) == [1.0, 0.75]


def test_a_jump() -> None:
    weights = HeadWeights(final=(1.0, 0.0), begin=0.5, end=0.5)
    weights.check(2)
    assert weights.at(0.49, 2) == [1.0, 1.0]
    assert weights.at(0.5, 2) == [1.0, 0.0]


def test_decay_is_a_factor_from_head_to_head() -> None:
    assert HeadWeights(decay=0.5).at(0.3, 4) == [1.0, 0.5, 0.25, 0.125]
    medusa = HeadWeights(initial=(1, 0, 0), final=(1, 0.1, 0.1), decay=0.8, shape="sine")
    medusa.check(3)
    assert medusa.at(0.0, 3) == [1.0, 0.0, 0.0]
    assert medusa.at(1 / 3, 3) == pytest.approx([1.0, 0.04, 0.032])
    assert medusa.at(1.0, 3) == pytest.approx([1.0, 0.08, 0.064])


@pytest.mark.parametrize("steps", [4, 20, 400])
def test_curricula_have_one_equal_stage_for_each_number_of_heads(steps: int) -> None:
    forward, reverse = HeadWeights(curriculum="forward"), HeadWeights(curriculum="reverse")
    stage = steps // 4
    for step in range(steps):
        active = step // stage + 1
        assert forward.at(step / steps, 4) == [1.0] * active + [0.0] * (4 - active)
        active = 4 - step // stage
        assert reverse.at(step / steps, 4) == [1.0] * active + [0.0] * (4 - active)
    assert forward.at(1.0, 4) == [1.0] * 4 and reverse.at(1.0, 4) == [1.0, 0.0, 0.0, 0.0]


def test_a_curriculum_keeps_to_its_part_of_training_and_to_the_weights() -> None:
    weights = HeadWeights(initial=(1, 0.5), curriculum="forward", begin=0.2, end=0.6)
    weights.check(2)
    seen = [weights.at(fraction, 2) for fraction in (0.0, 0.3, 0.41, 0.6, 1.0)]
    assert seen == [[1, 0], [1, 0], [1, 0.5], [1, 0.5], [1, 0.5]]


@pytest.mark.parametrize("curriculum", ["forward", "reverse"])
def test_one_head_has_no_curriculum(curriculum) -> None:
    with pytest.raises(UsageError, match=f"^head_weights.curriculum {curriculum} needs 2 heads or more; this model"):
        HeadWeights(curriculum=curriculum).check(1)


@pytest.mark.parametrize(
    ("weights", "word"),
    [
        (HeadWeights(initial=(1.0,)), "head_weights.initial"),
        (HeadWeights(final=(1.0, 1.0, 1.0)), "head_weights.final"),
        (HeadWeights(initial=(1.0, -0.1)), "head_weights.initial"),
        (HeadWeights(initial=(1.0, float("nan"))), "head_weights.initial"),
        (HeadWeights(final=(1.0, float("inf"))), "head_weights.final"),
        (HeadWeights(begin=0.6, end=0.5), "head_weights.begin"),
        (HeadWeights(begin=-0.1), "head_weights.begin"),
        (HeadWeights(end=1.1), "head_weights.end"),
        (HeadWeights(begin=float("nan")), "head_weights.begin"),
        (HeadWeights(shape="step"), "head_weights.shape"),
        (HeadWeights(decay=0.0), "head_weights.decay"),
        (HeadWeights(decay=-1.0), "head_weights.decay"),
        (HeadWeights(decay=float("nan")), "head_weights.decay"),
        (HeadWeights(curriculum="backward"), "head_weights.curriculum"),
        (HeadWeights(initial=(0.0, 0.0)), "head_weights.initial"),
        (HeadWeights(final=(0.0, 0.0)), "head_weights.final"),
        (HeadWeights(initial=(0.0, 1.0), curriculum="forward"), "head_weights.initial"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_are_refused(weights: HeadWeights, word: str) -> None:
    with pytest.raises(UsageError) as caught:
        weights.check(2)
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_one_head_is_drawn_for_a_step_and_stands_for_all() -> None:
    weights = [1.0, 0.5, 0.0, 2.0]
    steps = [draw_head(weights, seed=3, step=step) for step in range(3000)]
    assert all(sum(weight != 0 for weight in step) == 1 and step[2] == 0 for step in steps)
    for k, weight in enumerate(weights):
        assert sum(step[k] for step in steps) / len(steps) == pytest.approx(weight, rel=0.06)
    # By seed and step alone: processes and resumed runs agree, other seeds do not.
    assert steps[7:12] == [draw_head(weights, 3, step) for step in range(7, 12)]
    assert steps[:20] != [draw_head(weights, 4, step) for step in range(20)]
    assert draw_head([0.0, 0.7], 0, 5) == [0.0, 0.7]


def test_the_weights_of_papers() -> None:
    assert HeadWeights(decay=0.8).at(0.5, 4) == pytest.approx([1, 0.8, 0.64, 0.512])  # Medusa: 0.8^k of its head k
    fast = HeadWeights(initial=(1, 0.51, 0.31, 0.18)).at(0.5, 4)
    assert fast[1:] == pytest.approx([0.6**k / (1 + 0.6 + 0.36) for k in range(3)], abs=0.005)
