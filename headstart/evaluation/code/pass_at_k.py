"""Estimate pass@k, the chance that one of k programs is right, from n samples (Chen et al. 2021, section 2.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from headstart.errors import UsageError
from headstart.evaluation.intervals import Estimate, resample


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the unbiased estimate for one problem: 1 - C(n - c, k) / C(n, k), for c right ones of n samples.

    Raises UsageError for fewer samples than k.
    """
    if k > samples:
        raise UsageError(f"pass@{k} needs at least {k} samples of each problem, not {samples}; take more samples")
    if samples - right < k:
        return 1.0
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def estimate(counts: Sequence[tuple[int, int]], k: int, seed: int = 0) -> Estimate:
    """Estimate pass@k over problems, each given as (samples, right ones)."""
    values = [(pass_at_k(samples, right, k), 1.0) for samples, right in counts]
    return resample(values, lambda total, problems: total / problems, seed)


def oracle(by_temperature: Mapping[float, Sequence[tuple[int, int]]], k: int) -> tuple[float, Estimate]:
    """Return the temperature with the highest pass@k, the lowest of equal ones, and its estimate.

    It is chosen on the test scores themselves, as in the paper for each model, data set and k (section 3.1), which
    flatters all models alike.
    """
    found = {temperature: estimate(counts, k) for temperature, counts in sorted(by_temperature.items())}
    best = max(found, key=lambda temperature: found[temperature].value)
    return best, found[best]
