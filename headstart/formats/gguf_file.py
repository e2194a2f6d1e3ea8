"""A GGUF model as one object: the metadata and tensors of one file, or of all files into which it was split."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headstart.errors import UsageError, shorten
from headstart.formats.gguf_header import GgufMetadata, Header, StoredTensor, import_gguf, read_header

SPLIT = re.compile(r"(.*-)(\d{5})-of-(\d{5})(\.gguf)", re.DOTALL)
"""The name of a file of a split model."""
PIECE = 2**17
"""Numbers that are dequantized at once. Their arrays lie in the processor's cache."""


class GgufFile:
    """The metadata and tensors of a GGUF model.

    Nothing is read but the headers until a tensor or a list is used. Files are mapped into memory, so `raw` costs
    nothing. Needs the package `gguf` (the extra "gguf").
    """

    def __init__(self, path: str | Path) -> None:
        """Open a file, or all files of a split model (NAME-00001-of-00003.gguf), given any one of them.

        Raises UsageError if a file is missing, no GGUF file, cut short, damaged, or has tensors of a type that is not
        supported.
        """
        self.path = Path(path)
        self.paths = parts = _part_paths(self.path)
        self._headers = [read_header(part) for part in parts]
        for number, (part, header) in enumerate(zip(parts, self._headers)):
            _check_part(part, header, number, len(parts))
        self._where: dict[str, tuple[Header, StoredTensor]] = {}
        for part, header in zip(parts, self._headers):
            for name, tensor in header.tensors.items():
                if name in self._where:
                    raise UsageError(f"{part}: holds tensor {shorten(name)} a second time; copy all parts again")
                self._where[name] = header, tensor
        total = self.metadata.get("split.tensors.count", len(self._where)) if len(parts) > 1 else len(self._where)
        if total != len(self._where):
            raise UsageError(
                f"{self.path}: its parts hold {len(self._where)} tensors, and split.tensors.count is "
                f"{shorten(str(total))}; copy all parts again"
            )

    @property
    def metadata(self) -> GgufMetadata:
        """Return the metadata as plain values: numbers, booleans, strings, and lists of them; the first file's."""
        return self._headers[0].metadata

    @property
    def names(self) -> list[str]:
        """The names of all tensors, in the order of the files."""
        return list(self._where)

    @property
    def quantized(self) -> bool:
        """True if some tensor is stored in a quantized type."""
        return any(tensor.kind.name not in ("F32", "F16", "BF16") for _, tensor in self._where.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor in torch's order, as (rows, columns)."""
        return self._where[name][1].shape

    def type(self, name: str) -> Any:
        """Return the `gguf.GGMLQuantizationType` in which a tensor is stored."""
        return self._where[name][1].kind

    def stored_bytes(self, name: str) -> int:
        """Return the number of bytes of a tensor in the file."""
        return self._where[name][1].bytes

    def raw(self, name: str) -> NDArray[np.uint8]:
        """Return the stored blocks of a tensor, read-only: its shape, with the bytes of a row as the last size."""
        header, tensor = self._where[name]
        flat = np.frombuffer(header.data, np.uint8, tensor.bytes, tensor.begin)
        return flat.reshape(*tensor.shape[:-1], tensor.row_bytes)

    def dequantized(self, name: str) -> Tensor:
        """Return a tensor in fp32, the numbers that `gguf.dequantize` returns."""
        target = torch.empty(self.shape(name))
        self.read_into(name, target)
        return target

    def read_into(self, name: str, target: Tensor) -> None:
        """Write the fp32 numbers of a tensor into `target` (contiguous, of its shape), converted to its dtype."""
        gguf, kind = import_gguf(), self.type(name)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        flat, raw, step = target.view(-1), self.raw(name).reshape(-1), PIECE // block
        for begin in range(0, len(flat) // block, step):
            # One long row, because the package splits rows into small groups, which takes as long as the arithmetic.
            with np.errstate(invalid="ignore"):  # NaN is refused where the numbers are used
                piece = gguf.dequantize(raw[begin * block_bytes : (begin + step) * block_bytes][None], kind)[0]
            if not piece.flags.writeable:  # a view of the file, which torch does not take
                piece = piece.copy()
            flat[begin * block : (begin + step) * block].copy_(torch.from_numpy(piece))


_open: WeakValueDictionary[tuple[Path, tuple[int, ...]], GgufFile] = WeakValueDictionary()


def open_gguf(path: str | Path) -> GgufFile:
    """Return the model in a GGUF file; one that is still open, if the file has not changed. Errors are `GgufFile`'s."""
    try:
        stat = Path(path).stat()
    except OSError:
        return GgufFile(path)  # which reports what is wrong
    key = Path(path), (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    found = _open.get(key)
    if found is None:
        found = _open[key] = GgufFile(path)
    return found


def _part_paths(path: Path) -> list[Path]:
    """Return the paths of all files of a split model by the name of one, or the path itself."""
    match = SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    before, number, count, after = match.groups()
    if not 1 <= int(number) <= int(count):
        raise UsageError(f"{path}: its name says part {int(number)} of {int(count)}; give the file its first name back")
    parts = []
    for k in range(1, int(count) + 1):
        parts.append(path.with_name(f"{before}{k:05}-of-{count}{after}"))
        if not parts[-1].exists():
            raise UsageError(f"{parts[-1]}: is missing; put all {int(count)} parts of the model into one folder")
    return parts


def _check_part(path: Path, header: Header, number: int, count: int) -> None:
    """Raise UsageError unless a file says that it is part `number` (from 0) of `count`."""
    said = header.metadata.get("split.no", 0), header.metadata.get("split.count", 1) or 1
    if said != (number, count):
        raise UsageError(
            f"{path}: split.no and split.count are {shorten(str(said))}, and its name stands for {(number, count)}; "
            "give all parts their first names back, as NAME-00001-of-00002.gguf"
        )
