"""How much each head's loss counts, and how that changes over training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from headstart.errors import UsageError


@dataclass(frozen=True)
class HeadWeights:
    """Weights of the heads' losses. The default is the paper's: every head counts 1, always.

    With `final`, the weights move from `initial` to `final` between the fractions `begin` and `end` of training.
    """

    initial: tuple[float, ...] | None = None
    """One weight per head, head 1 first (None: 1 for every head)."""
    final: tuple[float, ...] | None = None
    """Weights after `end` (None: they stay)."""
    begin: float = 0.0
    """Fraction of training at which the weights start to move."""
    end: float = 1.0
    """Fraction of training at which they have arrived."""
    shape: Literal["linear", "cosine"] = "linear"
    """How they move."""

    def check(self, heads: int) -> None:
        """Raises UsageError unless these weights fit a model with `heads` heads."""
        for name, weights in (("initial", self.initial), ("final", self.final)):
            if weights is not None and len(weights) != heads:
                raise UsageError(f"head_weights.{name} has {len(weights)} weights for {heads} heads; give one per head")
            if weights is not None and any(not math.isfinite(w) or w < 0 for w in weights):
                raise UsageError(f"head_weights.{name} must be finite and not negative, not {list(weights)}")
        if not 0 <= self.begin <= self.end <= 1:
            raise UsageError("head_weights.begin and head_weights.end must satisfy 0 <= begin <= end <= 1")
        if self.shape not in ("linear", "cosine"):
            raise UsageError(f"head_weights.shape {self.shape!r} is unknown; take linear or cosine")

    def at(self, fraction: float, heads: int) -> list[float]:
        """The n weights at `fraction` (0 to 1) of training."""
        first = list(self.initial or [1.0] * heads)
        if self.final is None:
            return first
        span = self.end - self.begin
        moved = min(1.0, max(0.0, (fraction - self.begin) / span)) if span else float(fraction >= self.end)
        if self.shape == "cosine":
            moved = (1 - math.cos(math.pi * moved)) / 2
        return [a + (b - a) * moved for a, b in zip(first, self.final)]
