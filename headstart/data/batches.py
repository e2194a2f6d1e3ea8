"""Cut rows of tokens out of shards and make the targets of every head, here and nowhere else.

Row i of a split covers tokens [i*T, i*T + T + n): T positions to predict from and n more tokens, so every head has a
target at every position. Neighbouring rows overlap by n tokens, so no target is lost between them.
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

SPARE = 32
"""An epoch has the same rows for every number of heads up to this one, see `_Cutter`."""
IGNORE = -100
"""The target of a position without one, which torch's cross-entropy ignores by default."""

Array = TypeVar("Array", np.ndarray, torch.Tensor)


@dataclass
class Batch:
    """B rows of T positions, int64. `targets[..., k-1]` belongs to head k."""

    tokens: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T, n), IGNORE if head k's token lies in another document or is no target
    documents: torch.Tensor  # (B, T), counted from 0 in each row, for masks that keep attention inside a document
    ahead: torch.Tensor | None = None  # (B, last offset), the tokens after each row, of any document
    places: torch.Tensor | None = None  # (B, 2), source and row number of each row, both from 0

    def read(self, ahead: int) -> torch.Tensor:
        """Return the tokens of each row and `ahead` more, (B, T + ahead), for heads that read those."""
        if not ahead:
            return self.tokens
        assert self.ahead is not None
        return torch.cat([self.tokens, self.ahead[:, :ahead]], 1)


def offsets_of(heads: int | Sequence[int]) -> tuple[int, ...]:
    """Return how far ahead each head predicts: 1..n for a number n, or the list given. Raise UsageError if empty."""
    offsets = tuple(range(1, heads + 1)) if isinstance(heads, int) else tuple(heads)
    if not offsets:
        raise UsageError(f"heads {heads}: a model has 1 head or more")
    return offsets


def targets_of(tokens: Array, documents: Array, heads: int | Sequence[int], is_target: Array | None = None) -> Array:
    """Return the targets of each head: `targets[b, t, k-1]` is token t+k of row b (paper, equation 2), (B, T, n) int64.

    The target is IGNORE if t and t+k lie in different documents. A document's end token belongs to the document. Raises
    UsageError if the shapes differ or leave no position.

    Args:
        tokens: (B, T + last offset), an array or a tensor like the result.
        documents: the document of each position, of the same shape.
        heads: n, or the offset of each head, which then replaces k above.
        is_target: bool, of the same shape: false for tokens that no head predicts, such as a user's words in a
            conversation; they are still read. None: all are targets.
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
        raise UsageError(
            f"is_target {tuple(is_target.shape)}: must have the shape of the tokens, {tuple(tokens.shape)}"
        )
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
    """An endless stream of batches from one split, or from several mixed by weight.

    The stream is one sequence of rows, cut into batches; the sequence does not depend on `rows`. With `ranks`
    processes, each step takes rows * ranks rows of the sequence and process `rank` (from 0) gets its own share. The
    state is the same on every process.

    Every source runs through its own epochs. An epoch visits every row once, in an order given by (seed, source, epoch)
    alone, and a batch may cross from one epoch into the next. The last, short piece of a split is never visited: less
    than T + n tokens, or less than T + 32 if T and the split are that long. Runs that differ only in their heads (up to
    32) thus read the same batches in the same order. `weights` decide which source gives the next row (`Turns`): after
    N rows, source i has given N * w_i / sum(w) of them, to less than one row.

    `heads` is their number, or their offsets, as in `targets_of`. Raises UsageError if a split is shorter than one row.
    """

    # More than 8 parameters: each describes the stream, and all but two have a default.
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
        """Return the number of rows in an epoch of each source."""
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
        """Return where the next batch begins, in whole numbers, all from 0.

        One source gives {"epoch", "row"}, with `row` in the epoch's order. Several give {"row", "source0", "source1",
        ...}: the rows that the mixture and each of its sources have given.
        """
        if len(self._visits) == 1:
            epoch, row = divmod(self._visits[0].given, self._cutters[0].count)
            return {"epoch": epoch, "row": row}
        given = {f"source{i}": visits.given for i, visits in enumerate(self._visits)}
        return {"row": sum(given.values())} | given

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume right after the batch at which `state` was taken. Raise UsageError if it does not fit."""
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
        """Return the numbers of the next `count` rows, (count,) int64."""
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
        # A zero at the end changes nothing for numpy: the first source has the same order as without others.
        return np.random.default_rng([self._seed, epoch, self._source]).permutation(self._count)


def evaluation_batches(
    shards: TokenShards, *, rows: int, length: int, heads: int | Sequence[int], limit_rows: int | None
) -> Iterator[Batch]:
    """Return batches of every row once, in order; the last batch may be smaller.

    With `limit_rows` only that many rows, spread evenly, are taken. The short piece at the end of the split is left out
    as in `BatchStream`. UsageError is raised at the call.
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
    """Return rows, as `_Cutter.cut` gives them, as a batch."""
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
        # The order of an epoch depends on its number of rows. If a split had one row less for 8 heads than for 1, two
        # runs would read different batches from the first step on, and their comparison would not be one of heads.
        spare = SPARE if length >= SPARE and len(self._tokens) >= length + SPARE else 0
        self.count = (len(self._tokens) - max(reach, spare)) // length
        if self.count < 1:
            raise UsageError(
                f"{shards.directory}: its {shards.split} split has {len(self._tokens):,} tokens and one row needs "
                f"{length + reach:,} (length {length:,} + {reach} ahead); take a shorter length or prepare more text"
            )

    def cut(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return tokens, documents, both (B, T+n) int64, and targets, (B, T+n) bool, of the rows with these numbers.

        The document of a position is the number of documents that start in its row after the first position. The
        targets are None if all tokens are.
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
