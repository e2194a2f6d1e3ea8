"""How much each head counts, and when."""

from __future__ import annotations

import pytest

from headstart.errors import UsageError
from headstart.objective.head_weights import HeadWeights


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
    ],
    ids=str,
)
def test_weights_that_do_not_fit_are_refused(weights: HeadWeights, word: str) -> None:
    with pytest.raises(UsageError) as caught:
        weights.check(2)
    assert word in str(caught.value) and "\n" not in str(caught.value)
