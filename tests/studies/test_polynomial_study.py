"""Polynomial arithmetic: the ring against an independent implementation, the problems, the findings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from headstart.errors import UsageError
from studies.polynomial import STUDY, PolynomialSettings
from studies.polynomial_ring import Ring
from studies.study import Case, Result


def value_of(tokens: list[int], ring: Ring) -> list[int]:
    """An independent reading: numpy's polynomials over the integers, reduced in the end; a recursive-descent parser."""
    marks = {ring.mark(mark): mark for mark in "()-+*o"}
    at = 0

    def expression() -> np.polynomial.Polynomial:
        nonlocal at
        if marks.get(tokens[at]) != "(":
            at += ring.d
            return np.polynomial.Polynomial(np.array(tokens[at - ring.d : at], dtype=object))
        at += 1
        if marks.get(tokens[at]) == "-":
            at += 1
            value = -expression()
        else:
            left = expression()
            operator = marks[tokens[at]]
            at += 1
            right = expression()
            if operator == "o":
                value = np.polynomial.Polynomial(np.array([0], dtype=object))
                for power, coefficient in enumerate(left.coef):
                    value = value + coefficient * right**power
            else:
                value = left + right if operator == "+" else left * right
        assert marks[tokens[at]] == ")"
        at += 1
        reduced = [int(c) % ring.p for c in value.coef[: ring.d]]
        return np.polynomial.Polynomial(np.array(reduced + [0] * (ring.d - len(reduced)), dtype=object))

    found = expression()
    assert at == len(tokens)
    coefficients = [int(c) for c in found.coef]
    return coefficients + [0] * (ring.d - len(coefficients))


@pytest.mark.parametrize("ring", [Ring(7, 5), Ring(3, 2)])
def test_values_are_those_of_numpy(ring: Ring) -> None:
    rng = np.random.default_rng(0)
    for operations in (0, 1, 2, 5, 10):
        for _ in range(20):
            tokens, value = ring.problem(operations, rng)
            assert list(value) == value_of(tokens, ring)
            assert sum(tokens.count(ring.mark(mark)) for mark in "-+*o") == operations


def test_composition_is_of_representatives() -> None:
    ring, g = Ring(7, 5), (1, 1, 0, 0, 0)
    assert ring.compose((0, 1, 0, 0, 0), g) == g
    assert ring.compose((0, 0, 0, 0, 1), g) == (1, 4, 6, 4, 1)  # (1 + X)^4
    assert ring.compose((3, 0, 0, 0, 0), g) == (3, 0, 0, 0, 0)


def test_lengths_are_those_of_the_specification() -> None:
    ring, rng = Ring(7, 5), np.random.default_rng(1)
    for operations, mean, longest in ((1, 11.7, 13), (5, 38.7, 45), (10, 72.5, 85)):
        lengths = [len(ring.problem(operations, rng)[0]) for _ in range(1500)]
        assert abs(np.mean(lengths) - mean) < 0.04 * mean and max(lengths) == longest
        assert ring.longest(operations, 3) == 1 + longest + 3 + 1 + 5 + 1


def test_pauses_stand_before_the_equality_sign_in_training_and_in_tests() -> None:
    ring = Ring(7, 5)
    pause, equals, end = (ring.mark(mark) for mark in ("pause", "=", "end"))
    for document in ring.documents(50, 5, 5, seed=0):
        at = document.index(equals)
        assert document[at - 5 : at] == [pause] * 5 and pause not in document[: at - 5]
        assert len(document) == at + 1 + 5 + 1 and document[-1] == end
    questions, answers = ring.tests(50, 3, 10)
    assert all(q[0] == end and q[-11:] == [pause] * 10 + [equals] for q in questions)
    assert (questions, answers) == ring.tests(50, 3, 10) and len(set(map(tuple, questions))) == 50


def test_training_problems_have_all_numbers_of_operations() -> None:
    ring = Ring(7, 5)
    documents = ring.documents(500, 5, 0, seed=3)
    counts = [sum(d.count(ring.mark(mark)) for mark in "-+*o") for d in documents]
    assert {*counts} == {1, 2, 3, 4, 5} and min(map(counts.count, range(1, 6))) > 60


@pytest.mark.parametrize(
    "gain, wobble, base, verdict",
    [
        (0.2, 0.0, 0.5, "reproduced"),
        (0.2, 0.2, 0.5, "direction only"),
        (0.2, 0.45, 0.5, "null"),  # within two standard errors,
        (-0.2, 0.0, 0.5, "null"),
        (0.0, 0.0, 0.5, "null"),
        (0.2, 0.0, -0.2, "out of reach"),  # n = 2 guesses, n = 1 not even that
    ],
)
def test_findings(gain: float, wobble: float, base: float, verdict: str) -> None:
    settings = replace(STUDY.scales["gpu"], seeds=3, heads=(1, 2))
    results = made_up(settings, lambda n, seed: [base + (n == 2) * (gain - wobble * (seed == 11))] * 10)
    found = STUDY.findings(settings, results)
    assert found.verdict == verdict and len(found.rows) == 16
    assert ("In domain no model" in found.sentence) == (verdict == "out of reach")


def test_a_part_of_the_claim_is_not_the_whole() -> None:
    """Out of domain nobody learned anything, and one size with no pauses was run."""
    settings = replace(STUDY.scales["gpu"], seeds=3, heads=(1, 2))
    in_domain = lambda n, seed: [0.5 + 0.2 * (n == 2)] * 5 + [0.1] * 5  # noqa: E731
    found = STUDY.findings(settings, made_up(settings, in_domain))
    assert found.verdict == "direction only" and "Out of domain no model" in found.sentence
    assert "out of domain (10M" not in found.sentence
    settings = replace(settings, sizes=("10M",), pauses=(0,))
    found = STUDY.findings(settings, made_up(settings, lambda n, seed: [0.5 + 0.2 * (n == 2)] * 10))
    assert found.verdict == "direction only" and "larger than what was shown" in found.sentence


def heads_of(case: Case) -> int:
    return 1 if case.conditions["depth"] == "shallow" else int(case.conditions["n"])


def test_no_question_of_a_test_is_trained_on() -> None:
    ring = Ring(3, 3)
    asked = {tuple(question[1:]) for question in ring.tests(50, 1, 0)[0]}
    documents = ring.documents(3000, 1, 0, seed=0, unless=asked)
    assert len(documents) == 3000 and not asked & {tuple(each[:-4]) for each in documents}
    assert asked & {tuple(each[:-4]) for each in ring.documents(3000, 1, 0, seed=0)}
    small = Ring(2, 1)
    everything = {tuple(each[:-2]) for each in small.documents(1000, 1, 0, seed=0)}
    with pytest.raises(UsageError, match="hardly a problem that is not in the tests"):
        small.documents(10, 1, 0, seed=1, unless=everything)


def made_up(settings: PolynomialSettings, exact: Callable[[int, int], list[float]]) -> list[Result]:
    return [
        Result(case, {"exact": exact(heads_of(case), case.seed), "guessed": [0.1] * 10, "losses": [1.0]}, 1.0)
        for case in STUDY.cases(settings)
    ]
