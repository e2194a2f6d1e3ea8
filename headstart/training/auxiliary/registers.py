"""Register tokens (MuToR, arXiv 2505.10518): rows that predict further ahead, and that nothing else looks at.

A register stands behind a token of the row and reads what that reads, and itself. It is to predict the token at
distance d from there; nothing tells it that but its rotary position, the one from which that token is predicted
otherwise. No ordinary position sees it. So the model without registers is the model that is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from headstart.data.batches import IGNORE, Batch, Registers
from headstart.errors import UsageError
from headstart.training.auxiliary.masked_inputs import row_generators


@dataclass(frozen=True)
class RegisterConfig:
    """Registers beside the tokens of a row."""

    weight: float = 0.0
    """Of their loss beside head 1's, which counts 1 (0: none). The paper's a is weight / (1 + weight)."""
    offsets: tuple[int, int] = (1, 4)
    """The least and the largest d. One is drawn for each row; 1 is the next token."""
    share: float = 1.0
    """Registers in a row for each of its tokens; they stand where there is something to predict."""
    token: int | None = None
    """The id that registers have (None: a row of its own at the end of the vocabulary)."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise UsageError(f"registers.weight is {self.weight}; it must be finite and not negative (0: none)")
        if not 1 <= self.offsets[0] <= self.offsets[1]:
            raise UsageError(f"registers.offsets is {list(self.offsets)}; it must be [least, largest], both at least 1")
        if not 0 < self.share <= 1:
            raise UsageError(f"registers.share is {self.share}; it must be above 0 and at most 1")
        if self.token is not None and self.token < 0:
            raise UsageError(f"registers.token is {self.token}; it must be an id of the vocabulary, or left out")

    @property
    def on(self) -> bool:
        return self.weight > 0

    def count(self, length: int) -> int:
        """Registers of a row."""
        return max(1, round(self.share * length))


def with_registers(batch: Batch, config: RegisterConfig, token: int, seed: int, step: int) -> Batch:
    """`batch` with registers of the id `token`, drawn from (seed, step, the row's place in its source) alone.

    A register's target is head 1's at the position d - 1 further on; it has none where that has none, or lies in
    another document or behind the row.
    """
    if not config.on:
        return batch
    B, T = batch.tokens.shape
    R, (least, largest) = config.count(T), config.offsets
    offsets, draws = np.empty((B, 1), dtype=np.int64), np.empty((B, T))
    for row, rng in enumerate(row_generators(batch, seed, step, purpose=2)):
        offsets[row], draws[row] = rng.integers(least, largest + 1), rng.random(T)
    places_BT = torch.arange(T) + torch.from_numpy(offsets) - 1
    within = places_BT < T
    places_BT = places_BT.clamp_max(T - 1)
    within &= batch.documents.gather(1, places_BT) == batch.documents
    targets_BT = torch.where(within, batch.targets[..., 0].gather(1, places_BT), IGNORE)
    # Those without a target come last, so they are taken where there are not enough others.
    chosen_BT = (torch.from_numpy(draws) + (targets_BT == IGNORE)).argsort(1)
    after_BR = chosen_BT[:, :R].sort(1).values
    registers = Registers(
        tokens=torch.full_like(after_BR, token),
        after=after_BR,
        positions=after_BR + torch.from_numpy(offsets) - 1,
        targets=targets_BT.gather(1, after_BR),
    )
    return replace(batch, registers=registers)
