"""Inputs of a training step: tokens, targets, and everything else that the walk over the heads reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.data.batches import IGNORE, Batch
from headstart.errors import UsageError
from headstart.model.attention import DocumentAttention, RegisterAttention, causal_attention
from headstart.model.draft_vocabulary import draft_ids
from headstart.model.layers import Attend
from headstart.model.transformer import HeadRows, Transformer, compute_dtype


@dataclass(frozen=True)
class Registers:
    """R register tokens behind each row, int64: see `training/auxiliary/registers.py`."""

    tokens: Tensor  # (B, R)
    after: Tensor  # (B, R), the position behind which each register stands, ascending
    positions: Tensor  # (B, R), the rotary position of each register, in part beyond the row
    targets: Tensor  # (B, R), IGNORE for registers without a target

    def to(self, device: torch.device) -> Registers:
        """Copy the registers to `device`."""
        return Registers(*(value.to(device) for value in vars(self).values()))


@dataclass(frozen=True)
class Teacher:
    """The distribution that a head learns from: the softmax of `x @ weight.T`, without gradients."""

    x: Tensor  # (B, T, D), the normed latent of a next-token head
    weight: Tensor  # (V, D), its unembedding

    @staticmethod
    @torch.no_grad()
    def of_latents(model: Transformer, z_BTD: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Teacher:
        """Return head 1 of `model` as a teacher, given the trunk's output."""
        for k in model.path(1):
            z_BTD = model.head(k)(z_BTD, rotary, attend)
        parts: Any = model.unembedding(z_BTD, using=lambda x, weight: (x, weight.detach()))
        return Teacher(*parts)

    @staticmethod
    @torch.no_grad()
    def of_tokens(model: Transformer, inputs: StepInputs) -> Teacher:
        """Run `model` on the T tokens of each row and return its head 1 as a teacher."""
        attend, positions = replace(inputs, registers=None).attention()
        rotary = model.rotary(positions, compute_dtype(model.trunk.embedding.weight))
        z_BTD = cast(Tensor, model.trunk(inputs.tokens[:, : inputs.length], rotary, lambda layer: attend))
        return Teacher.of_latents(model, z_BTD, rotary, attend)

    def among(self, d2t: Tensor | None) -> Teacher:
        """Return the distribution given that the token is in a draft vocabulary (None: all tokens).

        The softmax over some rows of the unembedding is the distribution restricted to them and normalised. A head
        that predicts those tokens alone can reach it. Positions whose target lies outside have no loss, so on average
        a position counts by the probability that the vocabulary has there.
        """
        return self if d2t is None else Teacher(self.x, self.weight[d2t])

    def ahead(self, offset: int, length: int) -> Teacher:
        """Return the teacher of a head that predicts `offset` tokens ahead: head 1, `offset - 1` positions later.

        The last `offset - 1` of the `length` positions of a row have no teacher; their `x` is 0.
        """
        return Teacher(_moved(self.x[:, :length], offset), self.weight)

    @property
    def by_row(self) -> tuple[Tensor, ...]:
        """The tensors that have an entry for each position."""
        return (self.x,)


@dataclass(frozen=True)
class LikelyTokens:
    """A teacher of whose distribution only the most probable tokens are known, normalised."""

    ids: Tensor  # (B, T, L) int64, different ones: draft ids where heads have a draft vocabulary
    p: Tensor  # (B, T, L)

    @staticmethod
    @torch.no_grad()
    def of(teacher: Teacher, count: int) -> LikelyTokens:
        """Return the `count` most probable tokens of a teacher."""
        best = F.linear(teacher.x, teacher.weight.to(teacher.x.dtype)).float().topk(min(count, len(teacher.weight)), -1)
        return LikelyTokens(best.indices, best.values.softmax(-1))

    def ahead(self, offset: int, length: int) -> LikelyTokens:
        """Return the teacher of a head that predicts `offset` tokens ahead, see `Teacher.ahead`."""
        return LikelyTokens(_moved(self.ids[:, :length], offset), _moved(self.p[:, :length], offset))

    @property
    def by_row(self) -> tuple[Tensor, ...]:
        """The tensors that have an entry for each position."""
        return self.ids, self.p


def _moved(values_BT: Tensor, offset: int) -> Tensor:
    """Return the values (B, T, ...) of the position `offset - 1` later, 0 if there is none."""
    length = values_BT.shape[1]
    moved = torch.zeros_like(values_BT)
    moved[:, : max(0, length - offset + 1)] = values_BT[:, offset - 1 :]
    return moved


@dataclass(frozen=True)
class StepInputs:
    """The rows of one micro-batch: B rows of T positions, int64."""

    tokens: Tensor  # (B, T); for sequential heads (B, T + n - 1), with the tokens that follow each row
    targets: Tensor  # (B, T, n), entry k-1 the target of head k, IGNORE if there is none
    documents: Tensor | None = None  # (B, T), the document of each position; None: each row is one document
    attention_within_documents: bool = True  # whether attention stops at the boundaries of `documents`
    places: Tensor | None = None  # (B, 2) on the CPU, source and row in it of each row, both from 0
    registers: Registers | None = None  # not with sequential heads, nor with `z`
    z: Tensor | None = None  # the output of a trunk that is not trained: the trunk does not run
    teacher: Teacher | None = None  # head 1 learns its distribution instead of the targets
    likely: LikelyTokens | None = None  # of head 1, for heads that learn from it (None: head 1 runs)

    @property
    def length(self) -> int:
        """T, the positions of a row that have targets."""
        return self.targets.shape[1]

    @property
    def read(self) -> Tensor:
        """The tokens that the model reads, registers included: (B, T + R)."""
        return self.tokens if self.registers is None else torch.cat([self.tokens, self.registers.tokens], 1)

    @staticmethod
    def of_batch(batch: Batch, ahead: int = 0, *, attention_within_documents: bool) -> StepInputs:
        """Return the inputs of a model whose heads read `ahead` tokens behind a row."""
        return StepInputs(
            batch.read(ahead),
            batch.targets,
            batch.documents,
            attention_within_documents=attention_within_documents,
            places=batch.places,
        )

    def to(self, device: torch.device) -> StepInputs:
        """Copy tokens, targets, documents and registers to `device`."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            targets=self.targets.to(device),
            documents=None if self.documents is None else self.documents.to(device),
            registers=None if self.registers is None else self.registers.to(device),
        )

    def check(self, model: Transformer) -> None:
        """Raise UsageError unless `tokens` holds what the heads of `model` read behind a row."""
        needed = self.length + model.config.ahead
        if self.tokens.shape[1] != needed:
            raise UsageError(
                f"tokens are {self.tokens.shape[1]} wide; {self.length} positions of a model with "
                f"{model.config.heads} {model.config.head_kind} heads need {needed}"
            )

    def attention(self) -> tuple[Attend, Tensor]:
        """Return the attention of a row, and its rotary positions: (T,), with registers (B, T + R)."""
        documents = self.documents if self.attention_within_documents else None
        attend: Attend = causal_attention if documents is None else DocumentAttention(documents)
        positions = torch.arange(self.length, device=self.tokens.device)
        if self.registers is None:
            return attend, positions
        attend = RegisterAttention(attend, self.length, self.registers.after, documents)
        return attend, torch.cat([positions.expand(len(self.tokens), -1), self.registers.positions], 1)

    def rows(self, model: Transformer, detached: bool = False) -> HeadRows:
        """Return the heads of `model` over these rows; `detached`: see `HeadRows`."""
        return HeadRows(model, *self.attention(), detached)

    def latents(self, model: Transformer, ks: Sequence[int] | None = None) -> dict[int, Tensor]:
        """Return the latents of the heads `ks` (None: all), with autograd's ordinary graph: see `Transformer.latents`.

        The trunk does not run if its output is given.
        """
        ks = list(range(1, model.config.heads + 1)) if ks is None else list(ks)
        if self.z is not None:
            return self._latents_on(self.z, model, ks)
        if self.registers is not None:
            return model.latents(self.read, ks, attention=self.attention())
        documents = self.documents if self.attention_within_documents else None
        if documents is not None and documents.shape != self.tokens.shape:
            # No position of the row attends to the tokens behind it, so their document does not matter.
            behind = self.tokens.shape[1] - documents.shape[1]
            documents = torch.cat([documents, documents[:, -1:].expand(-1, behind)], 1)
        return model.latents(self.tokens, ks, documents)

    def _latents_on(self, z_BTD: Tensor, model: Transformer, ks: list[int]) -> dict[int, Tensor]:
        rows = self.rows(model)
        embeddings_BTD = model.trunk.embedding(self.tokens) if model.config.ahead else None
        latents = {0: z_BTD}
        for step in (step for k in ks for step in model.path(k)):
            if step in latents:
                continue
            ahead = None
            if embeddings_BTD is not None and step > 1:
                ahead = embeddings_BTD[:, step - 1 : step - 1 + self.length]
            latents[step] = rows.run(step, latents[model.config.parents[step - 1]], ahead)
        return latents


def count_targets(targets_BTn: Tensor) -> Tensor:
    """Count the valid targets of each head: (B, T, n) int64 -> (n,) int64."""
    return (targets_BTn != IGNORE).sum((0, 1))


def draft_targets(inputs: StepInputs, d2t: Tensor | None) -> StepInputs:
    """Give the targets of heads 2..n as draft ids, `IGNORE` for tokens outside the draft vocabulary (None: all)."""
    if d2t is None:
        return inputs
    first, others = inputs.targets[..., :1], inputs.targets[..., 1:]
    return replace(inputs, targets=torch.cat([first, draft_ids(others, d2t, IGNORE)], -1))


def mask_untaught(inputs: StepInputs, offsets: Sequence[int]) -> StepInputs:
    """Set to `IGNORE` the targets of positions at which a head has no teacher: see `Teacher.ahead`."""
    T = inputs.length
    taught = inputs.targets.clone()
    for i, offset in enumerate(offsets):
        taught[:, max(0, T - offset + 1) :, i] = IGNORE
    return replace(inputs, targets=taught)
