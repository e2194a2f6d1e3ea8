"""Cut sources into units of work that can be read and encoded separately, in a fixed order."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from headstart.data.conversations import MESSAGES, SHAREGPT
from headstart.data.lines import read_records
from headstart.data.prepare import documents, hub
from headstart.data.prepare.corpora import STDLIB, SourceFile, list_files
from headstart.data.prepare.documents import NO_CONVERSATION, NO_PROBLEM, PROBLEM, Document, Field, Skipped
from headstart.errors import UsageError

PROMPT = "prompt"
"""Field of rows that `headstart distill-data` answers."""
UNIT_BYTES = 1 << 24
"""Approximate size of a unit: small enough to distribute well, large enough to cost little overhead."""


@dataclass(frozen=True)
class Selection:
    """The choices for sources with fields: JSON lines, Parquet and datasets."""

    text_field: str = "text"  # dotted for a field of a field
    split: str = "train"  # of a dataset
    hf_config: str | None = None  # of a dataset
    conversations: bool = False  # the field holds messages
    each_answer: bool = False  # each answer of a conversation is a document, with its history
    rewards: bool = False  # rows are problems, and each of their programs is a document
    texts: bool = False  # with conversations: rows and files without one are documents of text

    @property
    def field(self) -> Field:
        """Return the part of a row to read."""
        default = Selection.text_field
        name = MESSAGES if self.conversations and self.text_field == default else self.text_field
        return Field(PROBLEM if self.rewards else name, self.conversations, self.rewards, self.texts)


@dataclass(frozen=True)
class Unit:
    """A piece of one source.

    `begin` and `end` are bytes in JSON lines, row groups in Parquet, and one of `hub.parts_of` in a dataset. `first` is
    the number of the first line or row.
    """

    source: str
    format: str  # of documents.format_of, or "dataset"
    files: tuple[SourceFile, ...]  # for a dataset only to notice changes
    size: int  # bytes; equal for all units of a dataset, where it is not known
    begin: int = 0
    end: int = 0
    first: int = 0
    held_out: bool = False  # all of it goes to validation


def plan(sources: Sequence[str], selection: Selection, without: Path, held_out: Sequence[str] = ()) -> list[Unit]:
    """Return the units of `sources` (see `list_files`; `hf:` names a dataset), then those of `held_out`.

    Files of `held_out`, which goes to validation, are left out of `sources`, and so is the folder `without`. Large
    files are read once, to find and count their lines. Raises UsageError if a source cannot be read.
    """
    if not sources:
        raise UsageError(f"no source given; name a file, a folder, a glob, {STDLIB}, or hf:NAME")
    # Missing sources are reported before any is read, and a held-out file is found under that source first.
    named = dict.fromkeys([*held_out, *sources])
    files = list_files([source for source in named if not hub.is_dataset(source)])
    units: list[Unit] = []
    for source in dict.fromkeys([*sources, *held_out]):
        if hub.is_dataset(source):
            found: Iterable[Unit] = _dataset_units(source, selection)
        else:
            found = _file_units([f for f in files if f.source == source and without not in f.path.absolute().parents])
        units += (replace(unit, held_out=source in held_out) for unit in found)
    if held_out and all(unit.held_out for unit in units):
        raise UsageError(f"{', '.join(held_out)}: held out for validation, which leaves nothing to train on; name more")
    return units


def read(unit: Unit, selection: Selection) -> Iterator[Document | Skipped]:
    """Yield the documents of a unit in order. Raise UsageError, naming the place, for damage or a missing field."""
    field = selection.field
    if unit.format == "dataset":
        split, config = selection.split, selection.hf_config
        yield from hub.read_part(unit.source, split, config, field, unit.begin, unit.end)
    elif unit.format == "text" and (selection.rewards or (selection.conversations and not selection.texts)):
        reason = NO_PROBLEM if selection.rewards else NO_CONVERSATION
        yield from (Skipped(reason, file.size) for file in unit.files)
    elif unit.format == "text":
        yield from map(documents.read_text, unit.files)
    elif unit.format == "jsonl":
        yield from documents.read_lines(unit.files[0], field, unit.begin, unit.end, unit.first)
    elif unit.format == "parquet":
        groups = range(unit.begin, unit.end)
        yield from documents.read_rows(unit.files[0], field, groups, unit.first, unit.size)
    else:
        yield from documents.read_compressed_lines(unit.files[0], field)


def hold_conversations(sources: Sequence[str], split: str = Selection.split) -> bool:
    """Return whether the first row of any source has messages and no text; `split` is that of datasets.

    `headstart distill-data` writes such rows. Raises UsageError if a source cannot be read.
    """
    files = list_files([source for source in sources if not hub.is_dataset(source)])
    datasets = filter(hub.is_dataset, sources)
    columns = chain(map(_columns, files), (hub.column_names(each, split, None) for each in datasets))
    return any({MESSAGES, SHAREGPT} & set(names) and documents.TEXT not in names for names in columns)


def file_of_prompts(sources: Sequence[str]) -> Path | None:
    """Return the first file whose first row has a prompt, and neither text nor messages to train on.

    Raises UsageError if a source cannot be read.
    """
    for file in list_files([source for source in sources if not hub.is_dataset(source)]):
        names = set(_columns(file))
        if PROMPT in names and not names & {documents.TEXT, MESSAGES, SHAREGPT}:
            return file.path
    return None


def _columns(file: SourceFile) -> Collection[str]:
    """Return the columns of a file of rows, the fields of its first line, or nothing for text."""
    kind = documents.format_of(file.name)
    if kind == "parquet":
        columns: list[str] = documents.open_parquet(file).schema_arrow.names
        return columns
    return () if kind == "text" else next(read_records(file.path), {}).keys()


def _dataset_units(source: str, selection: Selection) -> list[Unit]:
    folder = hub.folder_of(source)
    files = tuple(list_files([str(folder)])) if folder else ()
    parts = hub.parts_of(source, selection.split, selection.hf_config)
    return [Unit(source, "dataset", files, UNIT_BYTES, begin, end) for begin, end in parts]


def _file_units(files: list[SourceFile]) -> Iterator[Unit]:
    plain: list[SourceFile] = []
    size = 0
    for file in files:
        kind = documents.format_of(file.name)
        if plain and (kind != "text" or size + file.size > UNIT_BYTES):
            yield Unit(file.source, "text", tuple(plain), size)
            plain, size = [], 0
        if kind == "text":
            plain.append(file)
            size += file.size
        elif kind == "jsonl":
            yield from _line_units(file)
        elif kind == "parquet":
            yield from _row_units(file)
        else:
            yield Unit(file.source, kind, (file,), file.size)  # cannot be read from the middle
    if plain:
        yield Unit(plain[0].source, "text", tuple(plain), size)


def _line_units(file: SourceFile) -> Iterator[Unit]:
    """Cut after the last line end of every UNIT_BYTES, so that the cuts depend on the file alone."""
    begin, line, offset, lines = 0, 1, 0, 0
    if file.size > UNIT_BYTES:
        try:
            with file.path.open("rb") as content:
                while block := content.read(UNIT_BYTES):
                    lines += block.count(b"\n")
                    last = block.rfind(b"\n")
                    if last >= 0 and offset + last + 1 < file.size:
                        end = offset + last + 1
                        yield Unit(file.source, "jsonl", (file,), end - begin, begin, end, line)
                        begin, line = end, 1 + lines
                    offset += len(block)
        except OSError as error:
            raise UsageError(f"{file.path}: cannot be read ({error.strerror}); allow reading it") from error
    yield Unit(file.source, "jsonl", (file,), file.size - begin, begin, file.size, line)


def _row_units(file: SourceFile) -> Iterator[Unit]:
    footer = documents.open_parquet(file).metadata
    groups = [footer.row_group(group) for group in range(footer.num_row_groups)]
    whole = sum(group.total_byte_size for group in groups) or 1
    begin = row = first = size = 0
    for index, group in enumerate(groups):
        row += group.num_rows
        size += group.total_byte_size * file.size // whole  # of the file, which is smaller than its content
        if size >= UNIT_BYTES or index + 1 == len(groups):
            yield Unit(file.source, "parquet", (file,), size, begin, index + 1, first)
            begin, first, size = index + 1, row, 0
