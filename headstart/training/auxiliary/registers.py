"""Register tokens (MuToR, arXiv 2505.10518): extra positions that predict further ahead and that no token sees.

A register stands behind a token of the row. It attends to what that token attends to, and to itself. Its target is the
token at distance d; it knows d from its rotary position alone, which is that of the token before its target. No
ordinary position attends to it, so the model without registers is the model that is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from headstart.arguments import COEFFICIENT, SHARE, TOKEN, check_fields
from headstart.data.batches import IGNORE
from headstart.errors import UsageError
from headstart.model.transformer import Transformer
from headstart.objective.cross_entropy import linear_cross_entropy
from headstart.objective.inputs import Registers, StepInputs
from headstart.training.auxiliary.base import Auxiliary, AuxiliarySettings, row_generators


@dataclass(frozen=True)
class RegisterConfig(AuxiliarySettings):
    """Registers in addition to the tokens of a row."""

    name = "registers"
    why_not_adapted = "whose model has no row for a register, and a trunk that does not learn to read one"
    has_token = True

    weight: float = 0.0
    """Weight of their loss, relative to head 1's (0: none). The paper's a is weight / (1 + weight)."""
    offsets: tuple[int, int] = (1, 4)
    """Least and largest d. One is drawn for each row; 1 is the next token."""
    share: float = 1.0
    """Registers for each token of a row; positions that have a target come first."""
    token: int | None = None
    """Id of registers (None: a row of its own at the end of the vocabulary)."""

    def __post_init__(self) -> None:
        if not 1 <= self.offsets[0] <= self.offsets[1]:
            raise UsageError(f"registers.offsets is {list(self.offsets)}; it must be [least, largest], both at least 1")
        check_fields(self, "registers.", weight=COEFFICIENT, share=SHARE, token=TOKEN)

    def auxiliary(self, token: int, seed: int) -> RegisterTokens:
        """Return the objective."""
        return RegisterTokens(self, token, seed)

    def extra_positions(self, length: int) -> int:
        """Count the registers of a row of `length` tokens."""
        return max(1, round(self.share * length))


@dataclass(frozen=True)
class RegisterTokens(Auxiliary):
    """Registers behind each row, and their cross-entropy by head 1."""

    settings: RegisterConfig

    def inputs(self, inputs: StepInputs, step: int) -> StepInputs:
        """Add registers.

        The target of a register is head 1's at the position d - 1 further on; it has none if that has none, or lies in
        another document or beyond the row.
        """
        B, T = inputs.tokens.shape
        R, (least, largest) = self.settings.extra_positions(T), self.settings.offsets
        offsets, draws = np.empty((B, 1), dtype=np.int64), np.empty((B, T))
        for row, rng in enumerate(row_generators(inputs, self.seed, step, purpose=2)):
            offsets[row], draws[row] = rng.integers(least, largest + 1), rng.random(T)
        places_BT = torch.arange(T) + torch.from_numpy(offsets) - 1
        within = places_BT < T
        places_BT = places_BT.clamp_max(T - 1)
        assert inputs.documents is not None
        within &= inputs.documents.gather(1, places_BT) == inputs.documents
        targets_BT = torch.where(within, inputs.targets[..., 0].gather(1, places_BT), IGNORE)
        # Positions without a target come last: they are taken only if there are not enough others.
        chosen_BT = (torch.from_numpy(draws) + (targets_BT == IGNORE)).argsort(1)
        after_BR = chosen_BT[:, :R].sort(1).values
        registers = Registers(
            tokens=torch.full_like(after_BR, self.token),
            after=after_BR,
            positions=after_BR + torch.from_numpy(offsets) - 1,
            targets=targets_BT.gather(1, after_BR),
        )
        return replace(inputs, registers=registers)

    def count_targets(self, inputs: StepInputs) -> Tensor:
        """Count the registers that have a target."""
        assert inputs.registers is not None
        return (inputs.registers.targets != IGNORE).sum()

    def loss(self, model: Transformer, inputs: StepInputs, x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        """Return the cross-entropy of head 1 at the registers, summed."""
        assert inputs.registers is not None
        return linear_cross_entropy(x_BTD[:, inputs.length :], weight_VD, inputs.registers.targets).loss
