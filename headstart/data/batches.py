"""Batches: rows of tokens with the targets of every head, made here and nowhere else.

Row i of a split covers tokens [i*T, i*T + T + n): T positions to predict from and n tokens more, so that every head has
a target at every position. Neighbouring rows overlap by n, and no target is lost between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from headstart.data.shards import TokenShards
from headstart.errors import UsageError

IGNORE = -100  # the target of a position that has none; what torch's cross-entropy ignores by default

Array = TypeVar("Array", np.ndarray, torch.Tensor)


@dataclass
class Batch:
    """B rows of T positions, int64. `targets[..., k-1]` belongs to head k."""

    tokens: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T, n), IGNORE where head k's token lies in another document
    documents: torch.Tensor  # (B, T), counted from 0 in each row, for masks that keep attention inside a document


def targets_of(tokens: Array, documents: Array, heads: int) -> Array:
    """What each head is to predict: `targets[b, t, k-1]` is token t+k of row b, for head k in 1..n (paper, equation 2).

    `tokens` and `documents` (the document that each position lies in) are (B, T+n); the result is (B, T, n) int64, of
    their kind. Where t and t+k lie in different documents it is IGNORE; a document's end token belongs to the document.
    Raises UsageError where the shapes leave no position.
    """
    if heads < 1:
        raise UsageError(f"heads {heads}: a model has 1 head or more")
    if tokens.ndim != 2 or tokens.shape != documents.shape or tokens.shape[1] <= heads:
        raise UsageError(
            f"tokens {tuple(tokens.shape)} and documents {tuple(documents.shape)}: for {heads} heads both must be "
            f"(rows, length + {heads})"
        )
    rows, length = tokens.shape[0], tokens.shape[1] - heads
    here = documents[:, :length]
    if isinstance(tokens, torch.Tensor):
        wide = tokens.to(torch.int64)
        columns = [
            torch.where(documents[:, k : k + length] == here, wide[:, k : k + length], IGNORE)
            for k in range(1, heads + 1)
        ]
        return torch.stack(columns, dim=-1)
    targets = np.empty((rows, length, heads), dtype=np.int64)
    for k in range(1, heads + 1):
        targets[..., k - 1] = np.where(documents[:, k : k + length] == here, tokens[:, k : k + length], IGNORE)
    return targets


class BatchStream:
    """Batches without end: every epoch visits every row once, in a fresh order given by (seed, epoch) alone.

    The stream is one sequence of rows, cut into batches: it is the same sequence whatever `rows` is, and a batch may
    begin in one epoch and end in the next. With `ranks` processes, each step takes rows * ranks rows of that sequence
    and process `rank` (from 0) gets its own share; the state is the same on every process. The last, short piece of the
    split (under T + n tokens) is never visited.

    Raises UsageError where the split is shorter than one row.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        rows: int,
        length: int,
        heads: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if rows < 1:
            raise UsageError(f"rows {rows}: a batch needs 1 row or more")
        if not 0 <= rank < ranks:
            raise UsageError(f"rank {rank} of {ranks}: ranks count from 0 to {ranks - 1}")
        if seed < 0:
            raise UsageError(f"seed {seed}: must not be negative")
        self._cutter = _Cutter(shards, length, heads)
        self._rows, self._rank, self._ranks = rows, rank, ranks
        self._seed, self._shuffle = seed, shuffle
        self._epoch, self._row = 0, 0  # the next row to take
        self._order, self._order_epoch = self._order_of(0), 0

    @property
    def rows_per_epoch(self) -> int:
        return self._cutter.count

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        rows = self._take(self._rows * self._ranks)
        return self._cutter.batch(rows[self._rank * self._rows : (self._rank + 1) * self._rows])

    def state_dict(self) -> dict[str, int]:
        """Where the next batch begins: {"epoch", "row"}, both from 0, `row` within the epoch's order."""
        return {"epoch": self._epoch, "row": self._row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on exactly behind the batch after which `state` was taken. Raises UsageError where it does not fit."""
        epoch, row = state.get("epoch", -1), state.get("row", -1)
        if epoch < 0 or not 0 <= row < self._cutter.count:
            raise UsageError(
                f"data state {state}: does not fit {self._cutter.count} rows per epoch; go on with the data and the "
                f"length that the checkpoint was made with, or start a new run"
            )
        self._epoch, self._row = epoch, row

    def _take(self, count: int) -> np.ndarray:
        taken = []
        while count > 0:
            if self._order_epoch != self._epoch:
                self._order, self._order_epoch = self._order_of(self._epoch), self._epoch
            piece = self._order[self._row : self._row + count]
            taken.append(piece)
            count -= len(piece)
            self._row += len(piece)
            if self._row == self._cutter.count:
                self._epoch, self._row = self._epoch + 1, 0
        return np.concatenate(taken)

    def _order_of(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self._cutter.count)
        return np.random.default_rng([self._seed, epoch]).permutation(self._cutter.count)


def evaluation_batches(
    shards: TokenShards, *, rows: int, length: int, heads: int, limit_rows: int | None
) -> Iterator[Batch]:
    """Every row once, in order, the last batch perhaps smaller; `limit_rows` takes that many, spread evenly.

    The short piece behind the last whole row is left out. Raises UsageError, at the call, as `BatchStream`.
    """
    if rows < 1 or (limit_rows is not None and limit_rows < 1):
        raise UsageError(f"rows {rows}, limit_rows {limit_rows}: both must be 1 or more (no limit: None)")
    cutter = _Cutter(shards, length, heads)
    count = cutter.count if limit_rows is None else min(limit_rows, cutter.count)
    chosen = np.arange(count) * cutter.count // count
    return (cutter.batch(chosen[start : start + rows]) for start in range(0, count, rows))


class _Cutter:
    """Cuts rows out of a split."""

    def __init__(self, shards: TokenShards, length: int, heads: int) -> None:
        if length < 1 or heads < 1:
            raise UsageError(f"length {length}, heads {heads}: both must be 1 or more")
        self._tokens = shards.tokens
        self._starts = np.asarray(shards.documents)
        self._length, self._heads = length, heads
        self.count = (len(self._tokens) - heads) // length
        if self.count < 1:
            raise UsageError(
                f"{shards.directory}: its {shards.split} split has {len(self._tokens):,} tokens and one row needs "
                f"{length + heads:,} (length {length:,} + {heads} heads); take a shorter length or prepare more text"
            )

    def batch(self, rows: np.ndarray) -> Batch:
        """The batch of the rows with these numbers, in this order."""
        begins = rows.astype(np.int64) * self._length
        width = self._length + self._heads
        tokens = np.empty((len(rows), width), dtype=np.int64)
        for index, begin in enumerate(begins.tolist()):
            tokens[index] = self._tokens[begin : begin + width]
        documents = self._documents(begins, width)
        targets = targets_of(tokens, documents, self._heads)
        return Batch(
            torch.from_numpy(np.ascontiguousarray(tokens[:, : self._length])),
            torch.from_numpy(targets),
            torch.from_numpy(np.ascontiguousarray(documents[:, : self._length])),
        )

    def _documents(self, begins: np.ndarray, width: int) -> np.ndarray:
        """(B, width) int64: how many documents have started in the row behind its first position."""
        first = np.searchsorted(self._starts, begins, side="right")
        counts = np.searchsorted(self._starts, begins + width, side="left") - first
        row_of = np.repeat(np.arange(len(begins)), counts)
        within = np.arange(len(row_of)) - np.repeat(np.cumsum(counts) - counts, counts)
        columns = self._starts[np.repeat(first, counts) + within] - begins[row_of]
        documents = np.zeros((len(begins), width), dtype=np.int64)
        documents[row_of, columns] = 1
        return np.cumsum(documents, axis=1, out=documents)
