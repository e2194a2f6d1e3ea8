"""Safetensors files, one or several: every name, shape and dtype is checked before anything is copied."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headstart.errors import UsageError, first_line
from headstart.fileio import read_json, regular
from headstart.formats.tensor_names import Part

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
IDS = {"I64": torch.int64}
"""Dtypes of tensors that hold token ids."""
PIECE_BYTES = 2**24
"""Bytes that are read at once of a tensor that is converted, or copied to another device."""


class TensorFiles:
    """The tensors of safetensors files by name. A tensor is read when it is used."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._where: dict[str, tuple[Path, Any]] = {}
        self._begins: dict[str, int] = {}
        """The byte of its file at which each tensor begins."""
        for path in paths:
            regular(path)
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                reason = "is missing" if not path.exists() else f"is damaged or cut short ({first_line(error)})"
                raise UsageError(f"{path}: {reason}; copy the model directory again") from error
            for name, begin in _begins(path).items():
                self._where[name], self._begins[name] = (path, handle), begin

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._where)

    def path(self, name: str) -> Path:
        """Return the file of a tensor."""
        return self._where[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._where[name][1].get_slice(name).get_shape())

    def dtype(self, name: str, ids: bool = False) -> torch.dtype:
        """Return the stored dtype. Raises UsageError for one that weights do not have, or `ids`, which are int64."""
        path, handle = self._where[name]
        stored = handle.get_slice(name).get_dtype()
        if ids and stored not in IDS:
            raise UsageError(f"{path}: {name} is stored as {stored}, and token ids are I64; copy the heads again")
        if not ids and stored not in DTYPES:
            raise UsageError(
                f"{path}: {name} is stored as {stored}, which headstart does not compute with; "
                f"take the unquantised model ({', '.join(DTYPES)})"
            )
        return IDS[stored] if ids else DTYPES[stored]

    def read(self, name: str) -> Tensor:
        """Return the tensor, backed by the mapped file: copy it before the file may change."""
        return self._where[name][1].get_tensor(name)

    def read_into(self, name: str, target: Tensor) -> None:
        """Read the tensor into `target` (contiguous, of its shape), converted to its dtype.

        The mapping is not used: its pages would count as this process's memory while the file is open.
        """
        dtype, path = self.dtype(name, target.dtype == torch.int64), self._where[name][0]
        flat = target.view(-1)
        straight = flat.device.type == "cpu" and flat.dtype == dtype
        size = max(1, flat.numel() if straight else PIECE_BYTES // dtype.itemsize)
        with path.open("rb", buffering=0) as file:
            file.seek(self._begins[name])
            for piece in flat.split(size):
                read = piece if straight else torch.empty(len(piece), dtype=dtype)
                _fill(file, read, path)
                if not straight:
                    piece.copy_(read)

    def check(
        self,
        expected: Sequence[Part],
        path: Path,
        ignored: Iterable[str] = (),
        config: str = "config.json",
    ) -> None:
        """Raise UsageError unless exactly the tensors that the file `config` promises, the `expected`, are present.

        `path` names missing ones.
        """
        names = [part.name for part in expected]
        missing = [name for name in names if name not in self._where]
        if missing:
            raise UsageError(f"{path}: lacks {_some(missing)}, which {config} promises; copy the model directory again")
        unexpected = sorted(set(self._where) - set(names) - set(ignored))
        if unexpected:
            raise UsageError(
                f"{self.path(unexpected[0])}: holds {_some(unexpected)}, of which {config} says nothing; "
                f"use the {config} that was saved with it"
            )
        for part in expected:
            if self.shape(part.name) != part.shape:
                raise UsageError(
                    f"{self.path(part.name)}: {part.name} has shape {list(self.shape(part.name))}, not "
                    f"{list(part.shape)} as {config} says; use the {config} that was saved with it"
                )
            self.dtype(part.name, part.dtype is not None)


def model_files(directory: Path, name: str) -> list[Path]:
    """Return the files that hold the model: `name`, or the shards that its index lists."""
    index = directory / f"{name}.index.json"
    if (directory / name).exists() or not index.exists():
        if not (directory / name).exists() and list(directory.glob("*.bin")):
            raise UsageError(
                f"{directory}: holds weights as pickles only; save it as safetensors with transformers' save_pretrained"
            )
        return [directory / name]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise UsageError(f"{index}: has no weight_map from tensors to files; copy the model directory again")
    # An index comes from elsewhere, and may name only files of this directory.
    outside = [shard for shard in shards.values() if Path(shard).name != shard or not _can_be_a_name(shard)]
    if outside:
        raise UsageError(
            f"{index}: names {outside[0][:80]!r}, which is not a file of this directory; copy the model again"
        )
    return [directory / shard for shard in sorted(set(shards.values()))]


def _can_be_a_name(name: str) -> bool:
    """Return whether a file system takes the name: up to 255 bytes of UTF-8, which a lone surrogate has not."""
    return len(name.encode("utf-8", "surrogatepass")) <= 255 and not re.search("[\ud800-\udfff\\0]", name)


def _begins(path: Path) -> dict[str, int]:
    """Return the byte at which each tensor of a valid safetensors file begins, behind the header and its length."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: 8 + length + x["data_offsets"][0] for name, x in header.items() if name != "__metadata__"}


def _fill(file: io.RawIOBase, target: Tensor, path: Path) -> None:
    """Read as many bytes as `target` has."""
    buffer: Any = target.view(torch.uint8).numpy()
    left = memoryview(buffer)
    while left:
        count = file.readinto(left)
        if not count:
            raise UsageError(f"{path}: is damaged or cut short (it ends early); copy the model directory again")
        left = left[count:]


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
