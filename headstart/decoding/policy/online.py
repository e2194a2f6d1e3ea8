"""Learn a calibration while decoding, for a model that was not tuned here.

`headstart tune` measures acceptance and costs with more care and keeps them. Without it a policy must still not lose to
plain decoding: the cost of a row comes from a few timed passes of each kind, and the acceptance of a draft begins as a
prior by the probability that its head gave it, and becomes what is observed.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Sequence

from headstart.decoding.policy.calibration import EDGES, PRIOR, AcceptanceTable, Calibration, PassCosts, Tuning
from headstart.decoding.policy.timing import ASSUMED_ACCEPTANCE, quick_pass_costs
from headstart.model.transformer import Transformer

LEAST_PRIOR = 0.35
"""The prior acceptance of a draft to which its head gave no probability."""
REMEMBERED = 0.25
"""The share of the observations that is left after a pause."""
UNKNOWN_COSTS = PassCosts((), (), ())

MeasureCosts = Callable[[Transformer, int, bool], tuple[float, tuple[float, ...]]]


def prior_acceptance(confidence: float) -> float:
    """Return the acceptance to assume, before any observation, of a draft that its head gave this probability.

    It is optimistic: heads are right more often than they are sure, and a draft that is never fed teaches nothing,
    while one that is fed corrects the prior.
    """
    return LEAST_PRIOR + (1 - LEAST_PRIOR) * confidence


class AcceptanceCounts:
    """Count how often drafts are right, by head and by the probability that their head gave them."""

    def __init__(self, heads: int) -> None:
        bounds = (0.0, *EDGES, 1.0)
        priors = [prior_acceptance((low + high) / 2) for low, high in itertools.pairwise(bounds)]
        self._right = [[PRIOR * prior for prior in priors] for _ in range(heads - 1)]
        self._all = [[PRIOR] * len(priors) for _ in range(heads - 1)]
        self._means = [[PRIOR * ASSUMED_ACCEPTANCE, PRIOR] for _ in range(heads - 1)]

    def add(self, confidences: Sequence[float], fed: int, accepted: int) -> None:
        """Count a window that fed `fed` drafts and accepted `accepted`: the accepted ones and the one after them."""
        for i in range(min(fed, accepted + 1, len(confidences))):
            at, right = bisect_right(EDGES, confidences[i]), accepted > i
            self._right[i][at] += right
            self._all[i][at] += 1
            self._means[i][0] += right
            self._means[i][1] += 1

    def fade(self) -> None:
        """Forget most of the observations: they are old, and drafts that nobody feeds teach nothing."""
        fresh = AcceptanceCounts(len(self._right) + 1)
        for own, priors in ((self._right, fresh._right), (self._all, fresh._all), (self._means, fresh._means)):
            for row, prior_row in zip(own, priors):
                row[:] = [prior + REMEMBERED * (x - prior) for x, prior in zip(row, prior_row)]

    def table(self) -> AcceptanceTable:
        """Return the shares of right drafts as a table."""
        by_confidence = (tuple(a / b for a, b in zip(right, of)) for right, of in zip(self._right, self._all))
        return AcceptanceTable(tuple(right / of for right, of in self._means), tuple(by_confidence))


class Observations:
    """Hold what decoding has found of a model in decoding form with one number of threads; all its engines share it.

    `measure_costs` times passes of a number of slots, sampled or greedy (None: `quick_pass_costs`).
    """

    def __init__(self, model: Transformer, measure_costs: MeasureCosts | None = None) -> None:
        self.model, self.measure_costs = model, measure_costs or quick_pass_costs
        self.counts = {sampled: AcceptanceCounts(model.config.heads) for sampled in (False, True)}
        self._costs: dict[bool, dict[int, tuple[float, tuple[float, ...]]]] = {False: {}, True: {}}

    def measure(self, slots: int, sampled: bool) -> int:
        """Time passes of `slots` windows, or of the powers of two around, if that was not done before.

        Return the number of batch sizes that have costs now.
        """
        below, known = 1 << (slots.bit_length() - 1), self._costs[sampled]
        new = {below, below if below == slots else 2 * below} - known.keys()
        for size in sorted(new):
            known[size] = self.measure_costs(self.model, size, sampled)
        return len(known)

    def tuning(self) -> Tuning:
        """Return the estimates that follow from the observations so far."""
        greedy, sampled = (
            PassCosts(tuple(sorted(known)), *zip(*(known[slots] for slots in sorted(known))))
            if known
            else UNKNOWN_COSTS
            for known in self._costs.values()
        )
        return Tuning(self.counts[False].table(), self.counts[True].table(), greedy, sampled_costs=sampled)


class OnlineCalibration(Calibration):
    """Estimates for one engine, from the observations of all engines of its model.

    Passes are timed at each power of two of slots that it meets, for greedy and for sampled requests: tenths of a
    second, or for large models the time of about fifty plain passes.
    """

    online = True
    RENEW = 32
    """Windows after which the estimates follow the observations again."""

    def __init__(self, observations: Observations) -> None:
        self.observations = observations
        self._renew()

    @property
    def current(self) -> Tuning:
        """The estimates as of the last renewal."""
        return self._tuning

    def measure(self, slots: int, sampled: bool) -> None:
        """Time passes of `slots` windows if no engine has, and take over the costs that other engines have timed."""
        if self.observations.measure(slots, sampled) != len(self.current.select(sampled)[1].slots):
            self._renew()

    def learn(self, sampled: bool, confidences: Sequence[float], fed: int, accepted: int) -> None:
        """Count a window that fed `fed` drafts and accepted `accepted`."""
        self.observations.counts[sampled].add(confidences, fed, accepted)
        self._windows += 1
        if self._windows >= self.RENEW:
            self._renew()

    def fade(self, sampled: bool) -> None:
        """Forget most of the observations of sampled drafts, or of greedy ones."""
        self.observations.counts[sampled].fade()
        self._renew()

    def _renew(self) -> None:
        self._tuning, self._windows = self.observations.tuning(), 0
