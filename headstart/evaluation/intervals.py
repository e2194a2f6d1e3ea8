"""Estimate means and ratios with intervals from resampled problems or prompts (the bootstrap)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
"""Number of resamples for an interval."""


@dataclass(frozen=True)
class Estimate:
    """A value over problems or prompts, with a 90 % interval from resampled ones, as in the paper's figures."""

    value: float
    low: float
    high: float


def resample(rows: Sequence[Sequence[float]], statistic: Callable[..., np.ndarray], seed: int = 0) -> Estimate:
    """Estimate a statistic of sums over rows, such as the ratio of two columns.

    Args:
        rows: one row of numbers for each problem or prompt, at least one.
        statistic: takes the sum of each column, as arrays of any shape, and returns the value.
        seed: of the resamples.
    """
    table = np.array(rows, dtype=np.float64)
    chosen = np.random.default_rng(seed).integers(len(table), size=(RESAMPLES, len(table)))
    weights = np.apply_along_axis(np.bincount, 1, chosen, minlength=len(table))
    with np.errstate(divide="ignore", invalid="ignore"):
        value, values = statistic(*table.sum(0)), statistic(*(weights @ table).T)
    low, high = np.quantile(values, (0.05, 0.95))
    return Estimate(float(value), float(low), float(high))
