"""Decide the split of each document, and which documents are left out.

Documents of equal content share a side, because their place in [0, 1) is a hash of their content. There are three
exceptions. An empty split of a small corpus takes the documents nearest to it. A document for training that equals a
held-out one is left out, because a source that is held out whole may have a copy in another source. With `deduplicate`,
all exact and near duplicates are left out, preferably those in training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from headstart.data.prepare.duplicates import copies, near_copies
from headstart.data.prepare.encode import RECORD, SPLITS, Summary
from headstart.data.prepare.write import Segment
from headstart.errors import UsageError

TRAIN, VALIDATION = range(2)
"""Indices of SPLITS."""


@dataclass
class Duplicates:
    """Counts of duplicates. All documents made from one conversation count as one."""

    exact: int = 0  # equal to an earlier one; held-out documents come before those for training
    near: int = 0  # nearly equal to an earlier one
    near_held_out: int = 0  # for training, and nearly equal to a held-out one
    left_out: int = 0

    def lines(self, deduplicated: bool) -> list[str]:
        """Return the lines to report: none if there are no duplicates."""
        found = []
        if self.exact or self.near:
            found.append(
                f"{self.exact:,} exact and {self.near:,} near duplicates "
                + ("are left out" if deduplicated else "(--deduplicate leaves them out)")
            )
        if self.near_held_out and not deduplicated:
            found.append(f"{self.near_held_out:,} documents for training nearly equal one for validation")
        if self.left_out and not deduplicated:
            found.append(f"{self.left_out:,} documents for training equal one for validation and are left out")
        return found


@dataclass
class Splits:
    """The segments of each split, and the duplicates found."""

    segments: dict[str, list[Segment]]
    duplicates: Duplicates = field(default_factory=Duplicates)


def split_documents(
    folders: list[Path], summaries: list[Summary], validation_fraction: float, deduplicate: bool = False
) -> Splits:
    """Return the segments of each split, in the order of the units.

    Raises UsageError if nothing is left to train on.
    """
    files = [(unit, split) for unit in range(len(folders)) for split in range(len(SPLITS))]
    tables = [np.fromfile(folders[unit] / f"{SPLITS[split]}.documents", dtype=RECORD) for unit, split in files]
    table = np.concatenate(tables)
    side = np.concatenate([np.full(len(each), split, dtype=np.int8) for each, (_, split) in zip(tables, files)])
    fixed = np.concatenate([np.full(len(each), summaries[unit].held_out) for each, (unit, _) in zip(tables, files)])
    _fill_empty(side, table["place"], fixed, validation_fraction)
    kept, duplicates = _without_copies(table, side, deduplicate)
    if not (kept & (side == TRAIN)).any():
        raise UsageError(
            "every document for training equals one for validation; hold out other sources, or name more to train on"
        )
    segments: dict[str, list[Segment]] = {split: [] for split in SPLITS}
    begin = 0
    for (unit, origin), each in zip(files, tables):
        rows = slice(begin, begin + len(each))
        for number, split in enumerate(SPLITS):
            taken = kept[rows] & (side[rows] == number)
            segments[split] += _runs(each, taken, summaries[unit].source, folders[unit], SPLITS[origin])
        begin += len(each)
    return Splits(segments, duplicates)


def _fill_empty(side: np.ndarray, place: np.ndarray, fixed: np.ndarray, validation_fraction: float) -> None:
    """Move the nearest documents to an empty split; validation takes some only if two documents differ."""
    free = place[~fixed]
    if not len(free):
        return
    if not (side == TRAIN).any():
        side[~fixed & (place == free.max())] = TRAIN
    elif not (side == VALIDATION).any() and validation_fraction > 0 and free.min() != free.max():
        side[~fixed & (place == free.min())] = VALIDATION


def _without_copies(table: np.ndarray, side: np.ndarray, deduplicate: bool) -> tuple[np.ndarray, Duplicates]:
    """Return which documents are kept, (D,) bool, and the counts."""
    # A conversation may give several documents, which are kept or left out together.
    whole = np.cumsum(table["first"]) - 1
    first = np.flatnonzero(table["first"])
    held_out_first = first[np.argsort(side[first] == TRAIN, kind="stable")]
    digests, train = table["digest"][held_out_first], side[held_out_first] == TRAIN
    exact = copies(digests)
    near = near_copies(table["keys"][held_out_first]) & ~exact
    leaked = train & np.isin(digests, digests[~train])
    dropped = exact | near if deduplicate else leaked
    counts = Duplicates(int(exact.sum()), int(near.sum()), left_out=int(dropped.sum()))
    if not deduplicate:
        keys = table["keys"][held_out_first]
        shared = np.stack([np.isin(column, column[~train]) & (column != 0) for column in keys.T], axis=1).any(axis=1)
        counts.near_held_out = int((train & shared & ~leaked).sum())
    kept = np.ones(len(first), dtype=bool)
    kept[np.searchsorted(first, held_out_first[dropped])] = False
    return kept[whole], counts


def _runs(table: np.ndarray, taken: np.ndarray, source: str, folder: Path, split: str) -> list[Segment]:
    """Return the segments of neighbouring documents that are taken from one file of a unit."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], taken, [False]]).astype(np.int8)))
    tokens = np.concatenate([[0], np.cumsum(table["tokens"])])
    size = np.concatenate([[0], np.cumsum(table["bytes"])])
    return [
        Segment(
            source, folder, split,
            int(tokens[end] - tokens[begin]), int(end - begin), int(size[end] - size[begin]),
            int(tokens[begin]), int(begin),
        )
        for begin, end in edges.reshape(-1, 2)
    ]  # fmt: skip
