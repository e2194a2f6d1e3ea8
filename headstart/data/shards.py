"""Token shards: a corpus as token ids on disk, split by document into training and validation.

A shards folder holds, for each split, `SPLIT.bin` (raw little-endian ids, every document closed by the end token),
`SPLIT.documents.npy` (int64, where each document starts), further `validation.names.json` (names of the held-out
documents), `tokenizer/` and `manifest.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from headstart.data.corpora import list_files, read_files
from headstart.data.tokenizers import Tokenizer
from headstart.errors import UsageError
from headstart.files import replacing_directory

FORMAT, VERSION = "headstart-shards", 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
DTYPES = {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4"}
COPY_BYTES = 1 << 24


def prepare(
    sources: Sequence[str],
    out: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    validation_fraction: float = 0.02,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Encodes the documents of `sources` (see `read_documents`) into the shards folder `out`; returns its manifest.

    A document goes to validation if a hash of (seed, its name) says so: whatever the order and the other documents.
    Only where that would leave a split empty does one document change sides (validation takes one from two documents
    on). `progress` gets (bytes done, bytes in all). `out` appears whole or not at all; an older shards folder there is
    replaced, anything else there raises UsageError.
    """
    if not 0 <= validation_fraction < 1:
        raise UsageError(f"validation_fraction {validation_fraction}: must be at least 0 and below 1, such as 0.02")
    out = Path(os.path.abspath(out))
    _check_target(out)
    sources = [sources] if isinstance(sources, str) else list(sources)
    # An older run's output below a source folder is no text to train on.
    files = [file for file in list_files(sources) if out not in Path(os.path.abspath(file.path)).parents]
    bytes_in_all = sum(file.size for file in files)
    dtype = "uint8" if tokenizer.vocab_size <= 1 << 8 else "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"

    with replacing_directory(out) as folder:
        splits = {name: _Split(folder / f"{name}.bin") for name in SPLITS}
        with splits["train"].path.open("wb") as train_bin, splits["validation"].path.open("wb") as validation_bin:
            done = 0
            for document in read_files(files, report):
                ids = tokenizer.encode(document.text)
                ids.append(tokenizer.end_id)
                place = _place(seed, document.name)
                entry = _Entry(document.name, place, len(ids), len(document.text.encode("utf-8")))
                held_out = place < validation_fraction
                splits["validation" if held_out else "train"].entries.append(entry)
                _write(validation_bin if held_out else train_bin, np.asarray(ids, dtype=DTYPES[dtype]))
                done += entry.bytes
                if progress is not None:
                    progress(min(done, bytes_in_all), bytes_in_all)
        if done == 0:
            raise UsageError(f"{', '.join(sources)}: no text outside {out}; name UTF-8 text files")
        _fill_empty_split(splits["train"], splits["validation"], validation_fraction, np.dtype(DTYPES[dtype]).itemsize)
        if not splits["validation"].entries and validation_fraction > 0 and report is not None:
            report("a single document: it is for training, and there is no validation split")
        if progress is not None:
            progress(bytes_in_all, bytes_in_all)

        for name, split in splits.items():
            lengths = np.array([entry.tokens for entry in split.entries], dtype=np.int64)
            np.save(folder / f"{name}.documents.npy", np.cumsum(lengths) - lengths)
        _write_json(folder / "validation.names.json", [entry.name for entry in splits["validation"].entries])
        tokenizer.save(folder / "tokenizer")
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "end_id": tokenizer.end_id,
            "dtype": dtype,
            "splits": {name: split.summary() for name, split in splits.items()},
            "sources": sources,
            "seed": seed,
            "validation_fraction": validation_fraction,
        }
        _write_json(folder / MANIFEST, manifest)
    return manifest


@dataclass(frozen=True, eq=False)
class TokenShards:
    """One split of a shards folder, memory-mapped.

    `tokens` (N,) uint8, uint16 or uint32; `documents` (D,) int64, where each document starts; `bytes_per_token` is the
    split's UTF-8 bytes over its tokens, so nats per token / ln 2 / bytes_per_token is bits per byte. End tokens count
    as tokens, not as bytes.
    """

    directory: Path
    split: str
    manifest: dict[str, Any]
    tokens: np.ndarray
    documents: np.ndarray
    bytes_per_token: float

    @classmethod
    def open(cls, directory: str | os.PathLike[str], split: str) -> TokenShards:
        """Opens `split` ("train" or "validation"). Raises UsageError where it is missing, empty, cut short or foreign.

        Sizes are checked, contents are not: `verify` does that.
        """
        directory = Path(directory)
        manifest = _read_manifest(directory)
        if split not in manifest["splits"]:
            raise UsageError(f'{directory}: has no split "{split}"; take one of {", ".join(manifest["splits"])}')
        try:
            summary = manifest["splits"][split]
            count, document_count, text_bytes = (int(summary[key]) for key in ("tokens", "documents", "bytes"))
            dtype = np.dtype(DTYPES[manifest["dtype"]])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{directory / MANIFEST}: damaged (no usable {error}); run prepare again") from error
        if count == 0:
            raise UsageError(
                f"{directory}: its {split} split is empty; prepare it again from two documents or more, "
                f"with validation_fraction above 0"
            )
        file = directory / f"{split}.bin"
        size = file.stat().st_size if file.is_file() else 0
        if size != count * dtype.itemsize:
            raise UsageError(
                f"{file}: has {size:,} bytes where the manifest says {count * dtype.itemsize:,}; "
                f"copy the folder again or run prepare again"
            )
        documents = _read_starts(directory / f"{split}.documents.npy", document_count, count)
        tokens = np.memmap(file, dtype=dtype, mode="r")
        return cls(directory, split, manifest, tokens, documents, text_bytes / count)

    def document(self, index: int) -> np.ndarray:
        """The tokens of document `index` (from 0), its end token included."""
        if not 0 <= index < len(self.documents):
            raise UsageError(
                f"document {index}: {self.directory} has {self.split} documents 0 to {len(self.documents) - 1}"
            )
        stop = self.documents[index + 1] if index + 1 < len(self.documents) else len(self.tokens)
        return self.tokens[self.documents[index] : stop]

    def verify(self) -> None:
        """Reads the whole split and raises UsageError unless its SHA-256 is the manifest's."""
        file = self.directory / f"{self.split}.bin"
        if _sha256(file) != self.manifest["splits"][self.split].get("sha256"):
            raise UsageError(
                f"{file}: its content is not what prepare wrote; copy the folder again or run prepare again"
            )


@dataclass(frozen=True)
class _Entry:
    name: str
    place: float  # in [0, 1), uniform
    tokens: int
    bytes: int


@dataclass
class _Split:
    path: Path
    entries: list[_Entry] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        return {
            "tokens": sum(entry.tokens for entry in self.entries),
            "documents": len(self.entries),
            "bytes": sum(entry.bytes for entry in self.entries),
            "sha256": _sha256(self.path),
        }


def _place(seed: int, name: str) -> float:
    digest = hashlib.sha256(f"{seed}\0{name}".encode("utf-8", errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _fill_empty_split(train: _Split, validation: _Split, fraction: float, item_bytes: int) -> None:
    """Small corpora: gives an empty split the document whose hash lies nearest to it."""
    if not train.entries:
        _move(validation, train, max(validation.entries, key=lambda entry: entry.place), item_bytes)
    if not validation.entries and fraction > 0 and len(train.entries) >= 2:
        _move(train, validation, min(train.entries, key=lambda entry: entry.place), item_bytes)


def _move(giver: _Split, taker: _Split, moved: _Entry, item_bytes: int) -> None:
    """Rewrites the giver's file without `moved`, which becomes the only document of the taker."""
    rest = giver.path.with_suffix(".rest")
    with giver.path.open("rb") as source, rest.open("wb") as kept, taker.path.open("wb") as given:
        for entry in giver.entries:
            _copy(source, given if entry is moved else kept, entry.tokens * item_bytes)
    os.replace(rest, giver.path)
    giver.entries = [entry for entry in giver.entries if entry is not moved]
    taker.entries = [moved]


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size > 0:
        content = source.read(min(size, COPY_BYTES))
        target.write(content)
        size -= len(content)


def _write(file: BinaryIO, ids: np.ndarray) -> None:
    file.write(ids.data)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=True) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while content := file.read(COPY_BYTES):
            digest.update(content)
    return digest.hexdigest()


def _check_target(out: Path) -> None:
    """The folder is replaced as a whole, so it must not be one that holds anything else."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out}: is a file; name a folder that is new")
    if any(out.iterdir()):
        try:
            _read_manifest(out)
        except UsageError:
            raise UsageError(f"{out}: exists and is no shards folder; name a folder that is new") from None


def _read_manifest(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such folder; write it with: headstart prepare SOURCE --out {directory}")
    file = directory / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{directory}: holds no {MANIFEST}, so it is no shards folder; name one that headstart prepare wrote"
        ) from None
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror}); allow reading it") from error
    except ValueError as error:
        raise UsageError(f"{file}: damaged (not JSON); run prepare again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UsageError(f"{file}: not a manifest of token shards; name a folder that headstart prepare wrote")
    if manifest.get("version") != VERSION:
        raise UsageError(
            f"{file}: has version {manifest.get('version')}, this Headstart reads {VERSION}; run prepare again"
        )
    if not isinstance(manifest.get("splits"), dict):
        raise UsageError(f"{file}: damaged (no splits); run prepare again")
    return manifest


def _read_starts(file: Path, documents: int, tokens: int) -> np.ndarray:
    """(D,) int64, rising from 0 and below the number of tokens."""
    try:
        starts = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{file}: missing or damaged; copy the folder again or run prepare again") from error
    whole = starts.dtype == np.int64 and starts.shape == (documents,) and documents > 0
    if not whole or starts[0] != 0 or starts[-1] >= tokens or np.any(np.diff(starts) <= 0):
        raise UsageError(f"{file}: does not fit {tokens:,} tokens; copy the folder again or run prepare again")
    return starts
