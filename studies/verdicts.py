"""Judge a claim by differences between conditions, paired by seed, and the sign that the paper gives them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from studies.study import Verdict


@dataclass(frozen=True)
class Contrast:
    """A difference whose sign the claim gives."""

    what: str
    differences: Sequence[float]
    """Difference of each seed, positive if it is as claimed."""
    margin: float = 0.0
    """Noise of the measurement, which a difference must exceed to count."""

    @property
    def median(self) -> float:
        """Median over seeds."""
        return statistics.median(self.differences)

    @property
    def holds(self) -> bool:
        """True if the difference is as claimed with every seed, of two at least."""
        return len(self.differences) > 1 and min(self.differences) > self.margin

    @property
    def leans(self) -> bool:
        """True if the median is as claimed."""
        return self.median > self.margin

    @property
    def reversed(self) -> bool:
        """True if the difference is the opposite of the claim with every seed, of two at least."""
        return len(self.differences) > 1 and max(self.differences) < -self.margin

    @property
    def seeds_in_words(self) -> str:
        """Agreement of the seeds, in words."""
        return "every seed" if self.holds else "every seed, the opposite" if self.reversed else "not every seed"


def contrast(what: str, more: Sequence[float], less: Sequence[float], margin: float = 0.0) -> Contrast:
    """Return the contrast that claims `more` above `less`, seed by seed."""
    return Contrast(what, [a - b for a, b in zip(more, less)], margin)


def judge(contrasts: Sequence[Contrast], *, within_reach: bool = True, whole: bool = True) -> Verdict:
    """Return the verdict on a claim.

    - reproduced: every contrast holds with every one of two seeds or more.
    - direction only: the medians of more than half of the contrasts are as claimed, or all of them hold and the claim
      says more than they do (`whole` is False).
    - null: anything else, the opposite included.
    - out of reach: the setting could not have shown the claim (`within_reach` is False), or nothing was compared.
    """
    if not within_reach or not contrasts:
        return "out of reach"
    if whole and all(each.holds for each in contrasts):
        return "reproduced"
    return "direction only" if sum(each.leans for each in contrasts) > len(contrasts) / 2 else "null"


def in_words(contrasts: Sequence[Contrast], form: str = "+.3f") -> str:
    """Return the contrasts one after the other, as "n=2 over n=1 +0.031 (every seed)"."""
    return "; ".join(
        f"{each.what} {each.median:{form}} "
        + (f"({each.seeds_in_words})" if len(each.differences) > 1 else "(one seed)")
        for each in contrasts
    )
