"""How much each head's loss counts, and how that changes over training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from headstart.errors import UsageError

Shape = Literal["linear", "cosine", "sine"]
Curriculum = Literal["none", "forward", "reverse"]


@dataclass(frozen=True)
class HeadWeights:
    """Weights of the heads' losses. The default is the paper's: every head counts 1, always.

    With `final`, the weights move from `initial` to `final` between the fractions `begin` and `end` of training; with
    four heads, Medusa-2's (arXiv 2401.10774) are `initial: [1, 0, 0, 0]`, `final: [1, 0.01, 0.01, 0.01]`, `decay: 0.8`,
    `shape: sine`, and FastMTP's (arXiv 2509.18362) `initial: [1, 0.51, 0.31, 0.18]`. A head of weight 0 is not
    computed, and its loss not reported.
    """

    initial: tuple[float, ...] | None = None
    """One weight per head, head 1 first (None: 1 for every head)."""
    final: tuple[float, ...] | None = None
    """Weights after `end` (None: they stay)."""
    decay: float = 1.0
    """Factor from each head to the next: the weight of head k is multiplied by decay^(k-1)."""
    curriculum: Curriculum = "none"
    """forward: begins with head 1 alone and takes in one more head in each of n equal stages; reverse: begins with all
    and ends with head 1 alone (arXiv 2505.22757)."""
    begin: float = 0.0
    """Fraction of training at which the weights start to move, and the first stage of a curriculum begins."""
    end: float = 1.0
    """Fraction of training at which they have arrived, and the last stage is over."""
    sampled: bool = False
    """Of the heads that have a weight one is drawn for each step, and counts for all of them, as Stern et al. train
    (arXiv 1811.03115): the gradient is the same on average, and a step computes one loss."""
    shape: Shape = "linear"
    """How they move: linear; cosine, slow at both ends; sine, a quarter of a wave, fast at first."""

    def check(self, heads: int) -> None:
        """Raises UsageError unless these weights fit a model with `heads` heads."""
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
        if not 0 < self.decay < math.inf:
            raise UsageError(f"head_weights.decay is {self.decay}; it must be finite and above 0 (1: no decay)")
        if not 0 <= self.begin <= self.end <= 1:
            raise UsageError("head_weights.begin and head_weights.end must satisfy 0 <= begin <= end <= 1")
        for name, value, known in (("shape", self.shape, Shape), ("curriculum", self.curriculum, Curriculum)):
            if value not in get_args(known):
                raise UsageError(f"head_weights.{name} {value!r} is unknown; take one of {', '.join(get_args(known))}")
        if self.curriculum != "none" and heads == 1:
            raise UsageError(f"head_weights.curriculum {self.curriculum} needs 2 heads or more; this model has 1")

    def at(self, fraction: float, heads: int) -> list[float]:
        """The n weights at `fraction` (0 to 1) of training."""
        span = self.end - self.begin
        done = min(1.0, max(0.0, (fraction - self.begin) / span)) if span else float(fraction >= self.end)
        first = self.initial or [1.0] * heads
        last = self.final or first
        moved = {"linear": done, "cosine": (1 - math.cos(math.pi * done)) / 2, "sine": math.sin(math.pi / 2 * done)}
        weights = [a + (b - a) * moved[self.shape] for a, b in zip(first, last)]
        active = _active(self.curriculum, done, heads)
        return [weight * self.decay**k if k < active else 0.0 for k, weight in enumerate(weights)]


def draw_head(weights: Sequence[float], seed: int, step: int) -> list[float]:
    """`weights` with all but one head's set to 0, and that one's times the number of those above 0, so that an expected
    weighted sum is what it was. The head is drawn from (seed, step) alone: processes and resumed runs agree."""
    heads = [k for k, weight in enumerate(weights) if weight]
    chosen = heads[int(np.random.default_rng([seed, step]).integers(len(heads)))]
    return [weight * len(heads) if k == chosen else 0.0 for k, weight in enumerate(weights)]


def _active(curriculum: Curriculum, done: float, heads: int) -> int:
    """How many heads, counted from head 1, take part."""
    if curriculum == "forward":
        return min(heads, int(done * heads) + 1)
    if curriculum == "reverse":
        return max(1, heads - int(done * heads))
    return heads
