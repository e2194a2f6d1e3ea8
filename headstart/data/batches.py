"""Batches: rows of tokens with the targets of every head, made here and nowhere else.

Row i of a split covers tokens [i*T, i*T + T + n): T positions to predict from and n tokens more, so that every head has
a target at every position. Neighbouring rows overlap by n, and no target is lost between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from headstart.data.mixture import Turns
from headstart.data.shards import TokenShards
from headstart.errors import UsageError

SPARE = 32  # an epoch has the same rows for every number of heads up to this: see `_Cutter`
IGNORE = -100  # the target of a position that has none; what torch's cross-entropy ignores by default

Array = TypeVar("Array", np.ndarray, torch.Tensor)


@dataclass
class Batch:
    """B rows of T positions, int64. `targets[..., k-1]` belongs to head k."""

    tokens: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T, n), IGNORE where head k's token lies in another document, or is no target
    documents: torch.Tensor  # (B, T), counted from 0 in each row, for masks that keep attention inside a document
    ahead: torch.Tensor | None = None  # (B, the last offset), the tokens behind each row, whatever their document
    places: torch.Tensor | None = None  # (B, 2), the source and the row in it that each row is, both from 0

    def read(self, ahead: int) -> torch.Tensor:
        """The tokens that a model reads whose heads read `ahead` tokens behind a row: (B, T + ahead)."""
        if not ahead:
            return self.tokens
        assert self.ahead is not None
        return torch.cat([self.tokens, self.ahead[:, :ahead]], 1)


def offsets_of(heads: int | Sequence[int]) -> tuple[int, ...]:
    """How far ahead each head predicts: n heads 1 to n, or as they are given. Raises UsageError where there is none."""
    offsets = tuple(range(1, heads + 1)) if isinstance(heads, int) else tuple(heads)
    if not offsets:
        raise UsageError(f"heads {heads}: a model has 1 head or more")
    return offsets


def targets_of(tokens: Array, documents: Array, heads: int | Sequence[int], is_target: Array | None = None) -> Array:
    """What each head is to predict: `targets[b, t, k-1]` is token t+k of row b, for head k in 1..n (paper, equation 2);
    with a list of offsets in place of n, token t + its entry k-1.

    `tokens` and `documents` (the document that each position lies in) are (B, T + the last offset); the result is
    (B, T, n) int64, of their kind. Where t and t+k lie in different documents it is IGNORE; a document's end token
    belongs to the document. `is_target`, of the shape of tokens, bool: tokens that no head is to predict, as a user's
    in a conversation, are false (None: all are predicted). They are read all the same. Raises UsageError where the
    shapes leave no position.
    """
    offsets = offsets_of(heads)
    if tokens.ndim != 2 or tokens.shape != documents.shape or tokens.shape[1] <= offsets[-1]:
        raise UsageError(
            f"tokens {tuple(tokens.shape)} and documents {tuple(documents.shape)}: for {len(offsets)} heads both must "
            f"be (rows, length + {offsets[-1]})"
        )
    rows, length = tokens.shape[0], tokens.shape[1] - offsets[-1]
    here = documents[:, :length]
    if is_target is not None and is_target.shape != tokens.shape:
        raise UsageError(f"is_target {tuple(is_target.shape)}: must be as the tokens, {tuple(tokens.shape)}")
    if isinstance(tokens, torch.Tensor):
        wide = tokens.to(torch.int64)
        if is_target is not None:
            wide = torch.where(is_target, wide, IGNORE)
        columns = [torch.where(documents[:, k : k + length] == here, wide[:, k : k + length], IGNORE) for k in offsets]
        return torch.stack(columns, dim=-1)
    if is_target is not None:
        tokens = np.where(is_target, tokens.astype(np.int64), IGNORE)
    targets = np.empty((rows, length, len(offsets)), dtype=np.int64)
    for i, k in enumerate(offsets):
        targets[..., i] = np.where(documents[:, k : k + length] == here, tokens[:, k : k + length], IGNORE)
    return targets


class BatchStream:
    """Batches without end, from one split or from several mixed by weight.

    The stream is one sequence of rows, cut into batches: it is the same sequence whatever `rows` is. With `ranks`
    processes, each step takes rows * ranks rows of that sequence and process `rank` (from 0) gets its own share; the
    state is the same on every process.

    Every source runs through epochs of its own: each visits every row once, in a fresh order given by (seed, source,
    epoch) alone, and a batch may begin in one epoch and end in the next. The last, short piece of a split is never
    visited: under T + n tokens, and under T + 32 where T and the split are that long, so that runs that differ in
    nothing but heads (up to 32) read the same batches in the same order. `weights` say whose row comes next (`Turns`):
    after N rows, source i has given its share, N * w_i / sum(w) rows of T tokens, to less than one row, so it has been
    read N * w_i / sum(w) / `rows_of[i]` times.

    `heads` is how many there are, or how far ahead each predicts, as in `targets_of`.

    Raises UsageError where a split is shorter than one row.
    """

    def __init__(
        self,
        shards: TokenShards | Sequence[TokenShards],
        *,
        rows: int,
        length: int,
        heads: int | Sequence[int],
        seed: int,
        weights: Sequence[float] | None = None,
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
        sources = [shards] if isinstance(shards, TokenShards) else list(shards)
        weights = [1.0] * len(sources) if weights is None else weights
        if not sources or len(weights) != len(sources):
            raise UsageError(f"{len(sources)} sources and {len(weights)} weights: both must be at least 1, and equal")
        self._offsets = offsets_of(heads)
        self._cutters = [_Cutter(source, length, self._offsets[-1]) for source in sources]
        self._visits = [_Visits(cutter.count, seed, i, shuffle) for i, cutter in enumerate(self._cutters)]
        self._turns = Turns(weights)
        self._rows, self._rank, self._ranks = rows, rank, ranks

    @property
    def rows_of(self) -> list[int]:
        """How many rows an epoch of each source has."""
        return [cutter.count for cutter in self._cutters]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        count, mine = self._rows * self._ranks, slice(self._rank * self._rows, (self._rank + 1) * self._rows)
        if len(self._visits) == 1:
            numbers = self._visits[0].take(count)[mine]
            return _batch(*self._cutters[0].cut(numbers), self._offsets, np.stack([np.zeros_like(numbers), numbers], 1))
        turns = np.array(self._turns.take([visits.given for visits in self._visits], count))
        tokens, documents = np.empty((2, self._rows, self._cutters[0].width), dtype=np.int64)
        is_target, places = None, np.empty((self._rows, 2), dtype=np.int64)
        if any(cutter.masked for cutter in self._cutters):
            is_target = np.empty((self._rows, self._cutters[0].width), dtype=bool)
        for source, (visits, cutter) in enumerate(zip(self._visits, self._cutters)):
            # Every process counts all rows of the step, and reads its own.
            numbers = np.empty(count, dtype=np.int64)
            numbers[turns == source] = visits.take(int((turns == source).sum()))
            here = turns[mine] == source
            places[here, 0], places[here, 1] = source, numbers[mine][here]
            tokens[here], documents[here], targets = cutter.cut(numbers[mine][here])
            if is_target is not None:
                is_target[here] = True if targets is None else targets
        return _batch(tokens, documents, is_target, self._offsets, places)

    def state_dict(self) -> dict[str, int]:
        """Where the next batch begins, in whole numbers, all from 0.

        One source: {"epoch", "row"}, `row` within the epoch's order. Several: {"row", "source0", "source1", ...}, the
        rows that the mixture and each of its sources have given.
        """
        if len(self._visits) == 1:
            epoch, row = divmod(self._visits[0].given, self._cutters[0].count)
            return {"epoch": epoch, "row": row}
        given = {f"source{i}": visits.given for i, visits in enumerate(self._visits)}
        return {"row": sum(given.values())} | given

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on exactly behind the batch after which `state` was taken. Raises UsageError where it does not fit."""
        if len(self._visits) == 1:
            epoch, row = state.get("epoch", -1), state.get("row", -1)
            fits = epoch >= 0 and 0 <= row < self._cutters[0].count
            given = [epoch * self._cutters[0].count + row]
        else:
            given = [state.get(f"source{i}", -1) for i in range(len(self._visits))]
            fits = state == {"row": sum(given)} | {f"source{i}": rows for i, rows in enumerate(given)}
            fits = fits and self._turns.fits(given)
        if not fits:
            counts = " + ".join(map(str, self.rows_of))
            raise UsageError(
                f"data state {state}: does not fit {counts} rows per epoch; resume with the data, the weights and the "
                f"length that the checkpoint was made with, or start a new run"
            )
        for visits, rows in zip(self._visits, given):
            visits.given = rows


class _Visits:
    """The rows of one source in the order in which they are visited, epoch after epoch."""

    def __init__(self, count: int, seed: int, source: int, shuffle: bool) -> None:
        self.given = 0
        self._count, self._seed, self._source, self._shuffle = count, seed, source, shuffle
        self._order, self._order_epoch = self._order_of(0), 0

    def take(self, count: int) -> np.ndarray:
        """The numbers of the next `count` rows, (count,) int64."""
        taken = []
        while count > 0:
            epoch, row = divmod(self.given, self._count)
            if self._order_epoch != epoch:
                self._order, self._order_epoch = self._order_of(epoch), epoch
            piece = self._order[row : row + count]
            taken.append(piece)
            count -= len(piece)
            self.given += len(piece)
        return np.concatenate(taken) if taken else np.empty(0, dtype=np.int64)

    def _order_of(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self._count)
        # A zero at the end changes nothing for numpy: the first source has the order that it has alone.
        return np.random.default_rng([self._seed, epoch, self._source]).permutation(self._count)


def evaluation_batches(
    shards: TokenShards, *, rows: int, length: int, heads: int | Sequence[int], limit_rows: int | None
) -> Iterator[Batch]:
    """Every row once, in order, the last batch perhaps smaller; `limit_rows` takes that many, spread evenly.

    The short piece at the end that `BatchStream` never visits is left out. Raises UsageError, at the call, as it does.
    """
    if rows < 1 or (limit_rows is not None and limit_rows < 1):
        raise UsageError(f"rows {rows}, limit_rows {limit_rows}: both must be 1 or more (no limit: None)")
    offsets = offsets_of(heads)
    cutter = _Cutter(shards, length, offsets[-1])
    count = cutter.count if limit_rows is None else min(limit_rows, cutter.count)
    chosen = np.arange(count) * cutter.count // count
    places = np.stack([np.zeros_like(chosen), chosen], 1)
    pieces = (slice(start, start + rows) for start in range(0, count, rows))
    return (_batch(*cutter.cut(chosen[piece]), offsets, places[piece]) for piece in pieces)


def _batch(
    tokens: np.ndarray,
    documents: np.ndarray,
    is_target: np.ndarray | None,
    offsets: Sequence[int],
    places: np.ndarray | None = None,
) -> Batch:
    """The batch of rows that a cutter cut."""
    targets, length = targets_of(tokens, documents, offsets, is_target), tokens.shape[1] - offsets[-1]
    return Batch(
        torch.from_numpy(np.ascontiguousarray(tokens[:, :length])),
        torch.from_numpy(targets),
        torch.from_numpy(np.ascontiguousarray(documents[:, :length])),
        torch.from_numpy(np.ascontiguousarray(tokens[:, length:])),
        None if places is None else torch.from_numpy(places),
    )


class _Cutter:
    """Cuts rows out of a split."""

    def __init__(self, shards: TokenShards, length: int, reach: int) -> None:
        if length < 1:
            raise UsageError(f"length {length}: must be 1 or more")
        self._tokens, self._targets = shards.tokens, shards.targets
        self.masked = shards.targets is not None
        self._starts = np.asarray(shards.documents)
        self._length, self.width = length, length + reach
        # The order of an epoch depends on how many rows it has. Had a split one row less for 8 heads than for 1, the
        # two runs would read other batches from the first step on, and their comparison would not be one of heads.
        spare = SPARE if length >= SPARE and len(self._tokens) >= length + SPARE else 0
        self.count = (len(self._tokens) - max(reach, spare)) // length
        if self.count < 1:
            raise UsageError(
                f"{shards.directory}: its {shards.split} split has {len(self._tokens):,} tokens and one row needs "
                f"{length + reach:,} (length {length:,} + {reach} ahead); take a shorter length or prepare more text"
            )

    def cut(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Tokens and documents, (B, T+n) int64, of the rows with these numbers, in this order; and (B, T+n) bool which
        tokens are targets, or None where all are.

        The document of a position is how many documents have started in its row behind the first position.
        """
        begins = numbers * self._length
        tokens = np.empty((len(begins), self.width), dtype=np.int64)
        for row, begin in enumerate(begins.tolist()):
            tokens[row] = self._tokens[begin : begin + self.width]
        first = np.searchsorted(self._starts, begins, side="right")
        counts = np.searchsorted(self._starts, begins + self.width, side="left") - first
        row_of = np.repeat(np.arange(len(begins)), counts)
        within = np.arange(len(row_of)) - np.repeat(np.cumsum(counts) - counts, counts)
        columns = self._starts[np.repeat(first, counts) + within] - begins[row_of]
        documents = np.zeros((len(begins), self.width), dtype=np.int64)
        documents[row_of, columns] = 1
        is_target = None
        if self._targets is not None:
            is_target = np.empty((len(begins), self.width), dtype=bool)
            for row, begin in enumerate(begins.tolist()):
                is_target[row] = self._targets[begin : begin + self.width]
        return tokens, np.cumsum(documents, axis=1, out=documents), is_target
