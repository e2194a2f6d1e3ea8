"""Encoding: the documents of a unit of work as token ids in files of its own, from which shards are packed later.

A unit's folder holds, for each split, `SPLIT.bin` (little-endian ids), `SPLIT.lengths` (int64, tokens of each document)
and of conversations `SPLIT.targets` (a byte a token: 1 where the assistant wrote it), further `names.json` (the
held-out documents) and `unit.json` (a `Summary`). It appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from headstart.data.chat_template import ChatTemplate, encode_conversation
from headstart.data.documents import Document, Skipped
from headstart.data.tokenizers import ByteTokenizer, Tokenizer, prompt_ids
from headstart.data.units import Selection, Unit, read
from headstart.data.workers import Advance
from headstart.errors import UsageError
from headstart.files import replacing_directory

LAYOUT = 2
"""Raised whenever a unit's folder changes its content or form: what an older Headstart left is then encoded anew."""

SPLITS = ("train", "validation")
ADVANCE_SECONDS = 0.2


@dataclass(frozen=True)
class Nearest:
    """The document of a split whose hash lies nearest to the other split."""

    place: float  # in [0, 1), uniform over names
    index: int  # among the unit's documents of that split, from 0
    first_token: int  # where it starts in the unit's file of that split
    tokens: int
    bytes: int
    name: str


@dataclass
class Part:
    """What a unit gives to one split; `bytes` of text in UTF-8, in conversations of answers alone."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    nearest: Nearest | None = None


@dataclass
class Summary:
    """What came out of a unit."""

    key: str
    source: str
    splits: dict[str, Part] = field(default_factory=lambda: {split: Part() for split in SPLITS})
    skipped: dict[str, int] = field(default_factory=dict)  # how many rows or files, by reason

    @property
    def documents(self) -> int:
        return sum(part.documents for part in self.splits.values())

    @property
    def read(self) -> int:
        """Documents and what was skipped."""
        return self.documents + sum(self.skipped.values())


def place_of(seed: int, name: str) -> float:
    """Where a document lies in [0, 1): a hash of (seed, its name). Below the validation fraction it is held out."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode("utf-8", errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@dataclass(frozen=True)
class Encoder:
    """Encodes units; picklable, so that worker processes can be given one."""

    tokenizer: Tokenizer
    fingerprint: str  # of the tokenizer
    selection: Selection
    validation_fraction: float
    seed: int
    dtype: str  # of numpy, such as "<u2"
    count_documents: bool  # as progress, instead of bytes read
    folder: Path  # of all units
    template: ChatTemplate | None = None  # for conversations

    def key(self, unit: Unit) -> str:
        """The name of the unit's folder: a hash of everything that decides its content."""
        settings = [LAYOUT, self.fingerprint, self.selection, self.validation_fraction, self.seed, self.dtype, unit]
        return hashlib.sha256(repr(settings).encode("utf-8", errors="surrogateescape")).hexdigest()[:24]

    def finished(self, key: str) -> Summary | None:
        """The summary of a unit that is done; None where it is not."""
        try:
            content = json.loads((self.folder / key / "unit.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        parts = {
            split: Part(**{**part, "nearest": part["nearest"] and Nearest(**part["nearest"])})
            for split, part in content["splits"].items()
        }
        return Summary(**{**content, "splits": parts})

    def encode(self, unit: Unit, advance: Advance) -> Summary:
        """Writes the folder of a unit; `advance` is told the bytes read, or the documents."""
        summary = Summary(self.key(unit), unit.source)
        names: list[str] = []
        lengths = {split: array("q") for split in SPLITS}
        skipped: Counter[str] = Counter()
        read_in_all = told = 0
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
                    advance(read_in_all - told)
                    told, clock = read_in_all, time.monotonic()
                if isinstance(document, Skipped):
                    skipped[document.reason] += 1
                    continue
                place = place_of(self.seed, document.name)
                split = SPLITS[unit.held_out or place < self.validation_fraction]
                part = summary.splits[split]
                for ids, answered, size in self._encoded(document):
                    nearest = Nearest(place, part.documents, part.tokens, len(ids), size, document.name)
                    may_move = not unit.held_out
                    if may_move and (part.nearest is None or _nearer(split, place, part.nearest.place)):
                        part.nearest = nearest
                    part.tokens += len(ids)
                    part.documents += 1
                    part.bytes += size
                    lengths[split].append(len(ids))
                    bins[split].write(ids.data)
                    if answered is not None:
                        targets[split].write(answered.data)
                    if split == "validation":
                        names.append(document.name)
            summary.skipped = dict(skipped)
            for split in SPLITS:
                np.array(lengths[split], dtype="<i8").tofile(folder / f"{split}.lengths")
            _write_json(folder / "names.json", names)
            _write_json(folder / "unit.json", asdict(summary))
        advance((read_in_all if self.count_documents else unit.size) - told)
        return summary

    def _encoded(self, document: Document) -> Iterator[tuple[np.ndarray, np.ndarray | None, int]]:
        """Ids, of a conversation which of them the assistant wrote (bool), and the bytes of text that are predicted."""
        if document.conversation is None:
            ids = self._ids(document.text, document.name)
            # Among conversations all of a text is predicted.
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
                tokens = prompt_ids(self.tokenizer, text)
            except UsageError as error:
                raise UsageError(f"{name}: {error}") from error
            ids = np.empty(len(tokens) + 1, dtype=self.dtype)
            ids[:-1] = tokens
        ids[-1] = self.tokenizer.end_id
        return ids


def nearest_of(split: str, parts: list[Part]) -> tuple[int, Nearest] | None:
    """The nearest document of all units, and the number of its unit; the first where several are as near."""
    best: tuple[int, Nearest] | None = None
    for number, part in enumerate(parts):
        if part.nearest and (best is None or _nearer(split, part.nearest.place, best[1].place)):
            best = number, part.nearest
    return best


def _nearer(split: str, place: float, than: float) -> bool:
    # Held-out documents lie below the validation fraction, those for training above it.
    return place < than if split == "train" else place > than


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=True) + "\n", encoding="utf-8")
