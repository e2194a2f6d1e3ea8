"""Read the documents of a file of any format, piece by piece and never a whole collection at once.

The name decides the format: `.jsonl`, also compressed as `.gz` or `.zst` (then `.json` means the same, as in C4 and
Dolma), or `.parquet`; any other file is one document of plain text. Line numbers begin at 1, row numbers at 0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from headstart.data.conversations import MESSAGES, SHAREGPT, Conversation, parse_conversation
from headstart.data.lines import Damaged, format_of, parse_json, unzip, unzstd
from headstart.data.prepare.corpora import SourceFile
from headstart.errors import UsageError, first_line, needs_extra

PARQUET_ROWS = 1024
TEXT = "text"
EMPTY, NULL, NOT_TEXT, UNREADABLE = "empty", "null", "not UTF-8 text", "unreadable"
NO_CONVERSATION, NO_ANSWER = "not conversations", "without an answer"
NO_PROBLEM, NO_PROGRAM = "not problems", "without a program in Python"

PYTHON = (1, 3, "PYTHON", "PYTHON3")
"""Names of Python 2 and 3 in CodeContests."""
REWARDS = {"correct": "solutions", "incorrect": "incorrect_solutions"}
"""Annotations of programs in CodeContests, and the column of each."""
PROBLEM = "description"


@dataclass(frozen=True)
class Document:
    """A text that is not empty and has a UTF-8 form. It decides its split, unless several documents share one."""

    name: str
    text: str
    bytes: int  # of the text in UTF-8
    read: int  # bytes that it takes in the file, for progress
    conversation: Conversation | None = None  # `text` then holds the messages without roles
    shared: str | None = None  # text that decides the split of several documents, such as the problem of programs


@dataclass(frozen=True)
class Skipped:
    """A file or row without a document, and the reason: one of those above."""

    reason: str
    read: int


@dataclass(frozen=True)
class Field:
    """The part of a row to read: a text, a conversation with its tools, or the rewarded programs of a problem.

    The name may be dotted: "a.b" is field `b` of the object in field `a`. Conversations in "messages" are also found in
    "conversations", ShareGPT's field.
    """

    name: str = "text"
    conversations: bool = False
    rewards: bool = False
    or_text: bool = False
    """Take the field "text" of rows without a conversation."""

    def columns(self, available: list[str]) -> list[str] | None:
        """Return those of a table's columns `available` that hold the field; None without such a column."""
        if self.rewards:
            return (
                [each for each in (PROBLEM, *REWARDS.values()) if each in available] if PROBLEM in available else None
            )
        name = self._name_in(available)
        if self.or_text and name not in available:
            return replace(self, name=TEXT, conversations=False).columns(available)
        column = name if name in available else name.split(".")[0]
        if column not in available:
            return None
        return [column, "tools"] if self.conversations and "tools" in available else [column]

    def documents(self, record: Any, name: str, place: str, read: int) -> Iterator[Document | Skipped]:
        """Yield the document of a row, or the reason to skip it: null, or a conversation without an answer.

        With rewards there is one document for each program. They share the problem, so that no problem is in two
        splits. Raises UsageError, naming `place`, if the field is missing or holds something else.
        """
        if not isinstance(record, dict):
            raise UsageError(f'{place}: not an object with fields; it must be one, such as {{"{self.name}": "..."}}')
        if not self.rewards:
            yield self._document(record, name, place, read)
            return
        none = True
        for text in rewarded_programs(record, place):
            yield _text(text, name, read if none else 0, shared=record[PROBLEM])
            none = False
        if none:
            yield Skipped(NO_PROGRAM, read)

    def _document(self, record: dict[str, Any], name: str, place: str, read: int) -> Document | Skipped:
        field = self._name_in(record)
        if self.or_text and self.conversations and record.get(field) is None:
            return replace(self, name=TEXT, conversations=False)._document(record, name, place, read)
        value: Any = record
        for part in [field] if field in record else field.split("."):
            if value is None:
                break  # in {"a": null}, a.b is null too
            if not isinstance(value, dict) or part not in value:
                raise _no_field(place, field, _fields(record))
            value = value[part]
        if value is None:
            return Skipped(NULL, read)
        conversation = None
        if self.conversations:
            conversation = parse_conversation(value, record.get("tools"), f'{place}: field "{field}"')
            if not conversation.answered:
                return Skipped(NO_ANSWER if conversation.messages else EMPTY, read)
            value = conversation.text
        elif not isinstance(value, str):
            other = "conversations with --conversations, " if isinstance(value, list) else ""
            raise UsageError(
                f'{place}: field "{field}" holds {type(value).__name__}, not text (headstart prepare takes '
                f"{other}another field with --text-field)"
            )
        return _text(value, name, read, conversation)

    def _name_in(self, available: Collection[str]) -> str:
        other = self.conversations and self.name == MESSAGES and MESSAGES not in available and SHAREGPT in available
        return SHAREGPT if other else self.name


def rewarded_programs(row: Mapping[str, Any], place: str) -> Iterator[str]:
    """Yield a text for each Python program of a row of CodeContests (paper, section 3.6 and appendix F).

    The text is the problem, a line that says whether the program solves it, and the program. The task codecontests of
    `headstart evaluate` asks for a program in this form with `--code.rewarded`. The paper does not give its
    annotation; ours is the line `# correct` or `# incorrect`. Raises UsageError, naming `place`, if the row is not in
    the form of CodeContests.
    """
    if not isinstance(row.get(PROBLEM), str):
        raise UsageError(f'{place}: no text in field "{PROBLEM}"; --rewards takes problems in the form of CodeContests')
    for reward, column in REWARDS.items():
        programs = row.get(column) or {"language": [], "solution": []}
        try:
            pairs = list(zip(programs["language"], programs["solution"], strict=True))
        except (KeyError, TypeError, ValueError):
            raise UsageError(
                f'{place}: field "{column}" is not in the form of CodeContests, '
                '{"language": [3], "solution": ["print(1)"]}; correct it'
            ) from None
        prompt = rewarded_prompt(row, reward)
        yield from (f"{prompt}{str(program).strip()}\n" for language, program in pairs if language in PYTHON)


def rewarded_prompt(row: Mapping[str, Any], reward: str = "correct") -> str:
    """Return the text before a program; evaluation asks the model for a correct one."""
    return f"{plain_prompt(row)}# {reward}\n"


def plain_prompt(row: Mapping[str, Any]) -> str:
    """Return the problem as a docstring. Raises KeyError if `row` has none."""
    return f'"""\n{str(row[PROBLEM]).strip()}\n"""\n'


def _text(
    text: str, name: str, read: int, conversation: Conversation | None = None, shared: str | None = None
) -> Document | Skipped:
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:  # "\ud800" is JSON, and no text
        return Skipped(NOT_TEXT, read)
    return Document(name, text, size, read, conversation, shared) if size else Skipped(EMPTY, read)


def read_text(file: SourceFile) -> Document | Skipped:
    """Read a plain text file as one document. Line ends stay as they are; a file with a NUL is not text."""
    try:
        content = file.path.read_bytes()
    except OSError:
        return Skipped(UNREADABLE, file.size)
    if not content:
        return Skipped(EMPTY, file.size)
    try:
        text = None if b"\0" in content else content.decode("utf-8")
    except UnicodeDecodeError:
        text = None
    return Skipped(NOT_TEXT, file.size) if text is None else Document(file.name, text, len(content), file.size)


def read_lines(file: SourceFile, field: Field, begin: int, end: int, line: int) -> Iterator[Document | Skipped]:
    """Yield the documents of a .jsonl file from byte `begin`, the start of line `line`, to byte `end`."""
    try:
        with file.path.open("rb") as content:
            content.seek(begin)
            while begin < end and (raw := content.readline()):
                begin += len(raw)
                yield from _parse_line(raw, file, field, line, len(raw))
                line += 1
    except OSError as error:
        raise _unreadable(file, error) from error


def read_compressed_lines(file: SourceFile, field: Field) -> Iterator[Document | Skipped]:
    """Yield the documents of a .jsonl.gz or .jsonl.zst file. Raise UsageError if it is cut short or damaged."""
    line, rest, before = 1, b"", 0
    try:
        with file.path.open("rb") as content:
            blocks = unzip(content) if format_of(file.name).endswith("gz") else unzstd(content)
            for block in blocks:
                *lines, rest = (rest + block).split(b"\n")
                for raw in lines:
                    # The bytes read count for the first line of a block, which is precise enough for progress.
                    yield from _parse_line(raw, file, field, line, content.tell() - before)
                    before = content.tell()
                    line += 1
            yield from _parse_line(rest, file, field, line, 0)
    except OSError as error:
        raise _unreadable(file, error) from error
    except Damaged as error:
        raise UsageError(f"{file.path}: damaged from line {line} on ({error}); fetch the file again") from error


def open_parquet(file: SourceFile) -> Any:
    """Return a `pyarrow.parquet.ParquetFile`. Raise UsageError if pyarrow is missing or the file is damaged."""
    with needs_extra(f"{file.path}: reading Parquet", "data"):
        import pyarrow
        from pyarrow import parquet
    try:
        return parquet.ParquetFile(file.path)
    except pyarrow.ArrowInvalid as error:
        raise UsageError(f"{file.path}: not a whole Parquet file ({first_line(error)}); fetch it again") from error
    except OSError as error:
        raise _unreadable(file, error) from error


def read_rows(file: SourceFile, field: Field, groups: range, row: int, size: int) -> Iterator[Document | Skipped]:
    """Yield the documents of some row groups, `size` bytes, of a Parquet file; the first row is number `row`."""
    import pyarrow

    content = open_parquet(file)
    available = content.schema_arrow.names
    columns = field.columns(available)
    if columns is None:
        raise _no_field(str(file.path), field.name, available)
    rows = sum(content.metadata.row_group(group).num_rows for group in groups)
    try:
        for batch in content.iter_batches(PARQUET_ROWS, row_groups=list(groups), columns=columns):
            for record in batch.to_pylist():
                yield from field.documents(record, f"{file.name}:{row}", f"{file.path}, row {row}", size // rows)
                row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{file.path}: damaged from row {row} on ({first_line(error)}); fetch it again") from error


def _parse_line(raw: bytes, file: SourceFile, field: Field, line: int, read: int) -> Iterator[Document | Skipped]:
    if raw.isspace() or not raw:
        return
    place = f"{file.path}, line {line}"
    try:
        record = parse_json(raw)
    except ValueError as error:
        raise UsageError(f"{place}: not JSON ({error}); correct the line or remove it") from error
    yield from field.documents(record, f"{file.name}:{line}", place, read)


def _fields(record: dict[str, Any]) -> list[str]:
    """Return the names of all fields, dotted for those in objects."""
    inner = [(key, _fields(value) if isinstance(value, dict) else []) for key, value in record.items()]
    return [name for key, below in inner for name in ([f"{key}.{each}" for each in below] or [key])]


def _no_field(place: str, field: str, available: list[str]) -> UsageError:
    fields = ", ".join(available[:20]) or "it has none"
    return UsageError(f'{place}: no field "{field}"; name one with headstart prepare --text-field: {fields}')


def _unreadable(file: SourceFile, error: OSError) -> UsageError:
    return UsageError(f"{file.path}: cannot be read ({error.strerror or error}); allow reading it")
