"""pass@k against counting every choice of k samples."""

from __future__ import annotations

import itertools

import pytest

from headstart.errors import UsageError
from headstart.evaluation.code.pass_at_k import estimate, oracle, pass_at_k


def test_it_is_the_share_of_choices_with_a_right_one() -> None:
    for samples, right, k in [(5, 0, 2), (5, 1, 2), (6, 3, 3), (4, 4, 1), (7, 2, 6), (3, 1, 3)]:
        outcomes = [i < right for i in range(samples)]
        choices = list(itertools.combinations(outcomes, k))
        assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)
    with pytest.raises(UsageError, match="pass@10 needs at least 10 samples of each problem, not 9"):
        pass_at_k(9, 3, 10)


def test_intervals_hold_the_mean_and_narrow_with_problems() -> None:
    few, many = estimate([(10, 10), (10, 0)] * 5, 1), estimate([(10, 10), (10, 0)] * 500, 1)
    assert few.value == many.value == 0.5
    assert few.low < many.low < 0.5 < many.high < few.high
    assert many.high - many.low == pytest.approx(2 * 1.645 * 0.5 / 1000**0.5, rel=0.15)
    assert estimate([(4, 4)] * 3, 2) == estimate([(4, 4)] * 3, 2) and estimate([(4, 4)] * 3, 2).low == 1.0


def test_the_oracle_takes_the_best_temperature_for_each_k() -> None:
    sure = [(10, 10), (10, 0), (10, 0)]  # one problem always right
    varied = [(10, 3), (10, 3), (10, 3)]  # each right now and then
    by_temperature = {0.8: varied, 0.1: sure}
    assert oracle(by_temperature, 1)[0] == 0.1 and oracle(by_temperature, 10)[0] == 0.8
    assert oracle(by_temperature, 10)[1].value == 1.0
    assert oracle({0.4: sure, 0.2: sure}, 1)[0] == 0.2
