"""Accuracies of heads -> expected tokens of a pass."""

from __future__ import annotations

import math

import pytest

from headstart.training.metrics import expected_tokens_per_pass


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([0.6], 1.0),
        ([0.1, 1.0, 1.0, 1.0], 4.0),  # head 1 verifies; its own accuracy drafts nothing
        ([1.0, 0.0, 1.0], 1.0),
        ([0.9, 0.5, 0.5, 0.2], 1 + 0.5 + 0.25 + 0.05),
        ([0.9, 0.5, math.nan, 1.0], 1.5),  # no draft passes a head that was not counted
        ([0.9, math.nan], 1.0),
    ],
)
def test_expected_tokens(accuracies: list[float], expected: float) -> None:
    assert expected_tokens_per_pass(accuracies) == pytest.approx(expected)


def test_nothing_counted_is_nothing_known() -> None:
    assert math.isnan(expected_tokens_per_pass([math.nan] * 4))
