"""The matrices of GGUF files as `BlockWeight`s, which equal what the package gguf dequantizes, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headstart.decoding.kernels.blocks import BlockWeight
from headstart.formats.assembly import check_finite

Array = NDArray[Any]
Fields = tuple[Array, Array, "Array | None", int, int]
"""Codes (N, G, group) int8, scales (N, G), minimums (N, G) or None, bits, and group."""


@dataclass(frozen=True)
class StoredBlocks:
    """A matrix in a GGUF file, whose rows are read when they are packed."""

    raw: Array
    """The stored blocks of each row, uint8 (N, bytes of a row), mapped."""
    kind: str
    """The name of their type, a key of `READERS`."""
    name: str
    """The file and the tensor, for messages."""
    order: Array | None
    """For each row of the matrix the row that is stored (None: the same)."""

    @property
    def shape(self) -> torch.Size:
        """Numbers of outputs and inputs."""
        codes = READERS[self.kind][0](self.raw[:1].reshape(1, -1, READERS[self.kind][1]))[0]
        return torch.Size((len(self.raw), codes.size))

    def rows(self, rows: Tensor | slice) -> BlockWeight:
        """Return some rows of the matrix, in the order given. Raises UsageError for values that are not finite."""
        place = rows if isinstance(rows, slice) else rows.numpy()
        found = block_weight_from_gguf(self.raw[place if self.order is None else self.order[place]], self.kind)
        for values in (found.scales_NG, found.minimums_NG):
            if values is not None:
                check_finite(self.name, values)
        return found


def block_weight_from_gguf(raw: Array, kind: str) -> BlockWeight:
    """Return a matrix of a GGUF file.

    Args:
        raw: the stored blocks of each row, (N, bytes of a row).
        kind: the name of their type, a key of `READERS`.
    """
    read, size = READERS[kind]
    rows = len(raw)
    codes, scales, minimums, bits, group = read(np.ascontiguousarray(raw).reshape(rows, -1, size))
    least = None if minimums is None else torch.from_numpy(minimums)
    return BlockWeight(
        torch.from_numpy(codes.reshape(rows, -1).view(np.int8)), torch.from_numpy(scales), least, bits, group
    )


def _halves(blocks: Array, begin: int) -> Array:
    """Return the two fp16 numbers, or the one, that begin at a byte of each block, (N, blocks)."""
    return np.ascontiguousarray(blocks[..., begin : begin + 2]).view(np.float16)[..., 0]


def _nibbles(packed: Array) -> Array:
    """Return the lower halves of bytes (..., n) and then the upper ones, (..., 2 n)."""
    return np.concatenate([packed & 15, packed >> 4], -1)


def _bits(packed: Array) -> Array:
    """Return the bits of bytes (..., n), the lowest first, (..., 8 n)."""
    return np.unpackbits(packed, axis=-1, bitorder="little")


def _q4_0(blocks: Array) -> Fields:
    return _nibbles(blocks[..., 2:]) - np.uint8(8), _halves(blocks, 0), None, 4, 32


def _q4_1(blocks: Array) -> Fields:
    return _nibbles(blocks[..., 4:]), _halves(blocks, 0), _halves(blocks, 2), 4, 32


def _q5_0(blocks: Array) -> Fields:
    codes = _nibbles(blocks[..., 6:]) | _bits(blocks[..., 2:6]) << 4
    return codes - np.uint8(16), _halves(blocks, 0), None, 5, 32


def _q5_1(blocks: Array) -> Fields:
    codes = _nibbles(blocks[..., 8:]) | _bits(blocks[..., 4:8]) << 4
    return codes, _halves(blocks, 0), _halves(blocks, 2), 5, 32


def _q8_0(blocks: Array) -> Fields:
    return blocks[..., 2:], _halves(blocks, 0), None, 8, 32


def _scaled(blocks: Array, begin: int, factors: Array) -> Array:
    """Return fp16 numbers of blocks times whole numbers (N, blocks, n) of their groups, (N, blocks * n) fp32, exact."""
    products = _halves(blocks, begin).astype(np.float32)[..., None] * factors.astype(np.float32)
    return products.reshape(len(blocks), -1)


def _six_bits(packed: Array) -> tuple[Array, Array]:
    """Return the eight factors of scales and of minimums that twelve bytes of a K block hold."""
    low, middle, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 2 & 48)], -1)
    return scales, np.concatenate([middle & 63, (high >> 4) | (middle >> 2 & 48)], -1)


def _k_groups(blocks: Array, codes: Array, bits: int) -> Fields:
    scales, minimums = _six_bits(blocks[..., 4:16])
    return codes, _scaled(blocks, 0, scales), -_scaled(blocks, 2, minimums), bits, 32


def _q4_k(blocks: Array) -> Fields:
    packed = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)
    return _k_groups(blocks, _nibbles(packed), 4)


def _q5_k(blocks: Array) -> Fields:
    packed = blocks[..., 48:].reshape(*blocks.shape[:2], 4, 32)
    high = blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _k_groups(blocks, _nibbles(packed).reshape(*blocks.shape[:2], 8, 32) | high << 4, 5)


def _q6_k(blocks: Array) -> Fields:
    low = _nibbles(blocks[..., :128].reshape(*blocks.shape[:2], 2, 64)).reshape(*blocks.shape[:2], 8, 32)
    packed = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32)
    high = packed >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None] & 3
    codes = (low | high.reshape(low.shape) << 4) - np.uint8(32)
    return codes, _scaled(blocks, 208, blocks[..., 192:208].view(np.int8)), None, 8, 16


READERS: dict[str, tuple[Callable[[Array], Fields], int]] = {
    "Q4_0": (_q4_0, 18),
    "Q4_1": (_q4_1, 20),
    "Q5_0": (_q5_0, 22),
    "Q5_1": (_q5_1, 24),
    "Q8_0": (_q8_0, 34),
    "Q4_K": (_q4_k, 144),
    "Q5_K": (_q5_k, 176),
    "Q6_K": (_q6_k, 210),
}
"""The types that become blocks: how their blocks are read, and the bytes of one."""
