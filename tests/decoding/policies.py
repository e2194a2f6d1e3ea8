"""Draft policies and tunings for tests."""

from __future__ import annotations

import random

from shapes import HEADS

from headstart.decoding.policy.calibration import (
    EDGES,
    AcceptanceTable,
    PassCosts,
    Tuning,
)
from headstart.decoding.policy.policy import DraftPolicy


def acceptance(sure: float = 0.95, unsure: float = 0.05) -> AcceptanceTable:
    """Return the table of drafts that are right with probability `sure` if their heads are sure, else `unsure`."""
    table = tuple(sure if i == len(EDGES) else unsure for i in range(len(EDGES) + 1))
    return AcceptanceTable(((sure + unsure) / 2,) * (HEADS - 1), (table,) * (HEADS - 1))


def tuning(first: float, row: float, plain: float = 1.0, table: AcceptanceTable | None = None) -> Tuning:
    """Return a tuning whose drafting passes cost `first`, and `row` more for each further row."""
    costs = tuple(first + row * i for i in range(HEADS))
    table = table or acceptance()
    return Tuning(table, table, PassCosts((1,), (plain,), (costs,)))


class RandomRows(DraftPolicy):
    """Choose rows at random, which must not change the output."""

    def __init__(self, seed: int) -> None:
        super().__init__(tuning(1.0, 0.1))
        self.random, self.chosen = random.Random(seed), set()

    def plan(self, slots, prefixes, sampled=False):
        drafts = self.random.random() < 0.8
        rows = self.random.randint(1, max(map(len, prefixes)) + 1) if drafts else 1
        self.chosen.add((rows, drafts))
        return rows, drafts
