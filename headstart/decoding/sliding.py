"""Give back the memory of positions that sliding layers no longer see.

Positions keep their places in the buffers, so masks, drafts, trees and kernels are those of a full cache, bit for bit.
The pages of positions that a sequence has passed by return to the system (Linux, CPU). They read as zeros, which
attention masks. A prefix can be reused only where the last window before its end is left: the scheduler keeps that of
the prompt, where the next turn of a conversation begins, and that of the sequence's end.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import platform

import torch
from torch import Tensor

from headstart.model.config import ModelConfig

BLOCK = 64
"""Least number of positions that are given back at once."""
MARGIN = 16
"""Positions kept in addition to a window and to those that sequential heads read again."""


class SlidingPages:
    """The sliding layers of a cache and their pages."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        layers = config.block_layers[: config.cached_blocks]
        self.layers = [at for at, layer in enumerate(layers) if config.window_of(layer) is not None]
        """Indices of the sliding layers in the buffers."""
        self.full = [at for at in range(len(layers)) if at not in self.layers]
        """Indices of the others."""
        assert config.window is not None
        self.sees = config.window + config.ahead + MARGIN
        """Number of last positions of a sequence that are kept."""
        self._row_bytes = config.dim_per_head * dtype.itemsize
        self.block = max(BLOCK, mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, self._row_bytes))
        """Number of positions that are given back at once: whole pages."""

    @classmethod
    def of(cls, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> SlidingPages | None:
        """Return the sliding layers of a cache of `dtype`; None where nothing can be given back."""
        possible = config.windowed and device.type == "cpu" and platform.system() == "Linux"
        return cls(config, dtype) if possible else None

    def most(self, capacity: int, chunk: int, width: int) -> int:
        """Return the most positions that a sliding layer holds of a slot."""
        return min(capacity, 2 * (self.sees + self.block + chunk) + width)

    def whole(self, start: int, end: int) -> tuple[int, int]:
        """Return the part of positions start .. end - 1 that is whole blocks; empty: (start, start)."""
        first, last = -(-start // self.block) * self.block, end // self.block * self.block
        return (first, last) if first < last else (start, start)

    def release(self, buffer: Tensor, slot: int, start: int, end: int) -> None:
        """Set whole blocks of positions of (layers, slots, kv_heads, capacity, E) to zero, and free their memory."""
        libc = ctypes.CDLL(None, use_errno=True)
        size = ctypes.c_size_t((end - start) * self._row_bytes)
        for layer in self.layers if start < end else ():
            for head in range(buffer.shape[2]):
                place = ctypes.c_void_p(buffer[layer, slot, head, start].data_ptr())
                if libc.madvise(place, size, mmap.MADV_DONTNEED):
                    buffer[layer, slot, head, start:end] = 0
