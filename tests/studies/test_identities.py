"""Sections 5 and 6 in numbers: information by hand, choice points by counting, and the findings on made-up results."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from studies import choice_points, mutual_information
from studies.mutual_information import (
    conditional_cross_entropy,
    cross_entropy,
    divergence,
    identity_errors,
    relative_information,
)
from studies.study import Result


def pair(seed: int, shape: tuple[int, int] = (3, 5)) -> tuple[np.ndarray, np.ndarray]:
    p, q = np.random.default_rng(seed).dirichlet(np.ones(shape[0] * shape[1]), size=2).reshape(2, *shape)
    return p, q


def test_information_of_coins() -> None:
    same, apart = np.diag([0.5, 0.5]), np.full((2, 2), 0.25)
    assert relative_information(same, same) == pytest.approx(math.log(2))
    assert relative_information(apart, apart) == pytest.approx(0, abs=1e-15)
    assert conditional_cross_entropy(same, same) == 0
    assert conditional_cross_entropy(apart, apart) == pytest.approx(math.log(2))
    assert cross_entropy(np.array([1.0, 0.0]), np.array([0.25, 0.75])) == pytest.approx(math.log(4))
    assert divergence(apart, apart) == 0


def test_relative_information_is_symmetric_and_may_be_negative() -> None:
    p, q = pair(0)
    assert relative_information(p, q) == pytest.approx(relative_information(p.T, q.T))
    independent = np.full((2, 2), 0.25)
    assert relative_information(independent, np.array([[0.45, 0.05], [0.05, 0.45]])) < -0.1


def test_the_identities_hold_and_their_check_would_notice() -> None:
    for seed in range(20):
        p, q = pair(seed)
        assert max(identity_errors(p, q).values()) < 1e-13
        h_X, h_Y = cross_entropy(p.sum(1), q.sum(1)), cross_entropy(p.sum(0), q.sum(0))
        assert relative_information(p, q) == pytest.approx(h_X + h_Y - cross_entropy(p, q))
    # The proof as printed has q_{Y|y} for q_{X|y}: conditioning the wrong way round is no identity.
    p, q = pair(1, (3, 3))
    wrong = cross_entropy(p.sum(1), q.sum(1)) - conditional_cross_entropy(p.T, q.T) - relative_information(p, q)
    assert abs(wrong) > 1e-2


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_choice_points_are_counted_n_times_n_plus_1_over_2(n: int) -> None:
    sequences = choice_points.sequences_of(3)
    assert len({*map(tuple, sequences)}) == 9
    losses = np.array([[choice_points._entropy(sequences, t, k) for k in range(1, n + 1)] for t in range(24)])
    terms = choice_points._terms(losses, 3)
    assert terms == {"with consequences": pytest.approx(n * (n + 1) / 2), "without": pytest.approx(n)}
    assert losses.sum() == pytest.approx(math.log(3) * (n * (n + 1) / 2 + n))  # nothing else is uncertain


def test_sigma_is_large_where_the_outcome_is_decided() -> None:
    sigmas = choice_points.sigmas(choice_points.sequences_of(4))
    assert sigmas["choice"] == pytest.approx(math.sqrt(0.25 * 0.75)) and sigmas["elsewhere"] == 0


@pytest.mark.parametrize(
    "off, seeds, verdict", [(0.01, 3, "reproduced"), (0.01, 1, "direction only"), (0.5, 3, "null")]
)
def test_findings_of_choice_points(off: float, seeds: int, verdict: str) -> None:
    study = choice_points.STUDY
    settings = replace(study.scales["cpu"], seeds=seeds, heads=(2,))
    results = []
    for case in study.cases(settings):
        exact = case.conditions["by"] == "enumeration"
        numbers: dict[str, Any] = {"sigmas": {"choice": 0.4, "elsewhere": 0.0}} if exact else {}
        factor = 1.0 if exact else 1 + off
        results.append(Result(case, numbers | {"with consequences": 3 * factor, "without": 2 * factor}, 1.0))
    assert study.findings(settings, results).verdict == verdict


@pytest.mark.parametrize("error, verdict", [(1e-14, "reproduced"), (1e-3, "null")])
def test_findings_of_mutual_information(error: float, verdict: str) -> None:
    study = mutual_information.STUDY
    settings = replace(study.scales["cpu"], seeds=3)
    results = [Result(case, {"errors": {"lemma": error}}, 1.0) for case in study.cases(settings)]
    found = study.findings(settings, results)
    assert found.verdict == verdict and ("hold" in found.sentence) == (verdict == "reproduced")
