"""Lines of text files and JSON in them, read in one way everywhere.

Lines end with \\n or \\r\\n alone: U+2028, U+0085, form feeds and the like are characters of a line. A byte order mark
is no part of the first line. Numbers in JSON may have any number of digits.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from headstart.errors import UsageError

READ_BYTES = 1 << 18
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LONG_DIGITS = 4300
"""Python refuses to convert more digits to an int; its time grows with the square of them."""


class Damaged(Exception):
    """What a decompressor says of its input."""


def format_of(name: str) -> str:
    """ "text", "jsonl", "jsonl.gz", "jsonl.zst" or "parquet"."""
    match = re.search(r"\.(?:jsonl|json(?=\.(?:gz|zst)$))(?:\.(gz|zst))?$|\.(parquet)$", name.lower())
    if match is None:
        return "text"
    return match[2] or ("jsonl" if match[1] is None else f"jsonl.{match[1]}")


def _whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) <= LONG_DIGITS else float(digits)


def parse_json(text: str | bytes, parse_int: Callable[[str], int | float] = _whole_number) -> Any:
    """Return what JSON text says; a whole number of more than `LONG_DIGITS` digits as a float, without `parse_int`.

    Raises ValueError with one line for what is no JSON, nested too deeply, or not UTF-8.
    """
    try:
        return json.loads(text, parse_int=parse_int)
    except ValueError as error:
        raise ValueError(first_line(error)) from error
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_file_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the number, from 1, and the text of every line of a UTF-8 file that is not blank, without its line end.

    .gz and .zst files are decompressed. Raises UsageError, naming the file, where it cannot be read or is damaged.
    """
    number = 0
    try:
        with file.open("rb") as content:
            for number, raw in enumerate(_raw_lines(content, file), start=1):
                line = raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
                text = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
                if text.strip():
                    yield number, text
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}, line {number}: cannot be read as UTF-8 ({error}); save the file in UTF-8") from error
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror or error}); name a file you may read") from error
    except Damaged as error:
        raise UsageError(f"{file}: damaged after line {number} ({error}); fetch the file again") from error


def read_records(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects in a file of JSON lines. Raises UsageError, naming the line, for what is no object."""
    for number, line in read_file_lines(file):
        try:
            record = parse_json(line)
        except ValueError as error:
            raise UsageError(f"{file}, line {number}: not JSON ({error}); correct the line or take it out") from error
        if not isinstance(record, dict):
            raise UsageError(f"{file}, line {number}: not an object with fields; correct the line or take it out")
        yield record


def _raw_lines(content: BinaryIO, file: Path) -> Iterator[bytes]:
    name = file.name.lower()
    if not name.endswith((".gz", ".zst")):
        yield from content
        return
    rest = b""
    for block in unzip(content) if name.endswith(".gz") else unzstd(content):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    yield rest


def unzip(content: BinaryIO) -> Iterator[bytes]:
    """Yield the content of a gzip file in blocks. Raises Damaged."""
    yield from _decompress(content, lambda: zlib.decompressobj(wbits=31), zlib.error)


def unzstd(content: BinaryIO) -> Iterator[bytes]:
    """Yield the content of a Zstandard file in blocks. Raises Damaged, and UsageError where zstandard is missing."""
    try:
        import zstandard
    except ImportError:
        raise UsageError("reading .zst files needs zstandard; pip install 'headstart[data]'") from None
    # Not zstandard's stream reader: it takes a file that is cut short for a whole one. The window is the largest there
    # is (`zstd --long=31`); memory is only taken where a file needs it.
    engine = zstandard.ZstdDecompressor(max_window_size=2**31)
    yield from _decompress(content, engine.decompressobj, zstandard.ZstdError)


def _decompress(content: BinaryIO, start: Any, failure: type[Exception]) -> Iterator[bytes]:
    """The content of all frames, one after the other; `start` gives the decompressor of a frame."""
    engine: Any = None
    pending = b""
    while pending or (pending := content.read(READ_BYTES)):
        engine = engine or start()
        try:
            block = engine.decompress(pending)
        except failure as error:
            raise Damaged(first_line(error)) from error
        pending = b""
        if engine.eof:
            engine, pending = None, engine.unused_data.lstrip(b"\0")  # gzip allows zeros between and behind
        yield block
    if engine is not None:
        raise Damaged("cut short")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
