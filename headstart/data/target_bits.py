"""Target bits: which tokens of a shard are targets, where not all are, as in conversations: one bit a token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import BinaryIO

import numpy as np


def bytes_for(tokens: int) -> int:
    """What the bits of so many tokens take up."""
    return -(-tokens // 8)


def write_bits(flags: Iterable[np.ndarray], file: BinaryIO) -> int:
    """Writes arrays of 0 and 1, one behind the other, the first in the lowest bit; returns how many are 1."""
    rest = np.empty(0, dtype=np.uint8)
    count = 0
    for each in flags:
        count += int(np.count_nonzero(each))
        rest = np.concatenate([rest, each.astype(np.uint8)])
        whole = len(rest) // 8 * 8
        file.write(np.packbits(rest[:whole], bitorder="little").data)
        rest = rest[whole:]
    file.write(np.packbits(rest, bitorder="little").data)
    return count


class TargetBits:
    """What `write_bits` wrote: `len`, and slices without a step as bool."""

    dtype = np.dtype(bool)

    def __init__(self, packed: np.ndarray, tokens: int) -> None:
        self._packed, self._tokens = packed, tokens

    def __len__(self) -> int:
        return self._tokens

    def __getitem__(self, where: slice) -> np.ndarray:
        begin, stop, step = where.indices(self._tokens)
        if step != 1:
            raise ValueError(f"step {step}: only whole runs can be taken")
        first = begin // 8
        flags = np.unpackbits(self._packed[first : bytes_for(max(begin, stop))], bitorder="little")
        return flags[begin - 8 * first : max(begin, stop) - 8 * first].view(bool)
