"""Choose the cases of large parametrizations."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest


def pairwise(axes: Mapping[str, Sequence[Any] | Mapping[str, Any]]) -> pytest.MarkDecorator:
    """Parametrize a test over a product of axes, and mark as slow what a pairwise covering set does not need.

    An axis is named by its argument, or by several with commas, whose values are then tuples; a mapping names its
    values in the ids. The unmarked cases hold every pair of values of two axes. The choice depends on the axes alone.
    """
    return _parametrize(axes, 2)


def each_value(axes: Mapping[str, Sequence[Any] | Mapping[str, Any]]) -> pytest.MarkDecorator:
    """Parametrize like `pairwise`; the unmarked cases hold every value of an axis at least once."""
    return _parametrize(axes, 1)


def _parametrize(axes: Mapping[str, Sequence[Any] | Mapping[str, Any]], strength: int) -> pytest.MarkDecorator:
    choices = [
        [(_label(value), value) for value in values] if not isinstance(values, Mapping) else list(values.items())
        for values in axes.values()
    ]
    cases = list(itertools.product(*(range(len(values)) for values in choices)))
    chosen = _covering(cases, strength)
    names = [name.split(",") for name in axes]
    params = []
    for case in cases:
        picked = [values[i] for values, i in zip(choices, case)]
        arguments: list[Any] = []
        for group, (_, value) in zip(names, picked):
            arguments += value if len(group) > 1 else [value]
        marks = [] if case in chosen else [pytest.mark.slow]
        params.append(pytest.param(*arguments, marks=marks, id="-".join(label for label, _ in picked)))
    return pytest.mark.parametrize([name.strip() for group in names for name in group], params)


def _label(value: Any) -> str:
    return "-".join(map(_label, value)) if isinstance(value, tuple | list) else str(value)


def _covering(cases: list[tuple[int, ...]], strength: int) -> set[tuple[int, ...]]:
    """Return cases that hold every combination of `strength` values.

    Chooses the case with the most new combinations each time, and among equals the one whose values are rarest so far.
    """
    held = {case: set(itertools.combinations(enumerate(case), strength)) for case in cases}
    missing = set().union(*held.values())
    chosen: set[tuple[int, ...]] = set()
    uses: Counter[tuple[int, int]] = Counter()
    while missing:
        case = max(cases, key=lambda each: (len(held[each] & missing), -sum(uses[value] for value in enumerate(each))))
        chosen.add(case)
        uses.update(enumerate(case))
        missing -= held[case]
    return chosen
