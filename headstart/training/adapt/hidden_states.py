"""Hidden states of a frozen trunk, kept on disk: heads that are trained alone read them instead of running the trunk.

    FOLDER/KEY/states.json     what they were made of, and how many rows of each source are done
    FOLDER/KEY/source0.bin     rows x length x dim values of the first source, and so on

The key is a digest of everything that the states depend on, so one folder serves many runs, and other weights, text or
lengths never meet the wrong states. What is not done when the process is killed is made by the next one.
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
"""numpy knows no bfloat16; its bits are kept."""
NOTE_SECONDS = 20.0
"""How often is noted how many rows are done."""


class HiddenStates:
    """Latents (rows, T, D) of every row of every source."""

    def __init__(
        self, folder: Path, made_of: dict[str, Any], rows: Sequence[int], length: int, dim: int, dtype: torch.dtype
    ) -> None:
        """`made_of`: whatever the states depend on, as plain data."""
        content = {"made_of": made_of, "rows": list(rows), "length": length, "dim": dim, "dtype": str(dtype)}
        text = json.dumps(content, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._content, self._rows, self._shape, self._dtype = content, list(rows), (length, dim), dtype
        self._maps: list[np.ndarray] = []

    @property
    def bytes(self) -> int:
        """On disk, of all sources."""
        return sum(self._rows) * self._shape[0] * self._shape[1] * self._dtype.itemsize

    def check_room(self, limit: int) -> None:
        """Raises UsageError where they would take more than `limit` bytes, or more than the disk has left."""
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
        """How many rows of each source are there."""
        try:
            return [int(rows) for rows in json.loads((self.folder / "states.json").read_text(encoding="utf-8"))["done"]]
        except (OSError, ValueError, KeyError, TypeError):
            return [0] * len(self._rows)

    def fill(
        self, read: Callable[[int, int, int], Tensor], at_once: int, progress: Callable[[int], None] = lambda rows: None
    ) -> None:
        """Makes what is missing. `read(source, first, stop)` gives the latents (stop - first, T, D) of these rows."""
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
                    states.flush()  # a row that counts as done must be on disk
                    write_text(self.folder / "states.json", json.dumps({**self._content, "done": done}) + "\n")
                    noted = time.monotonic()
            del states

    def of(self, places_B2: Tensor) -> Tensor:
        """Latents (B, T, D) of the rows at `places_B2`, (source, row) each; on the CPU, in the stored dtype."""
        if not self._maps:
            self._maps = [self._open(source) for source in range(len(self._rows))]
        found = np.stack([self._maps[source][row] for source, row in places_B2.tolist()])
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
