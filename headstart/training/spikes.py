"""Loss spikes: steps whose loss lies far above that of the steps before them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 100
"""Steps that the running mean and variance cover, and that must precede the first spike."""

LEAST_DEVIATION = 0.01
"""Smallest standard deviation, in nats: the loss of a memorized corpus hardly moves, and jitter is no spike."""


@dataclass
class LossHistory:
    """Running mean and variance of head 1's loss over the steps that were applied.

    The three numbers come from losses summed over all processes, so every process decides alike, and a checkpoint that
    holds them resumes exactly. The first `WINDOW` steps have equal weight; from then on older ones fade. A falling loss
    widens the variance, so the steep start of a run has few spikes.
    """

    count: int = 0
    mean: float = 0.0
    """Mean loss in nats."""
    variance: float = 0.0

    def spike(self, losses: Sequence[float], threshold: float) -> str:
        """Describe the spike in a step of these losses (head 1 first, NaN for a head without), or return "".

        A spike is `threshold` standard deviations or more above the mean; a threshold of 0 finds none.
        """
        loss, deviation = _judged(losses), max(math.sqrt(self.variance), LEAST_DEVIATION)
        if not threshold or self.count < WINDOW or not loss - self.mean > threshold * deviation:
            return ""
        return f"loss {loss:.3f} is a spike, above {self.mean:.3f} + {threshold:g} x {deviation:.3f}"

    def add(self, losses: Sequence[float]) -> None:
        """Add a step that was applied."""
        loss = _judged(losses)
        if math.isnan(loss):
            return
        self.count += 1
        share = max(1 / self.count, 1 / WINDOW)
        difference = loss - self.mean
        self.mean += share * difference
        self.variance = (1 - share) * (self.variance + share * difference**2)


def _judged(losses: Sequence[float]) -> float:
    """Return head 1's loss, which no schedule of head weights moves, or that of the first head that is trained."""
    return next((loss for loss in losses if not math.isnan(loss)), math.nan)
