"""How much of a text repeats itself: a loop is easily drafted."""

from __future__ import annotations

from collections.abc import Sequence


def repeated(outputs: Sequence[Sequence[int]], size: int = 8) -> float:
    """Share of the `size`-grams that stood in the same output before. A loop is easily drafted: beside much of it,
    tokens per pass say little about the model."""
    seen = again = 0
    for output in outputs:
        grams = [tuple(output[i : i + size]) for i in range(len(output) - size + 1)]
        seen += len(grams)
        again += len(grams) - len(set(grams))
    return again / seen if seen else 0.0
