"""Check values that callers pass: whole numbers, numbers, token ids. Wrong values raise UsageError."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from headstart.errors import UsageError

Requirement = tuple[Callable[[Any], bool], str]
"""A condition on a value, and how it continues "it must be"."""
AT_LEAST_0: Requirement = (lambda x: x >= 0, "at least 0")
AT_LEAST_1: Requirement = (lambda x: x >= 1, "at least 1")
POSITIVE: Requirement = (lambda x: x > 0, "above 0")
FINITE_POSITIVE: Requirement = (lambda x: 0 < x < math.inf, "finite and above 0")
COEFFICIENT: Requirement = (lambda x: 0 <= x < math.inf, "finite and not negative (0: none)")
FRACTION: Requirement = (lambda x: 0 <= x < 1, "at least 0 and below 1")
SHARE: Requirement = (lambda x: 0 < x <= 1, "above 0 and at most 1")
TOKEN: Requirement = (lambda x: x >= 0, "an id of the vocabulary, or left out")


def check_fields(settings: object, section: str, **requirements: Requirement) -> None:
    """Raise UsageError for a field of a dataclass that does not meet its requirement, or is no choice of its Literal.

    None meets every requirement. `section` stands before the names of the fields.
    """
    for name, choices in _choices(type(settings)).items():  # type: ignore[arg-type]  # a class is hashable
        if getattr(settings, name) not in choices:
            shown = f"{section}{name} {getattr(settings, name)!r}"
            raise UsageError(f"{shown} is unknown; take one of {', '.join(choices)}")
    for name, (holds, words) in requirements.items():
        value = getattr(settings, name)
        if value is not None and not holds(value):
            raise UsageError(f"{section}{name} is {value}; it must be {words}")


@cache
def _choices(kind: type) -> dict[str, tuple[str, ...]]:
    """Return the choices of each field whose type is a Literal."""
    hints = get_type_hints(kind)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return `value` as an int: a Python or NumPy integer, or an integer tensor without dimensions.

    Raise UsageError, naming the argument, for a bool, a float, text, and a number out of [least, most].
    """
    given = _scalar(value)
    bounds = f"of at least {least:,}" if most is None else f"between {least:,} and {most:,}"
    if isinstance(given, bool) or not isinstance(given, int):
        raise UsageError(f"{name} is {_shown(value)}; it must be a whole number {bounds}")
    if given < least or (most is not None and given > most):
        raise UsageError(f"{name} is {_shown(given)}; it must be a whole number {bounds}")
    return given


def any_whole_number(name: str, value: Any) -> int:
    """Return `value` as an int of any sign and size."""
    given = _scalar(value)
    if isinstance(given, bool) or not isinstance(given, int):
        raise UsageError(f"{name} is {_shown(value)}; it must be a whole number")
    return given


def number(name: str, value: Any) -> float:
    """Return `value` as a float; what is too large for one becomes infinite, and NaN stays NaN."""
    given = _scalar(value)
    if isinstance(given, bool) or not isinstance(given, (int, float, Fraction)):
        raise UsageError(f"{name} is {_shown(value)}; it must be a number")
    try:
        return float(given)
    except OverflowError:
        return math.inf if given > 0 else -math.inf


def token_ids(given: Any) -> tuple[int, ...]:
    """Return the ids of a list, a tuple, a one-dimensional array or tensor of whole numbers."""
    dimensions, as_list = getattr(given, "ndim", 1), getattr(given, "tolist", None)
    if isinstance(given, (str, bytes, bytearray)) or (as_list is None and not isinstance(given, Sequence)):
        raise UsageError(f"the prompt is {_shown(given)}; give text, or a list of token ids")
    if dimensions != 1:
        raise UsageError(f"the prompt has {dimensions} dimensions; give the token ids in one")
    ids = tuple(given if as_list is None else as_list())
    if all(type(token) is int for token in ids):
        return ids
    return tuple(any_whole_number(f"token {place} of the prompt", token) for place, token in enumerate(ids, start=1))


def _scalar(value: Any) -> Any:
    """Return the Python number in a NumPy scalar, or in an array or tensor without dimensions."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 200:  # Python refuses to write very long ones
        return "a number of more than 60 digits"
    text = repr(value)
    return " ".join((text if len(text) <= 60 else text[:57] + "...").split())
