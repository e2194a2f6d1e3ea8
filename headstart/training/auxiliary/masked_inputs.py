"""Inputs hidden behind a mask token during training; the targets stay as they are.

Teacherless training (Bachmann & Nagarajan 2024, arXiv 2403.06963, section 5) hides the whole answer: the model predicts
each of its tokens from the prompt and from its position alone, and decodes them all at once. Random masks hide a share
of it ("masking" in companions of that paper); such a model is decoded like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from headstart.arguments import SHARE, TOKEN, check_fields
from headstart.data.batches import IGNORE
from headstart.data.shards import TokenShards
from headstart.errors import UsageError
from headstart.objective.inputs import StepInputs
from headstart.training.auxiliary.base import Auxiliary, AuxiliarySettings, row_generators

MaskKind = Literal["none", "teacherless", "random"]


@dataclass(frozen=True)
class MaskConfig(AuxiliarySettings):
    """Inputs hidden from the model.

    An input belongs to the answer if it is the target of the position before it: in conversations what the assistant
    says, in plain text all but the first token of a row or document.
    """

    name = "masked_inputs"
    why_not_adapted = "whose model has no row for a mask, and a trunk that does not learn to read one"
    has_token = True

    kind: MaskKind = "none"
    """none; teacherless: all inputs of answers, for data with answers; random: a share of them."""
    share: float | None = None
    """random: probability that an input is hidden (None: one drawn for each row, uniformly from 0 to 1)."""
    everywhere: bool = False
    """random: whether inputs that are no target, such as a prompt's, are hidden too."""
    rows: float = 1.0
    """Share of rows with hidden inputs; the others stay as they are."""
    token: int | None = None
    """The id that stands for a hidden input (None: a row of its own at the end of the vocabulary)."""

    def __post_init__(self) -> None:
        check_fields(self, "masked_inputs.", share=SHARE, rows=SHARE, token=TOKEN)
        if self.kind != "random" and (self.share is not None or self.everywhere):
            name = "everywhere" if self.share is None else "share"
            raise UsageError(f"masked_inputs.{name} is for masked_inputs.kind random, not {self.kind}; leave it out")

    @property
    def on(self) -> bool:
        """True if inputs are hidden."""
        return self.kind != "none"

    def auxiliary(self, token: int, seed: int) -> MaskedInputs:
        """Return the objective."""
        return MaskedInputs(self, token, seed)

    @property
    def in_use(self) -> bool:
        """True if the trained model is given masks too, because it has never seen an answer."""
        return self.kind == "teacherless" and self.rows == 1


@dataclass(frozen=True)
class MaskedInputs(Auxiliary):
    """Put the id `token` in place of inputs; the targets stay those of the text."""

    settings: MaskConfig

    def check_data(self, shards: TokenShards) -> None:
        """Raise UsageError if all answers are to be hidden and the data does not mark them."""
        if self.settings.kind == "teacherless" and shards.targets is None:
            raise UsageError(
                f"{shards.directory}: does not say which tokens are answers, so masked_inputs.kind teacherless "
                "would hide all; prepare conversations (headstart prepare), or take kind random"
            )

    def inputs(self, inputs: StepInputs, step: int) -> StepInputs:
        """Hide the inputs that step `step` hides."""
        settings = self.settings
        is_answer = torch.zeros_like(inputs.tokens, dtype=torch.bool)
        is_answer[:, 1:] = inputs.targets[:, :-1, 0] != IGNORE
        if settings.in_use:
            hidden = is_answer
        else:
            draws_BT, rates_B1 = self._draw(inputs, step)
            hidden = draws_BT < rates_B1
            if not settings.everywhere:
                hidden &= is_answer
        return replace(inputs, tokens=torch.where(hidden, self.token, inputs.tokens))

    def validation_inputs(self, inputs: StepInputs) -> StepInputs:
        """Hide inputs only from a model that will be given masks once it is trained."""
        return self.inputs(inputs, step=0) if self.settings.in_use else inputs

    def _draw(self, inputs: StepInputs, step: int) -> tuple[Tensor, Tensor]:
        """Draw a number of [0, 1) for each input, (B, T), and the rate below which it is hidden, (B, 1).

        The rate is 0 in rows that stay as they are.
        """
        settings = self.settings
        draws, rates = np.empty(inputs.tokens.shape), np.zeros((len(inputs.tokens), 1))
        for row, rng in enumerate(row_generators(inputs, self.seed, step, purpose=1)):
            chosen, rate = rng.random(2)
            if chosen < settings.rows:
                fixed = 1.0 if settings.kind == "teacherless" else settings.share
                rates[row] = rate if fixed is None else fixed
            draws[row] = rng.random(draws.shape[1])
        return torch.from_numpy(draws), torch.from_numpy(rates)
