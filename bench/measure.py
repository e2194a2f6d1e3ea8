"""Measuring so that ratios hold: variants take turns in one process, and medians stand beside their spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


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
