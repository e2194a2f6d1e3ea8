"""Hidden states of a frozen trunk on disk: heads that are trained alone read them instead of running the trunk.

    FOLDER/KEY/states.json     their origin, and the number of finished rows of each source
    FOLDER/KEY/source0.bin     rows x length x dim values of the first source, and so on

The key is a digest of everything that the states depend on, so one folder serves many runs, and a run with other
weights, text or lengths never reads them. The next process computes the rows that a killed one has not finished.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headstart.errors import UsageError
from headstart.fileio import write_text

STORED = {torch.bfloat16: np.int16, torch.float32: np.float32}
"""Types in the files. numpy has no bfloat16, so its bits are stored as int16."""
NOTE_SECONDS = 20.0
"""Seconds between notes of the number of finished rows."""


class HiddenStates:
    """Latents (rows, T, D) of every row of every source."""

    def __init__(
        self, folder: Path, origin: dict[str, Any], rows: Sequence[int], length: int, dim: int, dtype: torch.dtype
    ) -> None:
        """Describe the states.

        Args:
            folder: folder of the states of many runs.
            origin: everything that the states depend on, as plain data.
            rows: rows of each source.
            length: positions of a row.
            dim: width of a latent.
            dtype: type of the values.
        """
        content = {"made_of": origin, "rows": list(rows), "length": length, "dim": dim, "dtype": str(dtype)}
        text = json.dumps(content, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._content, self._rows, self._shape, self._dtype = content, list(rows), (length, dim), dtype
        self._maps: dict[int, np.ndarray] = {}

    @property
    def bytes(self) -> int:
        """Bytes on disk, of all sources."""
        return sum(self._rows) * self._shape[0] * self._shape[1] * self._dtype.itemsize

    def check_room(self, limit: int) -> None:
        """Raise UsageError if the states would take more than `limit` bytes, or more than the disk has left."""
        missing = sum(rows - done for rows, done in zip(self._rows, self.done()))
        needed = missing * self.bytes // max(1, sum(self._rows))
        size = f"{self.folder}: hidden states would take {self.bytes / 2**30:,.2f} GiB"
        if self.bytes > limit:
            raise UsageError(
                f"{size}, more than --cache-gib {limit / 2**30:g}; raise it, train on less text, or leave "
                "--cache-states out"
            )
        place = next(parent for parent in self.folder.parents if parent.exists())
        if missing and needed > shutil.disk_usage(place).free:
            raise UsageError(f"{size}, more than the disk has left; free some space, or leave --cache-states out")

    def done(self) -> list[int]:
        """Return the number of finished rows of each source."""
        try:
            return [int(rows) for rows in json.loads((self.folder / "states.json").read_text(encoding="utf-8"))["done"]]
        except (OSError, ValueError, KeyError, TypeError):
            return [0] * len(self._rows)

    def fill(
        self, read: Callable[[int, int, int], Tensor], at_once: int, progress: Callable[[int], None] = lambda rows: None
    ) -> None:
        """Compute the missing rows.

        Args:
            read: returns the latents (stop - first, T, D) of rows, given source, first and stop.
            at_once: rows of one call.
            progress: called with the number of rows that were added.
        """
        done = self.done()
        self.folder.mkdir(parents=True, exist_ok=True)
        noted = time.monotonic()
        for source, rows in enumerate(self._rows):
            if done[source] >= rows:
                continue
            file = self.folder / f"source{source}.bin"
            mode: Any = "r+" if file.exists() and done[source] else "w+"
            states = np.memmap(file, STORED[self._dtype], mode, shape=(rows, *self._shape))
            for first in range(done[source], rows, at_once):
                stop = min(first + at_once, rows)
                states[first:stop] = _bits(read(source, first, stop).to("cpu", self._dtype))
                done[source] = stop
                progress(stop - first)
                if stop == rows or time.monotonic() - noted > NOTE_SECONDS:
                    states.flush()  # a row that counts as finished must be on disk
                    write_text(self.folder / "states.json", json.dumps({**self._content, "done": done}) + "\n")
                    noted = time.monotonic()
            del states

    def of(self, places_B2: Tensor) -> Tensor:
        """Return the latents (B, T, D) of the rows at `places_B2`, (source, row) each, on the CPU, in their dtype."""
        places = places_B2.tolist()
        for source in {source for source, _ in places} - self._maps.keys():
            self._maps[source] = self._open(source)
        found = np.stack([self._maps[source][row] for source, row in places])
        states = torch.from_numpy(found)
        return states.view(torch.bfloat16) if self._dtype == torch.bfloat16 else states

    def _open(self, source: int) -> np.ndarray:
        file, shape = self.folder / f"source{source}.bin", (self._rows[source], *self._shape)
        try:
            return np.asarray(np.memmap(file, STORED[self._dtype], "r", shape=shape))
        except (OSError, ValueError) as error:
            raise UsageError(f"{file}: is damaged ({error}); delete {self.folder}") from error


def _bits(states: Tensor) -> np.ndarray:
    states = states.contiguous()
    return (states.view(torch.int16) if states.dtype == torch.bfloat16 else states).numpy()
