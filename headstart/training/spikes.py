"""Loss spikes: steps whose loss lies far above that of the steps before them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 100
"""Steps that the running mean and variance remember, and that must have been seen before a step can be a spike."""

LEAST_DEVIATION = 0.01
"""Nats. A corpus known by heart has a loss that hardly moves, where every jitter would be a spike."""


@dataclass
class LossHistory:
    """Running mean and variance of head 1's loss over the steps that were applied.

    Three numbers, made of losses summed over all processes: every process judges alike, and a checkpoint that holds
    them goes on exactly. The first `WINDOW` steps weigh alike; from then on older ones fade. While the loss falls, its
    fall widens the variance, so that the start of a run, with its steep curve, is judged mildly.
    """

    count: int = 0
    mean: float = 0.0
    """In nats."""
    variance: float = 0.0

    def spike(self, losses: Sequence[float], threshold: float) -> str:
        """What is wrong with a step of these losses (head 1 first, NaN where a head has none), or nothing: "".

        A spike is `threshold` standard deviations or more above the mean; a threshold of 0 finds none.
        """
        loss, deviation = _judged(losses), max(math.sqrt(self.variance), LEAST_DEVIATION)
        if not threshold or self.count < WINDOW or not loss - self.mean > threshold * deviation:
            return ""
        return f"loss {loss:.3f} is a spike, above {self.mean:.3f} + {threshold:g} x {deviation:.3f}"

    def add(self, losses: Sequence[float]) -> None:
        """Takes in a step that was applied."""
        loss = _judged(losses)
        if math.isnan(loss):
            return
        self.count += 1
        share = max(1 / self.count, 1 / WINDOW)
        difference = loss - self.mean
        self.mean += share * difference
        self.variance = (1 - share) * (self.variance + share * difference**2)


def _judged(losses: Sequence[float]) -> float:
    """Head 1's loss, which no schedule of head weights moves; where it is not trained, the first head's that is."""
    return next((loss for loss in losses if not math.isnan(loss)), math.nan)
