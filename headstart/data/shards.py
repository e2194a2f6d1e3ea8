"""Read token shards: a corpus as token ids on disk, split by document into training and validation.

A shards folder holds, for each split, `SPLIT-00000.bin`, `SPLIT-00001.bin` and so on (raw little-endian ids, every
document closed by the end token; together one sequence, cut every 256 MiB) and `SPLIT.documents.npy` (int64, the start
of each document in that sequence). For conversations, `SPLIT-00000.targets` and so on say which tokens are to be
predicted (`manifest.TargetBits`). The folder also holds `validation.names.json` (names of the held-out documents),
`tokenizer/` and `manifest.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from headstart.data.manifest import DTYPES, WITH_TARGETS, TargetBits, bytes_for, faults_of_sealed, read_manifest
from headstart.data.tokenizers import TOKENIZER_FILE, Tokenizer, load_tokenizer
from headstart.errors import UsageError
from headstart.fileio import regular, sha256_of


class SplitTokens:
    """The tokens or target bits of several shards as one sequence.

    It has `len`, and slices without a step, which may cross from one shard to the next (only these copy anything).
    """

    def __init__(self, shards: Sequence[np.ndarray | TargetBits]) -> None:
        self._shards = shards
        self._begins = [0, *accumulate(len(shard) for shard in shards)]
        self.dtype = shards[0].dtype

    def __len__(self) -> int:
        return self._begins[-1]

    def __getitem__(self, where: slice) -> np.ndarray:
        begin, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError(f"step {step}: only whole runs of tokens can be taken")
        pieces = []
        number = bisect_right(self._begins, begin) - 1
        while begin < stop:
            piece = self._shards[number][begin - self._begins[number] : stop - self._begins[number]]
            pieces.append(piece)
            begin += len(piece)
            number += 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, self.dtype), *pieces])


@dataclass(frozen=True, eq=False)
class TokenShards:
    """One split of a shards folder, memory-mapped.

    Attributes:
        tokens: (N,) uint8, uint16 or uint32.
        documents: (D,) int64, where each document starts.
        bytes_per_token: UTF-8 bytes of the tokens to predict over their number, so nats per token / ln 2 /
            bytes_per_token is bits per byte. End tokens count as tokens, not as bytes.
        targets: (N,) bool, the tokens to predict; None if all are.
    """

    directory: Path
    split: str
    manifest: dict[str, Any]
    tokens: np.ndarray | SplitTokens
    documents: np.ndarray
    bytes_per_token: float
    targets: SplitTokens | None = None

    @classmethod
    def open(cls, directory: str | os.PathLike[str], split: str) -> TokenShards:
        """Open `split` ("train" or "validation"). Raise UsageError if it is missing, empty, cut short or foreign.

        Sizes are checked here, contents only by `verify`.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        if split not in manifest["splits"]:
            raise UsageError(f'{directory}: has no split "{split}"; take one of {", ".join(manifest["splits"])}')
        summary = manifest["splits"][split]
        count = int(summary["tokens"])
        if count == 0:
            raise UsageError(
                f"{directory}: its {split} split is empty; prepare it again from two documents or more, "
                f"with validation_fraction above 0"
            )
        dtype = np.dtype(DTYPES[manifest["dtype"]])
        for shard in summary["shards"]:
            _check_size(directory / shard["file"], int(shard["tokens"]) * dtype.itemsize)
        documents = read_starts(directory / summary["starts"]["file"], int(summary["documents"]), count)
        # Plain arrays over the maps: a slice of np.memmap costs ten times as much.
        maps = [np.asarray(np.memmap(directory / shard["file"], dtype, "r")) for shard in summary["shards"]]
        tokens = maps[0] if len(maps) == 1 else SplitTokens(maps)
        if manifest["version"] != WITH_TARGETS:
            return cls(directory, split, manifest, tokens, documents, int(summary["bytes"]) / count)
        targeted = sum(int(shard["targets"]["count"]) for shard in summary["shards"])
        if targeted == 0:
            raise UsageError(
                f"{directory}: no token of its {split} split is an assistant's; prepare other conversations"
            )
        bits = [_open_bits(directory, shard) for shard in summary["shards"]]
        return cls(directory, split, manifest, tokens, documents, int(summary["bytes"]) / targeted, SplitTokens(bits))

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the documents, with the start tokens that each of them begins with."""
        tokenizer = load_tokenizer(self.directory / "tokenizer")
        tokenizer.start_ids = tuple(self.manifest.get("start_ids", ()))
        return tokenizer

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of the "tokens" of all splits and of the "tokenizer".

        The first is made from the digests in the manifest; names of sources and times do not change it.
        """
        splits = {split: _identity(content) for split, content in self.manifest["splits"].items()}
        text = json.dumps([self.manifest["dtype"], splits], sort_keys=True)
        file = self.directory / "tokenizer" / TOKENIZER_FILE
        try:
            return {"tokens": hashlib.sha256(text.encode()).hexdigest(), "tokenizer": sha256_of(file)}
        except OSError as error:
            raise UsageError(
                f"{file}: cannot be read ({error.strerror}); copy the folder again or run prepare again"
            ) from error

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of document `index` (from 0), including its end token."""
        if not 0 <= index < len(self.documents):
            raise UsageError(
                f"document {index}: {self.directory} has {self.split} documents 0 to {len(self.documents) - 1}"
            )
        begin, stop = int(self.documents[index]), len(self.tokens)
        if index + 1 < len(self.documents):
            stop = int(self.documents[index + 1])
        if not 0 <= begin < stop <= len(self.tokens):
            file = self.manifest["splits"][self.split]["starts"]["file"]
            raise UsageError(
                f"{self.directory / file}: damaged at document {index}; copy it again or run prepare again"
            )
        return self.tokens[begin:stop]

    def verify(self) -> None:
        """Read the whole split and raise UsageError, naming the damaged files, unless all SHA-256 are right."""
        faults = faults_of(self.directory, self.split, self.manifest)
        if faults:
            raise UsageError("; ".join(faults))


def verify(directory: str | os.PathLike[str]) -> list[str]:
    """Read all files of a shards folder and return a line for each fault.

    Folders of an older Headstart have no digests of the tokenizer, the names and the manifest, see `manifest.sealed`.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    found = [line for split in manifest["splits"] for line in faults_of(directory, split, manifest)]
    return faults_of_sealed(directory, manifest) + found


def faults_of(directory: Path, split: str, manifest: dict[str, Any]) -> list[str]:
    """Read all files of one split and return a line for each fault."""
    found = []
    summary = manifest["splits"][split]
    item = np.dtype(DTYPES[manifest["dtype"]]).itemsize
    for entry in (
        *summary["shards"],
        *(shard["targets"] for shard in summary["shards"] if "targets" in shard),
        summary["starts"],
    ):
        file = directory / entry["file"]
        try:
            if "tokens" in entry:
                _check_size(file, int(entry["tokens"]) * item)
            if entry["sha256"] not in (None, sha256_of(file)):
                found.append(f"{file}: its content is not what prepare wrote; copy the file again or run prepare again")
        except OSError as error:
            found.append(f"{file}: cannot be read ({error.strerror}); copy the file again or run prepare again")
        except UsageError as error:
            found.append(str(error))
    return found


def _identity(content: dict[str, Any]) -> list[object]:
    """Return the numbers and digests that identify the tokens of a split of the manifest."""
    entries = [*content["shards"], content["starts"], *(x["targets"] for x in content["shards"] if "targets" in x)]
    return [content["tokens"], content["documents"], *(entry["sha256"] for entry in entries)]


def _open_bits(directory: Path, shard: dict[str, Any]) -> TargetBits:
    file, tokens = directory / shard["targets"]["file"], int(shard["tokens"])
    _check_size(file, bytes_for(tokens))
    return TargetBits(np.asarray(np.memmap(file, np.uint8, "r")), tokens)


def _check_size(file: Path, expected: int) -> None:
    if not file.is_file():
        raise UsageError(f"{file}: missing; copy it again or run prepare again")
    size = file.stat().st_size
    if size != expected:
        raise UsageError(
            f"{file}: has {size:,} bytes where the manifest says {expected:,}; copy it again or run prepare again"
        )


def read_starts(file: Path, documents: int, tokens: int) -> np.ndarray:
    """Return the starts of D documents, (D,) int64, memory-mapped: checking all of many millions would take long."""
    try:
        starts = np.asarray(np.load(regular(file), mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{file}: missing or damaged; copy it again or run prepare again") from error
    whole = starts.dtype == np.int64 and starts.shape == (documents,) and documents > 0
    if not whole or starts[0] != 0 or starts[-1] >= tokens:
        raise UsageError(f"{file}: does not fit {tokens:,} tokens; copy it again or run prepare again")
    return starts
