"""Choose how many drafts to feed: expected tokens against the measured cost of a pass, pass by pass.

A window of more rows costs more and commits more. The expected tokens of a draft are known before it is fed: the
probability that its head gave it, through a table measured for this model (`AcceptanceTable`). The cost of a row is
measured on this machine (`PassCosts`). Which rows are fed changes no output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from headstart.decoding.drafters.tree import DraftTree, DynamicTree
from headstart.decoding.policy.calibration import Calibration, cost_of_rows


@dataclass
class _Costs:
    """Costs of drafting passes at one batch size, relative to a plain pass."""

    by_rows: tuple[float, ...]
    best_rate: float
    """The best rate to expect of any fixed number of rows, in tokens per cost."""
    doubtful: bool
    """True if no fixed number of rows is expected to pay, until the policy has paused for that."""


class DraftPolicy:
    """Choose the rows of each pass of an engine, and whether heads draft at all.

    The rate of tokens per cost is highest if every row is fed whose expected tokens are worth more than its cost at
    that very rate (Dinkelbach's rule). So the rate of recent passes is the price of a row. If it falls below the rate
    of passes without heads, drafting pauses, for longer each time: see `_transition`. That rate is 1 unless prompt
    lookup drafts too; then trials without heads measure it.
    """

    MEMORY = 0.97
    """Weight of a pass in the rate, relative to the pass after it."""
    PROBE = 24
    """Windows after a start before the rate is judged."""
    SURPRISE = 3.5
    """Standard deviations by which drafts must fall short of the prediction for the rate to be judged earlier."""
    PAUSES = (64, 2048)
    """Plain passes of the first and of the longest pause."""
    MEMORY_WITHOUT = 0.99
    """Weight of a pass without heads in the rate of those passes, relative to the pass after it."""
    TRIAL = 48
    """Passes of a trial without heads, where prompt lookup drafts too."""
    TRIALS_AFTER = (96, 4096)
    """Passes with heads before the first trial, and the most between two."""
    DOUBT = 256
    """Plain passes before drafting is first tried if no fixed number of rows is expected to pay."""
    GAIN = 0.2
    """The most that feeding only likely drafts may gain over the best fixed number of rows."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.tree: DraftTree | DynamicTree | None = None
        """The tree that windows are (None: chains)."""
        self._estimates = calibration.current
        self._costs: dict[tuple[int, bool], _Costs] = {}
        self._doubted: set[tuple[int, bool]] = set()
        self._pause = 0
        self._next_pause = self.PAUSES[0]
        self._without_tokens, self._without_cost = 8.0, 8.0
        self._looked_up = False
        """True once a pass with heads had more rows than they fill, so that prompt lookup drafts too."""
        self._since_trial, self._next_trial, self._trial = 0, self.TRIALS_AFTER[0], False
        self._start()

    def _start(self) -> None:
        """Begin to observe drafting anew."""
        self._windows = 0
        self._observed_tokens, self._observed_cost = 0.0, 0.0
        # The expected tokens of the planned pass and their variance; None for a pass that was not planned.
        self._predicted: tuple[float, float] | None = None
        self._shortfall, self._variance = 0.0, 0.0
        self._expect(1.0)

    def _expect(self, rate: float) -> None:
        """Set the rate as if a few passes had shown it."""
        self._tokens, self._cost = 8 * rate, 8.0

    def prepare(self, slots: int) -> None:
        """Time passes that would be timed while decoding, for any number of slots up to this one."""
        for sampled in (False, True):
            for power in range(slots.bit_length()):
                self.calibration.measure(1 << power, sampled)
            self.calibration.measure(slots, sampled)

    def best_tree(self, slots: int) -> DraftTree | DynamicTree | None:
        """Return the tree that is expected to beat chains at this batch size, if any."""
        return self.calibration.current.tree_for(slots)

    def use_tree(self, tree: DraftTree | DynamicTree) -> bool:
        """Plan for windows that are this tree; return False, and change nothing, if no such tree was measured."""
        estimates = self.calibration.current
        tables = all(estimates.select(sampled)[0].covers(tree) for sampled in (False, True))
        if not tables or not all(estimates.select(sampled)[1].tree for sampled in (False, True)):
            return False
        self.tree = tree
        self._start()
        return True

    @property
    def rate(self) -> float:
        """Tokens per cost of recent passes, relative to plain decoding."""
        return self._tokens / self._cost

    @property
    def rate_without(self) -> float:
        """Tokens per cost of passes without heads, at least that of plain decoding."""
        return max(1.0, self._without_tokens / self._without_cost)

    def prefixes(self, sampled: bool, confidences: Sequence[float]) -> list[float]:
        """Return in entry j-1 the probability that the first j drafts of a window are all right."""
        return self.calibration.current.select(sampled)[0].prefixes(confidences)

    def chances(self, sampled: bool, confidences: Sequence[float]) -> list[float]:
        """Return for each node of the tree the probability that its path is right."""
        table = self.calibration.current.select(sampled)[0]
        if isinstance(self.tree, DynamicTree):
            return table.chances_by_worth(confidences)
        assert self.tree is not None
        return table.chances(confidences, self.tree)

    def plan(self, slots: int, prefixes: Sequence[Sequence[float]], sampled: bool = False) -> tuple[int, bool]:
        """Return the rows of the next pass, and whether heads draft in it, for a pass that computes `slots` windows.

        `prefixes` holds for each live slot the probability that the first j drafts of its window are right, or that the
        path to node j of its tree is; empty after a pass without drafting.
        """
        costs = self._costs_of(slots, sampled)
        drafting = self._transition(costs, sampled)
        if not self._windows:
            # Measured estimates are expected to come true; priors are only tried.
            self._expect(1.0 if self.calibration.online else costs.best_rate)
        return self._choose_rows(costs.by_rows, drafting, prefixes), drafting

    def observe(self, slots: int, live: int, rows: int, drafted: bool, tokens: int, sampled: bool = False) -> None:
        """Account for a pass in which `live` of `slots` windows committed `tokens` tokens in all."""
        costs, judged = self._costs_of(slots, sampled), False
        if drafted:
            gained, cost = tokens / live, cost_of_rows(costs.by_rows, rows)
            self._tokens = self.MEMORY * self._tokens + gained
            self._cost = self.MEMORY * self._cost + cost
            surprised = self._windows < self.PROBE and self._is_surprised(gained, cost, tokens)
            if surprised:
                self._tokens, self._cost = self._observed_tokens, self._observed_cost
            self._windows += live
            judged = surprised or self._windows >= self.PROBE
            self._looked_up |= rows > len(costs.by_rows)
            self._since_trial += 1
        else:
            # Heads that do not draft cost nothing.
            cost = cost_of_rows(costs.by_rows, rows) - (costs.by_rows[0] - 1)
            self._without_tokens = self.MEMORY_WITHOUT * self._without_tokens + tokens / live
            self._without_cost = self.MEMORY_WITHOUT * self._without_cost + cost
        self._transition(costs, sampled, drafted, judged)

    def learn(self, sampled: bool, confidences: Sequence[float], fed: int, accepted: int) -> None:
        """Learn from a window that fed `fed` drafts of the heads and accepted `accepted` of them."""
        self.calibration.learn(sampled, confidences, fed, accepted)

    def _transition(self, costs: _Costs, sampled: bool, drafted: bool | None = None, judged: bool = False) -> bool:
        """Make the transitions due before a pass (`drafted` is None) or after it, and return whether heads draft now.

        drafting -> paused: at a batch size where no fixed number of rows is expected to pay, when it is first met;
            later, once the rate is judged to be below that of passes without heads. Each pause is twice as long as the
            one before it, until drafting pays again. Where prompt lookup drafts too, a trial without heads pauses it
            as well, more rarely each time.
        paused -> drafting: after that many passes without heads. Most of what was learned online fades after a pause
            for losses, because drafts that nobody feeds teach nothing.
        stopped: while the costs leave nothing to gain even for likely drafts. Measured costs do not change; those
            timed online may be noise, so there it is a pause.
        """
        stopped = costs.best_rate < 1 - self.GAIN
        if costs.doubtful:
            costs.doubtful = False
            self._pause = max(self._pause, self.DOUBT)
        if drafted is None:
            lost = stopped and self.calibration.online and not self._pause
        else:
            lost = drafted and judged and self.rate < self.rate_without
        if not lost and judged and self._looked_up and self._since_trial >= self._next_trial:
            self._since_trial, self._next_trial = 0, min(2 * self._next_trial, self.TRIALS_AFTER[1])
            self._pause, self._trial = self.TRIAL, True
            self._start()
        elif lost:
            self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause, self.PAUSES[1])
            self._start()
        elif judged:
            self._next_pause = self.PAUSES[0]
        elif drafted is False and self._pause:
            self._pause -= 1
            if not self._pause:
                if not self._trial:
                    self.calibration.fade(sampled)
                self._trial = False
        return not (self._pause or stopped)

    def _choose_rows(self, costs: Sequence[float], drafting: bool, prefixes: Sequence[Sequence[float]]) -> int:
        """Return the number of rows with the highest value, and keep the tokens predicted for it."""
        # A pass without drafting may still feed drafts from prompt lookup, at the cost of rows without that of heads.
        saved = 0.0 if drafting else costs[0] - 1
        rate, live = self.rate if drafting else max(self.rate, 1.0), len(prefixes)
        price = live * rate
        best, best_value, tokens = 1, live - price * (costs[0] - saved), float(live)
        self._predicted = tokens, 0.0
        for drafts in range(1, max(map(len, prefixes), default=0) + 1):
            for ahead in prefixes:
                if len(ahead) >= drafts:
                    tokens += ahead[drafts - 1]
            cost = costs[drafts] if drafts < len(costs) else cost_of_rows(costs, drafts + 1)
            value = tokens - price * (cost - saved)
            if value > best_value:
                best, best_value = drafts + 1, value
                # No distribution of accepted drafts, none to all, has more variance at this mean.
                accepted = tokens - live
                self._predicted = tokens, accepted * drafts - accepted * accepted / live
        return best

    def _is_surprised(self, gained: float, cost: float, tokens: int) -> bool:
        """Say whether drafts since the start fell short of the prediction by more than chance explains."""
        self._observed_tokens, self._observed_cost = self._observed_tokens + gained, self._observed_cost + cost
        if self._predicted is None:
            return False
        (predicted, variance), self._predicted = self._predicted, None
        self._shortfall, self._variance = self._shortfall + predicted - tokens, self._variance + variance
        return self._shortfall > self.SURPRISE * math.sqrt(max(self._variance, 0.0)) > 0

    def _costs_of(self, slots: int, sampled: bool) -> _Costs:
        """Return the costs of passes of `slots` windows by the current estimates, timed first if they are unknown."""
        self.calibration.measure(slots, sampled)
        estimates = self.calibration.current
        if estimates is not self._estimates:
            self._estimates = estimates
            self._costs.clear()
        key = slots, sampled
        if key not in self._costs:
            _, costs = estimates.select(sampled)
            plain, drafting = costs.at(slots) if self.tree is None else costs.at_tree(slots)
            best = estimates.best_speedup(slots, self.tree, sampled)
            doubtful = best < 1 and not self._windows and key not in self._doubted
            if doubtful:
                self._doubted.add(key)
            self._costs[key] = _Costs(tuple(cost / plain for cost in drafting), best, doubtful)
        return self._costs[key]
