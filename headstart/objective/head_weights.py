"""Weights of the heads' losses, and their change over training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from headstart.arguments import FINITE_POSITIVE, check_fields
from headstart.errors import UsageError

Shape = Literal["linear", "cosine", "sine"]
Curriculum = Literal["none", "forward", "reverse"]


@dataclass(frozen=True)
class HeadWeights:
    """Weights of the heads' losses. The default is the paper's: every head has weight 1, always.

    With `final`, the weights move from `initial` to `final` between the fractions `begin` and `end` of training; with
    four heads, Medusa-2's (arXiv 2401.10774) are `initial: [1, 0, 0, 0]`, `final: [1, 0.01, 0.01, 0.01]`, `decay: 0.8`,
    `shape: sine`, and FastMTP's (arXiv 2509.18362) `initial: [1, 0.51, 0.31, 0.18]`. A head of weight 0 is not
    computed, and its loss not reported.
    """

    initial: tuple[float, ...] | None = None
    """One weight per head, head 1 first (None: 1 for every head)."""
    final: tuple[float, ...] | None = None
    """Weights after `end` (None: `initial`)."""
    decay: float = 1.0
    """Factor from each head to the next: the weight of head k is multiplied by decay^(k-1)."""
    curriculum: Curriculum = "none"
    """forward: starts with head 1 alone and adds one head in each of n equal stages; reverse: starts with all and ends
    with head 1 alone (arXiv 2505.22757)."""
    begin: float = 0.0
    """Fraction of training at which the weights start to move, and the first stage of a curriculum begins."""
    end: float = 1.0
    """Fraction of training at which the weights are final and the last stage ends."""
    sampled: bool = False
    """Train one head in each step, drawn from those that have a weight, with the weight of all of them, like Stern et
    al. (arXiv 1811.03115): the gradient is the same on average, and a step computes one loss."""
    shape: Shape = "linear"
    """Curve from `initial` to `final`: linear; cosine, slow at both ends; sine, a quarter of a wave, fast at first."""

    def check(self, heads: int) -> None:
        """Raise UsageError unless these weights fit a model with `heads` heads."""
        for name, weights in (("initial", self.initial), ("final", self.final)):
            if weights is None:
                continue
            if len(weights) != heads:
                raise UsageError(f"head_weights.{name} has {len(weights)} weights for {heads} heads; give one per head")
            if any(not math.isfinite(w) or w < 0 for w in weights):
                raise UsageError(f"head_weights.{name} must be finite and not negative, not {list(weights)}")
            if not any(weights):
                raise UsageError(f"head_weights.{name} is 0 for every head; give one of them a weight")
            if self.curriculum != "none" and not weights[0]:
                raise UsageError(
                    f"head_weights.{name} is 0 for head 1, which head_weights.curriculum trains alone; give it a weight"
                )
        check_fields(self, "head_weights.", decay=FINITE_POSITIVE)
        if not 0 <= self.begin <= self.end <= 1:
            raise UsageError("head_weights.begin and head_weights.end must satisfy 0 <= begin <= end <= 1")
        if self.curriculum != "none" and heads == 1:
            raise UsageError(f"head_weights.curriculum {self.curriculum} needs 2 heads or more; this model has 1")

    def at(self, fraction: float, heads: int) -> list[float]:
        """Return the n weights at `fraction` (0 to 1) of training."""
        span = self.end - self.begin
        done = min(1.0, max(0.0, (fraction - self.begin) / span)) if span else float(fraction >= self.end)
        first = self.initial or [1.0] * heads
        last = self.final or first
        moved = {"linear": done, "cosine": (1 - math.cos(math.pi * done)) / 2, "sine": math.sin(math.pi / 2 * done)}
        weights = [a + (b - a) * moved[self.shape] for a, b in zip(first, last)]
        active = _active(self.curriculum, done, heads)
        return [weight * self.decay**k if k < active else 0.0 for k, weight in enumerate(weights)]


def draw_head(weights: Sequence[float], seed: int, step: int) -> list[float]:
    """Set all weights to 0 but that of one head, drawn from (seed, step) alone: processes and resumed runs agree.

    Its weight is multiplied by the number of heads that have one, so that the expected weighted sum stays the same.
    """
    heads = [k for k, weight in enumerate(weights) if weight]
    chosen = heads[int(np.random.default_rng([seed, step]).integers(len(heads)))]
    return [weight * len(heads) if k == chosen else 0.0 for k, weight in enumerate(weights)]


def _active(curriculum: Curriculum, done: float, heads: int) -> int:
    """Count the heads, from head 1 on, that take part."""
    if curriculum == "forward":
        return min(heads, int(done * heads) + 1)
    if curriculum == "reverse":
        return max(1, heads - int(done * heads))
    return heads
