"""Measuring so that ratios hold: variants take turns in one process, and medians stand beside their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def interleave(
    variants: Mapping[str, Callable[[], float]], repetitions: int, warmup: int = 1
) -> dict[str, list[float]]:
    """What each variant returns, A B A B ...: a machine that slows down slows all of them alike.

    The first `warmup` rounds are not counted.
    """
    values: dict[str, list[float]] = {name: [] for name in variants}
    for repetition in range(-warmup, repetitions):
        for name, measure in variants.items():
            value = measure()
            if repetition >= 0:
                values[name].append(value)
    return values


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """A variant for `interleave`: the seconds that `call` takes. It must wait for the device itself."""

    def measure() -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return measure


def ratios(numerators: Sequence[float], denominators: Sequence[float], block: int = 1) -> list[float]:
    """Of the medians of each `block` rounds, so that what disturbs a stretch of rounds cancels.

    Blocks of several rounds are for short measurements: a single pass may be hit by an interruption as long as itself.
    """
    block = min(block, len(numerators))
    starts = range(0, len(numerators) - block + 1, block)
    return [
        statistics.median(numerators[i : i + block]) / statistics.median(denominators[i : i + block]) for i in starts
    ]


PASSES_OF_A_BLOCK = 6
"""The `block` of ratios between single passes."""


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median with quartiles, or with the range where there are fewer than eight values."""
    if len(values) >= 8:
        low, _, high = statistics.quantiles(values, n=4)
        kind = "quartiles"
    else:
        low, high, kind = min(values), max(values), "range" if len(values) > 1 else "single value"
    return {
        "median": statistics.median(values),
        "low": low,
        "high": high,
        "spread": kind,
        "repetitions": len(values),
    }
