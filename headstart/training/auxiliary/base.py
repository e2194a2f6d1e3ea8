"""Auxiliary objectives: what a run hides from the model, adds to its rows, or learns in addition to its heads.

Each one is a section of the configuration (`AuxiliarySettings`), off by default, and an `Auxiliary` that the section
makes. Masked inputs, token order and registers have one file each in this folder.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from headstart.data.shards import TokenShards
from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.objective.inputs import StepInputs
from headstart.objective.objective import AuxiliaryLoss
from headstart.training.processes import Processes


class AuxiliarySettings(ABC):
    """A section of the configuration that can add an auxiliary objective to a run."""

    name: ClassVar[str]
    """Name of the section."""
    why_not_adapted: ClassVar[str]
    """Reason for which `headstart adapt` cannot have it."""
    with_sequential_heads: ClassVar[bool] = False
    """True if it works with heads that read the tokens behind a position."""
    has_token: ClassVar[bool] = False
    """True if it needs an id of the vocabulary, its field `token`."""

    @property
    def on(self) -> bool:
        """True if the run has it: if its loss has a weight, unless it says otherwise."""
        weight: float = getattr(self, "weight", 0.0)
        return weight > 0

    @property
    def named_token(self) -> int | None:
        """Id of its token; None: it has none, or a row of its own at the end of the vocabulary."""
        token: int | None = getattr(self, "token", None)
        return token

    @abstractmethod
    def auxiliary(self, token: int, seed: int) -> Auxiliary:
        """Return the objective, given the id of its token and the seed of the run."""

    def extra_positions(self, length: int) -> int:
        """Count the positions that it adds to a row of `length` tokens."""
        return 0

    def extra_flops(self, model: ModelConfig) -> int:
        """Count the FLOPs that it adds to training on one token, without those of extra positions."""
        return 0

    def check(self, *, adapted: bool, sampled: bool, ahead: int) -> None:
        """Raise UsageError if the run that has it cannot.

        The run starts from an existing model (`adapted`), trains one head in a step (`sampled`), or has heads that read
        the tokens up to `ahead` behind a position.
        """
        if adapted:
            raise UsageError(f"{self.name} does not go with headstart adapt, {self.why_not_adapted}; leave it out")
        if ahead and not self.with_sequential_heads:
            raise UsageError(
                f"{self.name} does not go with sequential heads, which read tokens behind a position as they are; "
                "take another model.head_kind"
            )


@dataclass(frozen=True)
class Auxiliary:
    """An auxiliary objective of a run, with defaults that do nothing.

    Random draws depend on (seed, step, the row's place in its source) alone, so micro-batches, processes and resumed
    runs draw the same.
    """

    settings: Any
    """Section of the configuration that made it."""
    token: int
    """Id of its token, or a number without meaning if it has none."""
    seed: int
    """Seed of the run."""

    @property
    def name(self) -> str:
        """Name of its section in the configuration, and of its loss in the metrics."""
        name: str = self.settings.name
        return name

    @property
    def weight(self) -> float | None:
        """Weight of its mean loss, relative to head 1's; None if it has no loss."""
        return getattr(self.settings, "weight", None)

    def check_data(self, shards: TokenShards) -> None:
        """Raise UsageError if the data lacks what the objective needs."""

    def add_parameters(self, model: Transformer) -> None:
        """Add the parameters that last as long as training."""

    def inputs(self, inputs: StepInputs, step: int) -> StepInputs:
        """Return the rows as step `step` (from 0) reads them."""
        return inputs

    def validation_inputs(self, inputs: StepInputs) -> StepInputs:
        """Return the rows as validation reads them; every validation draws the same."""
        return self.inputs(inputs, step=0)

    def count_targets(self, inputs: StepInputs) -> Tensor | None:
        """Count the targets of its loss in a micro-batch, scalar; None if they are those of head 1."""
        return None

    def loss(self, model: Transformer, inputs: StepInputs, x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        """Return its summed loss, scalar, with gradients; see `AuxiliaryLoss` for the arguments."""
        raise NotImplementedError


def row_generators(inputs: StepInputs, seed: int, step: int, purpose: int) -> list[np.random.Generator]:
    """Return a generator for each row, from (seed, step, the row's place in its source, purpose)."""
    assert inputs.places is not None
    return [np.random.default_rng([seed, step, *place, purpose]) for place in inputs.places.tolist()]


class StepAuxiliaries:
    """The auxiliary losses of one optimizer step, over its micro-batches and processes."""

    def __init__(
        self,
        auxiliaries: Sequence[Auxiliary],
        model: Transformer,
        micro_batches: Sequence[StepInputs],
        next_tokens: Tensor,
        processes: Processes,
    ) -> None:
        """Count targets over all micro-batches and processes; `next_tokens` are head 1's, scalar."""
        self._processes = processes
        self._losses: list[_StepLoss] = []
        for auxiliary in auxiliaries:
            if auxiliary.weight is not None:
                mine = [auxiliary.count_targets(inputs) for inputs in micro_batches]
                own = [count for count in mine if count is not None]
                targets = processes.sum(torch.stack(own).sum()) if own else next_tokens
                self._losses.append(_StepLoss(auxiliary, auxiliary.weight, model, targets, next_tokens))

    @property
    def losses(self) -> tuple[AuxiliaryLoss, ...]:
        """The losses for `Objective.auxiliaries`."""
        return tuple(self._losses)

    def means(self) -> dict[str, float]:
        """Return the mean of each loss by name, in nats, unweighted; NaN if it has no target.

        They cover the micro-batches that have been walked.
        """
        if not self._losses:
            return {}
        totals = self._processes.sum(torch.stack([loss.total for loss in self._losses]))
        counts = torch.stack([loss.targets for loss in self._losses]).tolist()
        return {
            loss.auxiliary.name: total / count if count else math.nan
            for loss, total, count in zip(self._losses, totals.tolist(), counts)
        }


@dataclass
class _StepLoss:
    """An `AuxiliaryLoss` that adds up what it returned, unweighted."""

    auxiliary: Auxiliary
    weight: float
    model: Transformer
    targets: Tensor
    next_tokens: Tensor

    def __post_init__(self) -> None:
        self.total = torch.zeros((), device=self.next_tokens.device)

    def __call__(self, inputs: StepInputs, x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        loss = self.auxiliary.loss(self.model, inputs, x_BTD, weight_VD)
        self.total = self.total + loss.detach()
        if self.targets is self.next_tokens:
            return loss * self.weight
        # Head 1's summed loss is divided by its own targets; this factor makes that a division by these.
        return loss * (self.weight * self.next_tokens.clamp_min(1).to(loss.dtype) / self.targets.clamp_min(1))
