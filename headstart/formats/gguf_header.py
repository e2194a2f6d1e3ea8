"""The header of one GGUF file: metadata, and the name, type, shape and place of each tensor, checked before use.

`gguf.GGUFReader` makes several arrays for every string of a vocabulary, which takes 5 to 20 seconds, and trusts the
numbers in a file. This walk passes over strings in a fraction of a second and bounds every number. Types, sizes of
blocks and values of tensors are the package's.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.errors import UsageError, shorten
from headstart.fileio import regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SUPPORTED_TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)
"""The types of tensors that are read, by ggml's names."""
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The format of `struct` for each type of value that is a number."""
STRING, ARRAY = 8, 9
MOST_ENTRIES, MOST_NAME, MOST_ITEMS = 2**18, 2**16 - 1, 2**24
"""The most keys or tensors of a file, bytes of a name, and entries of a list. They lie far beyond existing models."""
MOST_DIMENSIONS = 4
COPY = "copy the file again"


def import_gguf() -> Any:
    """Return the package gguf. Raises UsageError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UsageError("gguf is not installed; install headstart[gguf]") from error
    return gguf


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file stores it."""

    kind: Any
    """`gguf.GGMLQuantizationType`."""
    shape: tuple[int, ...]
    """Shape in torch's order, as (rows, columns)."""
    begin: int
    """The first byte in the file."""
    row_bytes: int
    """Bytes of a row, which is a whole number of blocks."""

    @property
    def rows(self) -> int:
        """Return the number of rows; a vector is one row."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows

    @property
    def bytes(self) -> int:
        """Return the number of bytes."""
        return self.rows * self.row_bytes


class GgufMetadata(Mapping[str, Any]):
    """The metadata of a file as plain values. A list is read when it is used, and kept."""

    def __init__(self, data: mmap.mmap, places: dict[str, tuple[int, int]]) -> None:
        self._data, self._places = data, places
        self._values: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            kind, begin = self._places[key]
            self._values[key] = _value(self._data, kind, begin)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def length(self, key: str) -> int | None:
        """Return the number of entries of a list without reading it; None if there is no list of that name."""
        kind, begin = self._places.get(key, (None, 0))
        return struct.unpack_from("<IQ", self._data, begin)[1] if kind == ARRAY else None


@dataclass(frozen=True)
class Header:
    """The header of one file, and its content as a mapping of bytes that ends where the file ends."""

    data: mmap.mmap
    metadata: GgufMetadata
    tensors: dict[str, StoredTensor]


def read_header(path: Path) -> Header:
    """Map a GGUF file into memory and read its header.

    Raises UsageError if the file is missing, not a regular GGUF file, cut short, damaged, or holds a tensor of a type
    that is not supported.
    """
    data = _mapped(path)
    try:
        return _Walk(path, data).header()
    except struct.error as error:  # a number past the end
        raise UsageError(f"{path}: is cut short (it ends within its header); {COPY}") from error


def _mapped(path: Path) -> mmap.mmap:
    """Return the content of the file, read-only. Raises UsageError if it is no GGUF file."""
    if regular(path).is_dir():
        raise UsageError(f"{path}: is a directory; name a .gguf file")
    try:
        with path.open("rb") as file:
            begin = file.read(len(MAGIC))
            if begin != MAGIC:
                raise UsageError(
                    f"{path}: is no GGUF file (it begins with {begin!r}, not {MAGIC!r}); name a .gguf file"
                )
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file; name a .gguf file") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); name a file that you may read") from error


class _Walk:
    """A walk over the bytes of a file from the beginning."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def damaged(self, what: str) -> UsageError:
        return UsageError(f"{self.path}: is damaged ({what}); {COPY}")

    def number(self, code: str) -> int:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(code)
        return int(value)

    def count(self, what: str, most: int, size: int) -> int:
        """Return a count of things that take at least `size` bytes each."""
        count = self.number("Q")
        if count > most:
            raise self.damaged(f"it says that it holds {count:,} {what}; the most is {most:,}")
        if count * size > len(self.data) - self.at:
            raise UsageError(f"{self.path}: is cut short (it promises {count:,} {what}); {COPY}")
        return count

    def name(self, of: str) -> str:
        length = self.count(f"bytes of a {of}'s name", MOST_NAME, 1)
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"the name of a {of} is not UTF-8") from error

    def header(self) -> Header:
        self.at = len(MAGIC)
        self._check_version(self.number("I"))
        tensors = self.count("tensors", MOST_ENTRIES, 8 + 4 + 8 + 4 + 8)
        keys = self.count("keys", MOST_ENTRIES, 8 + 4 + 1)
        metadata = GgufMetadata(self.data, dict(self._keys(keys)))
        return Header(self.data, metadata, self._tensors(tensors, self._alignment(metadata)))

    def _check_version(self, version: int) -> None:
        if version % 2**16 == 0:
            raise UsageError(f"{self.path}: is a big-endian GGUF file; take the little-endian one")
        if version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            raise UsageError(
                f"{self.path}: is GGUF version {version}, and headstart reads versions {known}; "
                "convert the model again with a current llama.cpp"
            )

    def _keys(self, count: int) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield each key with the type of its value and the byte at which the value begins."""
        seen = set()
        for _ in range(count):
            key, kind = self.name("key"), self.number("I")
            if key in seen:
                raise self.damaged(f"key {shorten(key)} occurs twice")
            seen.add(key)
            begin = self.at
            self._skip(key, kind)
            yield key, (kind, begin)

    def _skip(self, key: str, kind: int) -> None:
        """Pass over a value."""
        if kind == ARRAY:
            kind, count = self.number("I"), self.count(f"entries of {shorten(key)}", MOST_ITEMS, 1)
        else:
            count = 1
        if kind in NUMBERS:
            self._pass(key, count * struct.calcsize(NUMBERS[kind]))
        elif kind == STRING:
            self._skip_strings(key, count)
        else:
            raise self.damaged(f"{shorten(key)} has a value of the unknown type {kind}")

    def _skip_strings(self, key: str, count: int) -> None:
        # A vocabulary has 250,000 strings: this loop does nothing else.
        data, at, end, length_at = self.data, self.at, len(self.data), struct.Struct("<Q").unpack_from
        for _ in range(count):
            at += 8 + length_at(data, at)[0]
            if at > end:
                break
        self._pass(key, at - self.at)

    def _pass(self, key: str, size: int) -> None:
        self.at += size
        if self.at > len(self.data):
            raise UsageError(f"{self.path}: is cut short (within the value of {shorten(key)}); {COPY}")

    def _alignment(self, metadata: Mapping[str, Any]) -> int:
        alignment = metadata.get("general.alignment", import_gguf().GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.damaged("general.alignment is not a power of two")
        return alignment

    def _tensors(self, count: int, alignment: int) -> dict[str, StoredTensor]:
        """Return the tensors by name. They lie one behind another, each at the next multiple of the alignment."""
        found: dict[str, tuple[Any, tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self.name("tensor")
            if name in found:
                raise self.damaged(f"tensor {shorten(name)} occurs twice")
            found[name] = self._tensor(shorten(name))
        begin, expected, tensors = -(-self.at // alignment) * alignment, 0, {}
        for name, (kind, shape, row_bytes, offset) in found.items():
            tensor = StoredTensor(kind, shape, begin + offset, row_bytes)
            if offset != expected:
                raise self.damaged(f"tensor {shorten(name)} begins at byte {offset:,}, not {expected:,}")
            if tensor.begin + tensor.bytes > len(self.data):
                raise UsageError(f"{self.path}: is cut short (tensor {shorten(name)} lies past its end); {COPY}")
            tensors[name] = tensor
            expected = -(-(offset + tensor.bytes) // alignment) * alignment
        return tensors

    def _tensor(self, name: str) -> tuple[Any, tuple[int, ...], int, int]:
        """Return type, shape, bytes of a row and offset of the next tensor."""
        dimensions = self.number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self.damaged(f"tensor {name} has {dimensions:,} dimensions")
        # The file has the columns first.
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        kind = self._kind(name, self.number("I"))
        block, block_bytes = import_gguf().GGML_QUANT_SIZES[kind]
        if not all(shape) or shape[-1] % block:
            raise self.damaged(f"tensor {name} of type {kind.name} has shape {list(shape)}, in blocks of {block}")
        return kind, shape, shape[-1] // block * block_bytes, self.number("Q")

    def _kind(self, name: str, number: int) -> Any:
        kinds = import_gguf().GGMLQuantizationType
        known = {int(kind): kind for kind in kinds}
        if number in known and known[number].name in SUPPORTED_TYPES:
            return known[number]
        called = known[number].name if number in known else f"number {number}"
        raise UsageError(
            f"{self.path}: tensor {name} has type {called}, which headstart does not read; "
            f"take a file of {', '.join(SUPPORTED_TYPES)}"
        )


def _value(data: mmap.mmap, kind: int, begin: int) -> Any:
    """Return the value at a byte that `_Walk` has checked.

    Bytes that are not UTF-8 become U+FFFD in a string, and lone surrogates in a list of strings: tokens keep apart.
    """
    if kind in NUMBERS:
        return struct.unpack_from(f"<{NUMBERS[kind]}", data, begin)[0]
    if kind == STRING:
        return _strings(data, 1, begin, "replace")[0]
    kind, count = struct.unpack_from("<IQ", data, begin)
    begin += struct.calcsize("<IQ")
    if kind == STRING:
        return _strings(data, count, begin, "surrogateescape")
    return list(struct.unpack_from(f"<{count}{NUMBERS[kind]}", data, begin))


def _strings(data: mmap.mmap, count: int, at: int, errors: str) -> list[str]:
    length_at, found = struct.Struct("<Q").unpack_from, []
    for _ in range(count):
        begin = at + 8
        at = begin + length_at(data, at)[0]
        found.append(data[begin:at].decode("utf-8", errors))
    return found
