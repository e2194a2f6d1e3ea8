r"""Read the lines of text files, and JSON in them, in one way everywhere.

Only \n and \r\n end a line; U+2028, U+0085, form feeds and the like are characters of a line. A byte order mark is not
part of the first line. Numbers in JSON may have any number of digits.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from headstart.errors import UsageError, first_line, needs_extra

READ_BYTES = 1 << 18
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LONG_DIGITS = 4300
"""The most digits that Python converts to an int; the time grows with the square of their number."""


class Damaged(Exception):
    """Compressed input is damaged; the message is the decompressor's."""


def format_of(name: str) -> str:
    """Return the format that a file name implies: "text", "jsonl", "jsonl.gz", "jsonl.zst" or "parquet"."""
    match = re.search(r"\.(?:jsonl|json(?=\.(?:gz|zst)$))(?:\.(gz|zst))?$|\.(parquet)$", name.lower())
    if match is None:
        return "text"
    return match[2] or ("jsonl" if match[1] is None else f"jsonl.{match[1]}")


def _whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) <= LONG_DIGITS else float(digits)


def parse_json(text: str | bytes, parse_int: Callable[[str], int | float] = _whole_number) -> Any:
    """Return the value of a JSON text. Without `parse_int`, integers of more than LONG_DIGITS digits become floats.

    Raises ValueError with one line if the text is no JSON, nested too deeply, or not UTF-8.
    """
    try:
        return json.loads(text, parse_int=parse_int)
    except ValueError as error:
        raise ValueError(first_line(error)) from error
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_file_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield number (from 1) and text of every line of a UTF-8 file that is not blank, without its line end.

    .gz and .zst files are decompressed. Raises UsageError, naming the file, if it cannot be read or is damaged.
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
    """Yield the objects in a file of JSON lines. Raise UsageError, naming the line, for anything else."""
    return (record for _, record in read_placed_records(file))


def read_placed_records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place, as messages name it, and the object of each line. Raise UsageError like `read_records`."""
    for number, line in read_file_lines(file):
        place = f"{file}, line {number}"
        try:
            record = parse_json(line)
        except ValueError as error:
            raise UsageError(f"{place}: not JSON ({error}); correct the line or remove it") from error
        if not isinstance(record, dict):
            raise UsageError(f"{place}: not an object with fields; correct the line or remove it")
        yield place, record


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
    """Yield the content of a Zstandard file in blocks. Raises Damaged, and UsageError if zstandard is missing."""
    with needs_extra("reading .zst files", "data"):
        import zstandard
    # zstandard's stream reader takes a file that is cut short for a whole one. The window is the largest possible
    # (`zstd --long=31`); memory is only allocated if a file needs it.
    engine = zstandard.ZstdDecompressor(max_window_size=2**31)
    yield from _decompress(content, engine.decompressobj, zstandard.ZstdError)


def _decompress(content: BinaryIO, start: Any, failure: type[Exception]) -> Iterator[bytes]:
    """Yield the content of all frames in order; `start` returns a decompressor for one frame."""
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
            engine, pending = None, engine.unused_data.lstrip(b"\0")  # gzip allows zeros between and after frames
        yield block
    if engine is not None:
        raise Damaged("cut short")
