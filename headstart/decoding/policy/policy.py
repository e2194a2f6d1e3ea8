"""How many drafts to feed: expected tokens against the measured cost of a pass, step by step.

A window of more rows costs more and commits more. What a draft is worth is known before it is fed: the probability that
its head gave it, through a table measured of this model (`AcceptanceTable`). What a row costs is measured of this
machine (`PassCosts`). Which rows are fed changes no output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from headstart.decoding.drafters.tree import DraftTree
from headstart.decoding.policy.calibration import Tuning, cost_of_rows


class DraftPolicy:
    """Chooses the rows of each pass of an engine, and whether heads draft at all.

    The rate of tokens per cost is highest where every row is fed whose expected tokens are worth more than its cost at
    that very rate; so the rate achieved lately is the price of a row. Where it falls below that of plain decoding, the
    heads rest, for longer each time.
    """

    MEMORY = 0.97
    """What a pass weighs, against the one after it, in the rate achieved."""
    PROBE = 24
    """Windows before the rate achieved is believed."""
    SURPRISE = 3.5
    """Standard deviations that drafts fall short of what was foreseen, to be believed before that."""
    REST = (64, 2048)
    """Plain passes between two looks: at first, and at most."""
    DOUBT = 256
    """Plain passes before the first look where no fixed number of rows can be expected to pay."""
    GAIN = 0.2
    """What feeding only likely drafts may gain over the best of them."""

    def __init__(self, tuning: Tuning) -> None:
        self.tuning = tuning
        self.tree: DraftTree | None = None
        """What the engine's windows are, if no chains."""
        self.sampled = False
        """Whether any text of the passes asked about is sampled; the engine says."""
        self._costs: dict[tuple[int, bool], tuple[tuple[float, ...], float]] = {}
        self._doubted: set[tuple[int, bool]] = set()
        self._rest = self.REST[0]
        self._resting = 0
        self._begin()

    def _begin(self) -> None:
        self._windows = 0
        self._seen, self._spent = 0.0, 0.0  # tokens and cost of passes since
        # Tokens of the pass planned, and their variance; None for one that was not asked about.
        self._foreseen: tuple[float, float] | None = None
        self._short, self._variance = 0.0, 0.0
        self._expect(1.0)

    def _expect(self, rate: float) -> None:
        # As if some passes at the expected rate had been seen.
        self._tokens, self._cost = 8 * rate, 8.0

    def prepare(self, slots: int) -> None:
        """What would otherwise be found out while decoding, for any number of slots up to this. What was tuned is known
        already."""

    def plant(self, tree: DraftTree) -> bool:
        """Windows will be this tree; False, and nothing changes, where no tree was measured."""
        if (
            not self.tuning.greedy.rank_mean
            or not self.tuning.sampled.rank_mean
            or not all(self.tuning.kind(sampled)[1].tree for sampled in (False, True))
        ):
            return False
        self.tree = tree
        self._begin()
        return True

    @property
    def rate(self) -> float:
        """Tokens per cost of late, in those of plain decoding."""
        return self._tokens / self._cost

    def prefixes(self, sampled: bool, confidences: Sequence[float]) -> list[float]:
        """Entry j-1: the probability that the first j drafts of a window are all right."""
        return (self.tuning.sampled if sampled else self.tuning.greedy).prefixes(confidences)

    def chances(self, sampled: bool, confidences: Sequence[float]) -> list[float]:
        """Of each node of the tree that its path is right."""
        assert self.tree is not None
        return (self.tuning.sampled if sampled else self.tuning.greedy).chances(confidences, self.tree)

    def plan(self, slots: int, prefixes: Sequence[Sequence[float]]) -> tuple[int, bool]:
        """The rows of the next pass, and whether heads draft in it.

        Args:
            slots: windows that the pass computes.
            prefixes: of each live slot the probabilities that the first j drafts in its window are right, or that the
                path to node j of a tree is (none after a pass without drafting).
        """
        costs, expected = self._costs_of(slots)
        hopeless = expected < 1 - self.GAIN
        if hopeless:
            self._despair()
        drafting = not (self._resting or hopeless)
        if not self._windows:
            self._expect(expected)
        # Without drafting by heads there may still be drafts that were looked up.
        saved = 0.0 if drafting else costs[0] - 1
        rate, live = max(self.rate, 1.0) if not drafting else self.rate, len(prefixes)
        price = live * rate
        best, best_worth, tokens = 1, live - price * (costs[0] - saved), float(live)
        self._foreseen = tokens, 0.0
        for drafts in range(1, max(map(len, prefixes), default=0) + 1):
            for ahead in prefixes:
                if len(ahead) >= drafts:
                    tokens += ahead[drafts - 1]
            cost = costs[drafts] if drafts < len(costs) else cost_of_rows(costs, drafts + 1)
            worth = tokens - price * (cost - saved)
            if worth > best_worth:
                best, best_worth = drafts + 1, worth
                # At most that of numbers of drafts, none to all, with this mean.
                kept = tokens - live
                self._foreseen = tokens, kept * drafts - kept * kept / live
        return best, drafting

    def learn(self, sampled: bool, confidences: Sequence[float], fed: int, accepted: int) -> None:
        """Of a window of which `fed` drafts of heads were fed and `accepted` kept. What was tuned stays as it is."""

    def saw(self, slots: int, live: int, rows: int, drafted: bool, tokens: int) -> None:
        """What became of a pass: `tokens` committed by `live` slots."""
        costs, _ = self._costs_of(slots)
        if not drafted:
            if self._resting:
                self._resting -= 1
                if not self._resting:
                    self._wake()
            return
        gained, cost = tokens / live, cost_of_rows(costs, rows)
        self._tokens = self.MEMORY * self._tokens + gained
        self._cost = self.MEMORY * self._cost + cost
        probing = self._windows < self.PROBE
        self._windows += live
        if probing and self._is_surprised(gained, cost, tokens):
            self._tokens, self._cost = self._seen, self._spent  # what was expected was wrong
        elif self._windows < self.PROBE:
            return
        if self.rate < 1:
            self._sleep()
        else:
            self._rest = self.REST[0]

    def _is_surprised(self, gained: float, cost: float, tokens: int) -> bool:
        """Whether drafts since the beginning fell short of what was foreseen by more than chance may do."""
        self._seen, self._spent = self._seen + gained, self._spent + cost
        if self._foreseen is None:
            return False
        (foreseen, variance), self._foreseen = self._foreseen, None
        self._short, self._variance = self._short + foreseen - tokens, self._variance + variance
        return self._short > self.SURPRISE * math.sqrt(max(self._variance, 0.0)) > 0

    def _sleep(self) -> None:
        self._resting, self._rest = self._rest, min(2 * self._rest, self.REST[1])
        self._begin()

    def _wake(self) -> None:
        """After a rest."""

    def _despair(self) -> None:
        """Where nothing is to be expected of drafts. What was tuned will not change."""

    def _costs_of(self, slots: int) -> tuple[tuple[float, ...], float]:
        """Of a drafting pass by rows, in plain passes; and the best rate to be expected of a fixed number of them."""
        key = slots, self.sampled
        if key not in self._costs:
            _, costs = self.tuning.kind(self.sampled)
            plain, drafting = costs.at(slots) if self.tree is None else costs.at_tree(slots)
            best = self.tuning.best(slots, self.tree, self.sampled)
            self._costs[key] = tuple(cost / plain for cost in drafting), best
            if best < 1 and not self._windows and key not in self._doubted:
                self._doubted.add(key)
                self._resting = max(self._resting, self.DOUBT)
        return self._costs[key]
