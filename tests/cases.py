"""Choose the cases of large parametrizations."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest


def pairwise(axes: Mapping[str, Sequence[Any] | Mapping[str, Any]]) -> pytest.MarkDecorator:
    """Parametrize a test over a product of axes, and mark as slow what a pairwise covering set does not need.

    An axis is named by its argument, or by several with commas, whose values are then tuples; a mapping names its
    values in the ids. The unmarked cases hold every pair of values of two axes. The choice depends on the axes alone.
    """
    choices = [
        [(_label(value), value) for value in values] if not isinstance(values, Mapping) else list(values.items())
        for values in axes.values()
    ]
    cases = list(itertools.product(*(range(len(values)) for values in choices)))
    chosen = _covering(cases)
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


def _covering(cases: list[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Return cases that hold every pair of values, each time the one with the most new pairs."""
    pairs = {case: set(itertools.combinations(enumerate(case), 2)) for case in cases}
    missing = set().union(*pairs.values())
    chosen = set()
    while missing:
        case = max(cases, key=lambda each: len(pairs[each] & missing))
        chosen.add(case)
        missing -= pairs[case]
    return chosen
