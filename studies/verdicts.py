"""Judge a claim by differences between conditions, paired by seed, and the sign that the paper gives them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["reproduced", "direction only", "null", "out of reach"]

SEEDS = 3
"""Fewest seeds with which a difference holds."""
ERRORS = 2.0
"""Pooled standard errors of the mean that a difference must exceed."""


@dataclass(frozen=True)
class Control:
    """A positive control: a number that must be reached before a comparison says anything."""

    what: str
    value: float
    needed: float
    """The value must be above it."""

    @property
    def passed(self) -> bool:
        """True if the control succeeded."""
        return self.value > self.needed


@dataclass(frozen=True)
class Contrast:
    """A difference whose sign the claim gives."""

    what: str
    differences: Sequence[float]
    """Difference of each seed, positive if it is as claimed."""
    margin: float = 0.0
    """Noise of the measurement, which a difference must exceed to count."""
    error: float = 0.0
    """Pooled standard error of the mean difference: sqrt(s1^2 / n1 + s2^2 / n2) over the seeds of both conditions."""
    essential: bool = False
    """True if the claim says nothing without it: the verdict is "null" unless it leans as claimed."""

    @property
    def bar(self) -> float:
        """Size that a difference must exceed: the noise of the measurement, or two pooled standard errors."""
        return max(self.margin, ERRORS * self.error)

    @property
    def median(self) -> float:
        """Median over seeds."""
        return statistics.median(self.differences)

    @property
    def holds(self) -> bool:
        """True if the difference is as claimed with every seed, of three at least, and beyond the bar on the mean."""
        return self._all_beyond([*self.differences])

    @property
    def leans(self) -> bool:
        """True if the median is as claimed."""
        return self.median > self.bar

    @property
    def reversed(self) -> bool:
        """True if the opposite of the claim holds."""
        return self._all_beyond([-difference for difference in self.differences])

    def _all_beyond(self, differences: Sequence[float]) -> bool:
        enough = len(differences) >= SEEDS
        return enough and min(differences) > self.margin and statistics.fmean(differences) > self.bar

    @property
    def seeds_in_words(self) -> str:
        """Agreement of the seeds, in words."""
        if len(self.differences) == 1:
            return "one seed"
        if self.holds or self.reversed:
            return "every seed" if self.holds else "every seed, the opposite"
        return f"within {self.bar:.3g}" if abs(self.median) <= self.bar else "not with three seeds"


def contrast(
    what: str, more: Sequence[float], less: Sequence[float], margin: float = 0.0, essential: bool = False
) -> Contrast:
    """Return the contrast that claims `more` above `less`, seed by seed."""
    spreads = [statistics.variance(arm) / len(arm) if len(arm) > 1 else 0.0 for arm in (more, less)]
    return Contrast(what, [a - b for a, b in zip(more, less)], margin, sum(spreads) ** 0.5, essential)


def judge(contrasts: Sequence[Contrast], *, controls: Sequence[Control] = (), whole: bool = True) -> Verdict:
    """Return the verdict on a claim.

    - reproduced: every contrast holds, with every one of three seeds or more, beyond two pooled standard errors.
    - direction only: the medians of more than half of the contrasts are as claimed beyond that bar, or all of them hold
      and the claim says more than they do (`whole` is False).
    - null: anything else, the opposite included, and a claim whose essential contrast is not as claimed.
    - out of reach: a positive control failed, so the setting could not have shown the claim, or nothing was compared.
    """
    if not contrasts or not all(control.passed for control in controls):
        return "out of reach"
    if any(each.essential and not each.leans for each in contrasts):
        return "null"
    if whole and all(each.holds for each in contrasts):
        return "reproduced"
    return "direction only" if sum(each.leans for each in contrasts) > len(contrasts) / 2 else "null"


def in_words(contrasts: Sequence[Contrast], form: str = "+.3f") -> str:
    """Return the contrasts one after the other, as "n=2 over n=1 +0.031 (every seed)"."""
    return "; ".join(f"{each.what} {each.median:{form}} ({each.seeds_in_words})" for each in contrasts)
