"""Bounds of every number of a model, whether it comes from a file, a preset, or a caller.

They lie far beyond all existing models. A size in a downloaded file is not turned into lists, names or tensors before
anything has shown that the model is that large.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headstart.errors import UsageError

MOST_LAYERS = 10_000
MOST_HEADS = 1_000
LARGEST = 1e15
"""The largest number with a fraction. Floating-point numbers do not hold all whole numbers beyond."""
SIZES = {
    **{"layers": MOST_LAYERS, "heads": MOST_HEADS, "vocab_size": 10**8, "dim": 10**7, "hidden_dim": 10**8},
    **{"attention_heads": 10**5, "kv_heads": 10**5, "head_dim": 10**6, "context": 10**9, "window": 10**9},
    "draft_vocab": 10**8,
}
"""The largest value of each whole number; the smallest is 1."""
LISTS = {
    **{"window_layers": MOST_LAYERS, "nope_layers": MOST_LAYERS, "features": MOST_LAYERS},
    "offsets": SIZES["context"],
}
"""The largest entry of each list. No list has more entries than a model has layers."""
BASES = ("rope_theta", "local_rope_theta")
"""Numbers of at least 1: with a smaller base, later pairs would turn faster."""
FRACTIONS = (
    *("norm_eps", "query_scalar", "factor", "attention_factor"),
    *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
)


def check_numbers(config: object, name: str) -> None:
    """Raise UsageError for the first number among the fields of `config` that is out of bounds; None is allowed."""
    values: Mapping[str, Any] = {key: value for key, value in vars(config).items() if value is not None}
    for key, most in SIZES.items():
        if key in values:
            _check(f"{name}.{key}", values[key], 1, most)
    if "original_context" in values:
        _check(f"{name}.original_context", values["original_context"], 0, SIZES["context"])
    for key in BASES:
        if key in values:
            _check(f"{name}.{key}", values[key], 1, LARGEST)
    for key in FRACTIONS:
        if key in values:
            if not values[key] > 0:
                raise UsageError(f"{name}.{key} is {_short(values[key])}; it must be greater than 0")
            _check(f"{name}.{key}", values[key], 0, LARGEST)
    for key, most in LISTS.items():
        if len(values.get(key, ())) > MOST_LAYERS:
            raise UsageError(f"{name}.{key} has {len(values[key]):,} entries; it must have at most {MOST_LAYERS:,}")
        for entry in values.get(key, ()):
            _check(f"{name}.{key}", entry, 0, most)


def _check(name: str, value: float, least: int, most: float) -> None:
    if not value >= least:
        raise UsageError(f"{name} is {_short(value)}; it must be at least {least}")
    if not value <= most:
        raise UsageError(f"{name} is {_short(value)}; it must be at most {most:,.0f}")


def _short(value: float) -> str:
    """Return a number as text; Python writes no whole number of more than 4,300 digits."""
    return "a number of hundreds of digits" if isinstance(value, int) and abs(value) >= 10**100 else str(value)
