"""The policy of a model that was not tuned here: costs are timed when they are first needed, acceptance is learned.

`headstart tune` measures both with more care and keeps them. Without it a policy still must not lose to plain
decoding: what a row costs is found by a few passes of each kind, and what a draft is worth begins as a hope, by
the probability that its head gave it, and becomes what was seen.
"""

from __future__ import annotations

import itertools
import math
import time
from bisect import bisect_right
from collections.abc import Sequence

from headstart.decoding.policy.calibration import EDGES, PRIOR, AcceptanceTable, PassCosts, Tuning
from headstart.decoding.policy.policy import DraftPolicy
from headstart.decoding.policy.timing_step import Step
from headstart.decoding.settings import Sampling
from headstart.model.transformer import Transformer

LENGTH = 128
"""Cached positions of the passes that are timed."""
MOST_ROUNDS, SECONDS, LEAST_ROUNDS = 128, 0.03, 3
"""Timing of one kind of pass ends with the first of the first two, but not before the last."""
TEMPERATURE = 0.8
"""Of the sampled ones; no other setting changes what a pass costs as much as being sampled does."""
NO_COSTS = PassCosts((), (), ())
LEAST = 0.35
"""Of a draft that its head hardly believes in."""
PATIENCE = 1.25
"""A kind of pass that costs so many times what it could bring is the last one timed: less may be noise."""
KEPT = 0.25
"""Of what was seen of drafts, after a rest."""
HOPED = 0.8
"""Of drafts being right, for whether passes of more rows are worth timing."""


def hoped(confidence: float) -> float:
    """What a draft that its head gave this probability is worth before any was seen. More than that: heads are right
    more often than they are sure, and a draft that is never fed teaches nothing; one that is fed corrects the hope."""
    return LEAST + (1 - LEAST) * confidence


class AcceptanceCounts:
    """How often drafts were right, by head and by the probability that their head gave them."""

    def __init__(self, heads: int) -> None:
        bounds = (0.0, *EDGES, 1.0)
        middles = [hoped((low + high) / 2) for low, high in itertools.pairwise(bounds)]
        self._right = [[PRIOR * middle for middle in middles] for _ in range(heads - 1)]
        self._all = [[PRIOR] * len(middles) for _ in range(heads - 1)]
        self._means = [[PRIOR * HOPED, PRIOR] for _ in range(heads - 1)]

    def add(self, confidences: Sequence[float], fed: int, accepted: int) -> None:
        """Of a pass that fed `fed` drafts and kept `accepted`: those kept, and the one after them."""
        for i in range(min(fed, accepted + 1, len(confidences))):
            at, right = bisect_right(EDGES, confidences[i]), accepted > i
            self._right[i][at] += right
            self._all[i][at] += 1
            self._means[i][0] += right
            self._means[i][1] += 1

    def fade(self) -> None:
        """Forgets most of what was seen: it was some time ago, and of what nobody feeds nothing is learned."""
        fresh = AcceptanceCounts(len(self._right) + 1)
        for mine, hope in ((self._right, fresh._right), (self._all, fresh._all), (self._means, fresh._means)):
            for row, hoped_row in zip(mine, hope):
                row[:] = [h + KEPT * (x - h) for x, h in zip(row, hoped_row)]

    def table(self) -> AcceptanceTable:
        by_confidence = (tuple(a / b for a, b in zip(right, of)) for right, of in zip(self._right, self._all))
        return AcceptanceTable(tuple(right / of for right, of in self._means), tuple(by_confidence))


class Learned:
    """What decoding has found of a model so far; engines of the same model and number of threads share it."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.counts = {sampled: AcceptanceCounts(model.config.heads) for sampled in (False, True)}
        self._costs: dict[bool, dict[int, tuple[float, tuple[float, ...]]]] = {False: {}, True: {}}

    def time(self, slots: int, sampled: bool) -> int:
        """Times passes of as many slots, or of the powers of two around, that were not timed before; how many numbers
        of slots are known then."""
        below, known = 1 << (slots.bit_length() - 1), self._costs[sampled]
        new = {below, below if below == slots else 2 * below} - known.keys()
        for some in sorted(new):
            known[some] = timed_costs(self.model, some, sampled)
        return len(known)

    def tuning(self) -> Tuning:
        greedy, sampled = (
            PassCosts(tuple(sorted(known)), *zip(*(known[slots] for slots in sorted(known)))) if known else NO_COSTS
            for known in self._costs.values()
        )
        return Tuning(self.counts[False].table(), self.counts[True].table(), greedy, sampled_costs=sampled)


class UntunedPolicy(DraftPolicy):
    """Chooses by what it has learned (see `DraftPolicy`). Times passes at each power of two of slots that it meets, of
    greedy and of sampled texts: tenths of a second, and of large models as long as about fifty plain passes take."""

    RENEW = 32
    """Passes after which the tables are made anew."""

    def __init__(self, learned: Learned) -> None:
        self.learned = learned
        self._since = 0
        super().__init__(learned.tuning())

    def _expect(self, rate: float) -> None:
        super()._expect(1.0)  # as fast as plain decoding: to hope is not to expect

    def _despair(self) -> None:
        if not self._resting:
            self._sleep()

    def _wake(self) -> None:
        self.learned.counts[self.sampled].fade()
        self._renew()

    def prepare(self, slots: int) -> None:
        """Times passes now, at the powers of two up to `slots` and the next one: seconds."""
        for sampled in (False, True):
            for power in range(slots.bit_length()):
                self.learned.time(1 << power, sampled)
            self.learned.time(slots, sampled)
        self._renew()

    def learn(self, sampled: bool, confidences: Sequence[float], fed: int, accepted: int) -> None:
        self.learned.counts[sampled].add(confidences, fed, accepted)
        self._since += 1
        if self._since >= self.RENEW:
            self._renew()

    def _renew(self) -> None:
        self.tuning, self._since = self.learned.tuning(), 0
        self._costs.clear()

    def _costs_of(self, slots: int) -> tuple[tuple[float, ...], float]:
        # What another engine of the model has timed is news too.
        if self.learned.time(slots, self.sampled) != len(self.tuning.kind(self.sampled)[1].slots):
            self._renew()
        return super()._costs_of(slots)


def timed_costs(model: Transformer, slots: int, sampled: bool) -> tuple[float, tuple[float, ...]]:
    """Milliseconds of an engine's plain step of `slots` windows, and of drafting ones by rows, 1 to n. Numbers of rows
    between those timed lie on the straight line; more rows than could pay are not timed, and cost as much more each."""
    n, room = model.config.heads, model.config.context
    length = max(1, min(LENGTH, room - n))
    sampling = Sampling(TEMPERATURE if sampled else 0.0)
    plain = Step(model, drafting=False, slots=slots, length=length, sampling=sampling)
    plains: list[float] = []
    over: dict[int, float] = {}
    for rows in sorted({1, *(r for r in (2, 4, 8) if r < n), n}):
        drafting = Step(model, rows=rows, slots=slots, length=length, sampling=sampling)
        milliseconds, beside = _fastest(drafting, plain)
        plains.append(beside)
        over[rows] = milliseconds / beside
        if rows > 1 and over[rows] > PATIENCE * sum(HOPED**i for i in range(rows)):
            break
    base = min(plains)
    known = {rows: base * ratio for rows, ratio in over.items()}
    at = sorted(known)
    costs = []
    for rows in range(1, n + 1):
        high = max(1, next((i for i, r in enumerate(at) if r >= rows), len(at) - 1))
        low = high - 1
        slope = (known[at[high]] - known[at[low]]) / (at[high] - at[low])
        costs.append(known[at[low]] + (rows - at[low]) * slope)
    return base, tuple(itertools.accumulate(costs, max))


def _fastest(drafting: Step, plain: Step) -> tuple[float, float]:
    """Milliseconds of the fastest run of each, taking turns: whatever disturbs a run only adds to it."""
    fastest = [math.inf, math.inf]
    began = time.perf_counter()
    for turn in range(1 + MOST_ROUNDS):
        for i, one in enumerate((drafting, plain)):
            at = time.perf_counter()
            one()
            if turn:  # the first warms up
                fastest[i] = min(fastest[i], 1e3 * (time.perf_counter() - at))
        if turn >= LEAST_ROUNDS and time.perf_counter() - began > SECONDS:
            break
    return fastest[0], fastest[1]
