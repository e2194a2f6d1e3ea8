"""Verdicts: differences between conditions, paired by seed, against what the paper says of their sign."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from studies.study import Verdict


@dataclass(frozen=True)
class Contrast:
    """A difference that the claim says something of."""

    what: str
    differences: Sequence[float]
    """One for each seed, positive where the claim has it so."""
    margin: float = 0.0
    """What must be exceeded to count: the noise of the measurement."""

    @property
    def median(self) -> float:
        return statistics.median(self.differences)

    @property
    def holds(self) -> bool:
        """With every seed, and there are two at least."""
        return len(self.differences) > 1 and min(self.differences) > self.margin

    @property
    def leans(self) -> bool:
        return self.median > self.margin

    @property
    def reversed(self) -> bool:
        """The opposite of the claim, with every seed."""
        return len(self.differences) > 1 and max(self.differences) < -self.margin

    @property
    def seeds_in_words(self) -> str:
        return "every seed" if self.holds else "every seed, the opposite" if self.reversed else "not every seed"


def contrast(what: str, more: Sequence[float], less: Sequence[float], margin: float = 0.0) -> Contrast:
    """`more` above `less`, seed by seed."""
    return Contrast(what, [a - b for a, b in zip(more, less)], margin)


def judge(contrasts: Sequence[Contrast], *, within_reach: bool = True, whole: bool = True) -> Verdict:
    """reproduced: every contrast holds with every one of two seeds or more. direction only: more than half of them lean
    as claimed, by their medians, or the claim says more than they do (`whole`). null: anything else, the opposite
    included. out of reach: the setting could not have shown the claim (`within_reach`), or nothing was compared."""
    if not within_reach or not contrasts:
        return "out of reach"
    if whole and all(each.holds for each in contrasts):
        return "reproduced"
    return "direction only" if sum(each.leans for each in contrasts) > len(contrasts) / 2 else "null"


def in_words(contrasts: Sequence[Contrast], form: str = "+.3f") -> str:
    """How the contrasts came out, one after the other: "n=2 over n=1: +0.031 (every seed)"."""
    return "; ".join(
        f"{each.what} {each.median:{form}} "
        + (f"({each.seeds_in_words})" if len(each.differences) > 1 else "(one seed)")
        for each in contrasts
    )
