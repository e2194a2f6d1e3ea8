"""Encode the documents of a unit of work into a folder of files, from which shards are packed later.

The folder holds, for each split, `SPLIT.bin` (little-endian ids), `SPLIT.documents` (a RECORD of each document) and,
for conversations, `SPLIT.targets` (one byte per token: 1 if the assistant wrote it). It also holds `names.json` (the
names of the documents, by split) and `unit.json` (a `Summary`). It appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from headstart.data.chat_template import ChatTemplate, encode_conversation
from headstart.data.prepare.documents import Document, Skipped
from headstart.data.prepare.duplicates import KEYS, digest_of, keys_of
from headstart.data.prepare.units import Selection, Unit, read
from headstart.data.prepare.workers import Advance
from headstart.data.tokenizers import ByteTokenizer, PretrainedTokenizer, Tokenizer, prompt_ids
from headstart.errors import UsageError
from headstart.fileio import regular, replacing_directory

LAYOUT = 4
"""Version of a unit's folder. Folders of other versions, left by an older Headstart, are encoded again."""

SPLITS = ("train", "validation")
ADVANCE_SECONDS = 0.2


RECORD = np.dtype(
    [
        ("tokens", "<i8"),
        ("bytes", "<i8"),  # of text in UTF-8; of answers in conversations
        ("place", "<f8"),  # see place_of
        ("first", "?"),  # whether it is the first of the documents made from one
        ("digest", "<u8"),  # see duplicates.py
        ("keys", "<u8", (KEYS,)),
    ]
)
"""The facts about a document that decide its split and whether it is kept."""


@dataclass
class Summary:
    """The result of encoding a unit."""

    key: str
    source: str
    held_out: bool = False
    documents: int = 0
    spelled: int = 0  # documents whose text spells the end token and holds its id
    skipped: dict[str, int] = field(default_factory=dict)  # number of rows or files, by reason

    @property
    def read(self) -> int:
        """Return how many documents were read, including skipped ones."""
        return self.documents + sum(self.skipped.values())


def place_of(seed: int, digest: int) -> float:
    """Return where a document lies in [0, 1), a hash of (seed, digest): held out below the validation fraction."""
    found = hashlib.sha256(f"{seed}\0{digest}".encode()).digest()
    return int.from_bytes(found[:8], "big") / 2**64


@dataclass(frozen=True)
class Encoder:
    """An encoder of units. It can be pickled and sent to worker processes."""

    tokenizer: Tokenizer
    fingerprint: str  # of the tokenizer
    selection: Selection
    validation_fraction: float
    seed: int
    dtype: str  # of numpy, such as "<u2"
    count_documents: bool  # as progress, instead of bytes read
    folder: Path  # of all units
    template: ChatTemplate | None = None  # for conversations
    literal: bool = False  # keep special tokens that a text spells as text

    def key(self, unit: Unit) -> str:
        """Return the name of the unit's folder, a hash of everything that decides its content."""
        settings = [
            LAYOUT,
            self.fingerprint,
            self.selection,
            self.validation_fraction,
            self.seed,
            self.dtype,
            self.literal,
            unit,
        ]
        return hashlib.sha256(repr(settings).encode("utf-8", errors="surrogateescape")).hexdigest()[:24]

    def finished(self, key: str) -> Summary | None:
        """Return the summary of an encoded unit; None if it is unfinished or damaged by a crash."""
        try:
            summary = Summary(**json.loads(regular(self.folder / key / "unit.json").read_text(encoding="utf-8")))
            size = sum((self.folder / key / f"{split}.documents").stat().st_size for split in SPLITS)
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return summary if summary.key == key and size == summary.documents * RECORD.itemsize else None

    def encode(self, unit: Unit, advance: Advance) -> Summary:
        """Write the folder of a unit. `advance` is called with the bytes, or the documents, read."""
        summary = Summary(self.key(unit), unit.source, unit.held_out)
        names: dict[str, list[str]] = {split: [] for split in SPLITS}
        records: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        skipped: Counter[str] = Counter()
        read_in_all = reported = 0
        clock = time.monotonic()
        with replacing_directory(self.folder / summary.key) as folder, ExitStack() as files:
            bins = {split: files.enter_context((folder / f"{split}.bin").open("wb")) for split in SPLITS}
            targets = {
                split: files.enter_context((folder / f"{split}.targets").open("wb"))
                for split in (SPLITS if self.template else ())
            }
            for document in read(unit, self.selection):
                read_in_all += 1 if self.count_documents else document.read
                if time.monotonic() - clock > ADVANCE_SECONDS:
                    advance(read_in_all - reported)
                    reported, clock = read_in_all, time.monotonic()
                if isinstance(document, Skipped):
                    skipped[document.reason] += 1
                    continue
                record = self._record(document)
                split = SPLITS[unit.held_out or bool(record["place"] < self.validation_fraction)]
                for ids, answered, size in self._encoded(document):
                    record["tokens"], record["bytes"] = len(ids), size
                    records[split].append(record.copy())
                    record["first"] = False
                    names[split].append(document.name)
                    summary.documents += 1
                    summary.spelled += answered is None and self.tokenizer.end_id in ids[:-1]
                    bins[split].write(ids.data)
                    if answered is not None:
                        targets[split].write(answered.data)
            summary.skipped = dict(skipped)
            for split in SPLITS:
                np.array(records[split], dtype=RECORD).tofile(folder / f"{split}.documents")
            _write_json(folder / "names.json", names)
            _write_json(folder / "unit.json", asdict(summary))
        advance((read_in_all if self.count_documents else unit.size) - reported)
        return summary

    def _record(self, document: Document) -> np.ndarray:
        """Return the RECORD of a document without its tokens and bytes."""
        record = np.zeros((), dtype=RECORD)
        content = document.text.encode("utf-8")
        digest = digest_of(content)
        # Programs of one problem share a side. They also share most of their text, so they have no keys.
        shared = document.shared is not None
        side = digest_of((document.shared or "").encode("utf-8")) if shared else digest
        if document.conversation is not None:  # roles and tools distinguish conversations of equal text
            digest = digest_of(document.conversation.identity)
        record["place"], record["first"], record["digest"] = place_of(self.seed, side), True, digest
        record["keys"] = 0 if shared else keys_of(content)
        return record

    def _encoded(self, document: Document) -> Iterator[tuple[np.ndarray, np.ndarray | None, int]]:
        """Yield ids, for conversations (bool) which the assistant wrote, and the bytes of text to predict."""
        if document.conversation is None:
            ids = self._ids(document.text, document.name)
            # Next to conversations, all of a text is to be predicted.
            yield ids, None if self.template is None else np.ones(len(ids), dtype=bool), document.bytes
            return
        assert self.template is not None
        each = self.selection.each_answer
        try:
            for ids, answered in encode_conversation(document.conversation, self.template, self.tokenizer, each):
                answers = self.tokenizer.decode(ids[answered].tolist())
                yield ids.astype(self.dtype), answered, len(answers.encode("utf-8"))
        except UsageError as error:
            raise UsageError(f"{document.name}: {error}") from error

    def _ids(self, text: str, name: str) -> np.ndarray:
        if type(self.tokenizer) is ByteTokenizer:  # twenty times faster than by way of a list
            content = text.encode("utf-8")
            ids = np.empty(len(content) + 1, dtype=self.dtype)
            ids[:-1] = np.frombuffer(content, dtype=np.uint8)
        else:
            try:
                if self.literal and isinstance(self.tokenizer, PretrainedTokenizer):
                    tokens = [*self.tokenizer.start_ids, *self.tokenizer.encode_literally(text)]
                else:
                    tokens = prompt_ids(self.tokenizer, text)
            except UsageError as error:
                raise UsageError(f"{name}: {error}") from error
            ids = np.empty(len(tokens) + 1, dtype=self.dtype)
            ids[:-1] = tokens
        ids[-1] = self.tokenizer.end_id
        return ids


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=True) + "\n", encoding="utf-8")
