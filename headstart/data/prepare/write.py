"""Pack the tokens of all units, in order, into shards of bounded size."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from headstart.data.manifest import write_bits
from headstart.data.prepare.encode import RECORD
from headstart.data.prepare.workers import Advance, run_all
from headstart.errors import UsageError
from headstart.fileio import COPY_BYTES, regular, sha256_of

SHARD_BYTES = 1 << 28
"""Size of a full shard; it may end inside a document."""


@dataclass(frozen=True)
class Segment:
    """Neighbouring documents of one split of one unit."""

    source: str
    folder: Path  # of the unit
    split: str  # in the unit
    tokens: int
    documents: int
    bytes: int
    first_token: int = 0
    first_document: int = 0

    def lengths(self) -> np.ndarray:
        """Return the tokens of each document: (documents,) int64."""
        offset = RECORD.itemsize * self.first_document
        file = self.folder / f"{self.split}.documents"
        lengths: np.ndarray = np.fromfile(file, dtype=RECORD, count=self.documents, offset=offset)["tokens"]
        return lengths

    def names(self) -> list[str]:
        """Return the names of the documents."""
        return read_names(self.folder)[self.split][self.first_document : self.first_document + self.documents]


@dataclass(frozen=True)
class Shard:
    """A shard to be written: byte ranges (file, begin, end) in order."""

    path: Path
    ranges: tuple[tuple[Path, int, int], ...]
    item: int  # bytes of a token
    targets: bool  # whether each file has a .targets file next to it

    @property
    def target_path(self) -> Path:
        """Return the path of the target bits."""
        return self.path.with_suffix(".targets")


def pack(
    segments: list[Segment], split: str, folder: Path, dtype: str, workers: int, targets: bool = False
) -> dict[str, Any]:
    """Write SPLIT-00000.bin ... and SPLIT.documents.npy, and return the split's entry in the manifest.

    With `targets` a file SPLIT-00000.targets next to each shard says which of its tokens are targets.
    """
    item = np.dtype(dtype).itemsize
    shards = [
        Shard(folder / f"{split}-{number:05d}.bin", ranges, item, targets)
        for number, ranges in enumerate(_ranges(segments, item))
    ]
    written = dict(run_all(_write_shard, shards, max(1, min(workers, len(shards))), lambda _: None))
    starts = folder / f"{split}.documents.npy"
    _write_starts(starts, segments)
    sources: dict[str, dict[str, int]] = {}
    for segment in segments:
        counts = sources.setdefault(segment.source, {"tokens": 0, "documents": 0, "bytes": 0})
        for key in counts:
            counts[key] += getattr(segment, key)
    return {
        **{key: sum(counts[key] for counts in sources.values()) for key in ("tokens", "documents", "bytes")},
        "sources": sources,
        "shards": [
            {"file": shard.path.name, "tokens": shard.path.stat().st_size // item, **written[shard.path.name]}
            for shard in shards
        ],
        "starts": {"file": starts.name, "sha256": sha256_of(starts)},
    }


def write_names(path: Path, segments: list[Segment]) -> None:
    """Write a JSON list of the names of held-out documents, one per line."""
    with path.open("w", encoding="utf-8") as file:
        comma = "["
        for segment in segments:
            for name in segment.names():
                file.write(f"{comma}\n  {json.dumps(name)}")
                comma = ","
        file.write("\n]\n" if comma == "," else "[]\n")


@lru_cache(maxsize=1)
def read_names(folder: Path) -> dict[str, list[str]]:
    """Return the names of a unit's documents, by split."""
    file = folder / "names.json"
    try:
        names: dict[str, list[str]] = json.loads(regular(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: damaged; remove {folder} and run the command again") from error
    return names


def _ranges(segments: list[Segment], item: int) -> Iterator[tuple[tuple[Path, int, int], ...]]:
    """Yield the byte ranges of each shard."""
    room = SHARD_BYTES
    ranges: list[tuple[Path, int, int]] = []
    for segment in segments:
        begin, end = segment.first_token * item, (segment.first_token + segment.tokens) * item
        while begin < end:
            stop = min(end, begin + room)
            ranges.append((segment.folder / f"{segment.split}.bin", begin, stop))
            room -= stop - begin
            begin = stop
            if room == 0:
                yield tuple(ranges)
                room, ranges = SHARD_BYTES, []
    if ranges:
        yield tuple(ranges)


def _write_shard(shard: Shard, advance: Advance) -> tuple[str, dict[str, Any]]:
    """Write a shard and return its name and its other entries in the manifest."""
    digest = hashlib.sha256()
    with shard.path.open("wb") as target:
        for content in _blocks(shard.ranges):
            digest.update(content)
            target.write(content)
    entry: dict[str, Any] = {"sha256": digest.hexdigest()}
    if shard.targets:
        item = shard.item
        ranges = tuple((path.with_suffix(".targets"), begin // item, end // item) for path, begin, end in shard.ranges)
        with shard.target_path.open("wb") as target:
            count = write_bits((np.frombuffer(content, dtype=np.uint8) for content in _blocks(ranges)), target)
        name = shard.target_path.name
        entry["targets"] = {"file": name, "count": count, "sha256": sha256_of(shard.target_path)}
    return shard.path.name, entry


def _blocks(ranges: tuple[tuple[Path, int, int], ...]) -> Iterator[bytes]:
    for path, begin, end in ranges:
        with path.open("rb") as source:
            source.seek(begin)
            yield from _read(source, end - begin, path)


def _read(source: BinaryIO, size: int, path: Path) -> Iterator[bytes]:
    while size > 0:
        content = source.read(min(size, COPY_BYTES))
        if not content:
            raise UsageError(
                f"{path}: shorter than when it was written; remove {path.parent} and run the command again"
            )
        yield content
        size -= len(content)


def _write_starts(path: Path, segments: list[Segment]) -> None:
    """Write a .npy file, piece by piece: int64, where each document starts in the split."""
    shape = (sum(segment.documents for segment in segments),)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
        start = 0
        for segment in segments:
            lengths = segment.lengths()
            file.write((start + np.cumsum(lengths) - lengths).data)
            start += segment.tokens
