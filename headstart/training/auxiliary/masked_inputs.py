"""Inputs that are hidden from the model while it trains, behind a mask token; what it is to predict stays as it is.

Teacherless training (Bachmann & Nagarajan 2024, arXiv 2403.06963, section 5) hides the whole answer: each of its tokens
is predicted from the prompt and from its place alone, and decoded so, all at once. Random masks hide a share of it
("masking" in companions of that paper): a model trained so is decoded as any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch

from headstart.data.batches import IGNORE, Batch
from headstart.errors import UsageError

MaskKind = Literal["none", "teacherless", "random"]


@dataclass(frozen=True)
class MaskConfig:
    """Which inputs are hidden. An input belongs to the answer if it is a target of the position before it: in
    conversations what the assistant says, in plain text all but the first token of a row or document."""

    kind: MaskKind = "none"
    """none; teacherless: all inputs of answers, for data with answers; random: a share of them."""
    share: float | None = None
    """random: each is hidden with this probability (None: one drawn for each row, uniformly from 0 to 1)."""
    everywhere: bool = False
    """random: whether inputs that are no target, as a prompt's, are hidden too."""
    rows: float = 1.0
    """Share of rows that this is done to; the others stay as they are."""
    token: int | None = None
    """The id that stands for a hidden input (None: a row of its own at the end of the vocabulary)."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(MaskKind):
            raise UsageError(
                f"masked_inputs.kind {self.kind!r} is unknown; take one of {', '.join(get_args(MaskKind))}"
            )
        if self.kind != "random" and (self.share is not None or self.everywhere):
            name = "everywhere" if self.share is None else "share"
            raise UsageError(f"masked_inputs.{name} is for masked_inputs.kind random, not {self.kind}; leave it out")
        if self.share is not None and not 0 < self.share <= 1:
            raise UsageError(f"masked_inputs.share is {self.share}; it must be above 0 and at most 1, or left out")
        if not 0 < self.rows <= 1:
            raise UsageError(f"masked_inputs.rows is {self.rows}; it must be above 0 and at most 1")
        if self.token is not None and self.token < 0:
            raise UsageError(f"masked_inputs.token is {self.token}; it must be an id of the vocabulary, or left out")

    @property
    def on(self) -> bool:
        return self.kind != "none"

    @property
    def in_use(self) -> bool:
        """Whether the model, once trained, is to be given masks: it has never seen an answer."""
        return self.kind == "teacherless" and self.rows == 1


def masked(batch: Batch, config: MaskConfig, token: int, seed: int, step: int) -> Batch:
    """`batch` with the id `token` in place of inputs, as `config` says; its targets are those of the text.

    What is hidden is drawn from (seed, step, the row's place in its source) alone: micro-batches, processes and resumed
    runs agree.
    """
    if not config.on:
        return batch
    is_answer = torch.zeros_like(batch.tokens, dtype=torch.bool)
    is_answer[:, 1:] = batch.targets[:, :-1, 0] != IGNORE
    if config.in_use:
        hidden = is_answer
    else:
        draws_BT, rates_B1 = _draws(batch, config, seed, step)
        hidden = draws_BT < rates_B1
        if not config.everywhere:
            hidden &= is_answer
    return replace(batch, tokens=torch.where(hidden, token, batch.tokens))


def _draws(batch: Batch, config: MaskConfig, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A number of [0, 1) for each input, (B, T), and below which it is hidden, (B, 1): 0 in rows that stay."""
    draws, rates = np.empty(batch.tokens.shape), np.zeros((len(batch.tokens), 1))
    for row, rng in enumerate(row_generators(batch, seed, step, purpose=1)):
        chosen, rate = rng.random(2)
        if chosen < config.rows:
            rates[row] = 1.0 if config.kind == "teacherless" else rate if config.share is None else config.share
        draws[row] = rng.random(draws.shape[1])
    return torch.from_numpy(draws), torch.from_numpy(rates)


def row_generators(batch: Batch, seed: int, step: int, purpose: int) -> list[np.random.Generator]:
    """One for each row, of (seed, step, the row's place in its source, purpose). The batch must know its places."""
    assert batch.places is not None
    return [np.random.default_rng([seed, step, *place, purpose]) for place in batch.places.tolist()]
