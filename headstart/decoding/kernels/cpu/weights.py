"""Lay out weights for the compiled kernels, in memory that is fast to read."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from headstart.decoding.kernels.blocks import GROUP, BlockRows, Blocks, BlockWeight
from headstart.hardware import huge_pages

COLUMNS = {torch.bfloat16: 32, torch.float32: 16}
"""The columns of a block of packed weights."""
_CHUNK, _LINE = 64 << 20, 64
_PIECE = 1 << 18
"""The weights that are laid out at a time: what is computed on the way stays in cache."""

Piece = TypeVar("Piece")

_lock = threading.Lock()
_chunk, _used = torch.empty(0, dtype=torch.uint8), 0


def pack_weight(weight_NK: Tensor) -> Tensor:
    """Return the weight in the layout that `linear` reads, with the last block filled with zeros.

    (N, K) bf16, K even -> [ceil(N/32)][K/2][32][2] bf16. (N, K) fp32 -> [ceil(N/16)][K][16] fp32, or if bf16 holds
    every weight exactly, [ceil(N/16)][K][8][2] bf16: column j next to column j + 8, which two instructions widen.
    """
    N, K = weight_NK.shape
    columns = COLUMNS[weight_NK.dtype]
    padded = torch.zeros(-(-N // columns) * columns, K, dtype=weight_NK.dtype)
    padded[:N] = weight_NK
    if weight_NK.dtype == torch.bfloat16:
        return _copy_into_chunk(padded.view(-1, columns, K // 2, 2).transpose(1, 2))
    narrow = padded.bfloat16()
    if torch.equal(narrow.float(), padded):
        return _copy_into_chunk(narrow.view(-1, 2, 8, K).permute(0, 3, 2, 1))
    return _copy_into_chunk(padded.view(-1, columns, K).transpose(1, 2))


_HEADER = struct.Struct("<q")
_SEGMENT = struct.Struct("<7q")


def pack_blocks(blocks: Blocks) -> Tensor:
    """Return weights in blocks in the layout of blocks.h, uint8: a header, and records of 16 outputs and 32 inputs."""
    K = blocks[0].shape[1]
    groups, rows = -(-K // GROUP), max(16, _PIECE // K // 16 * 16)
    header, sizes = bytearray(_HEADER.pack(len(blocks))), list[int]()
    begin = -(-(_HEADER.size + _SEGMENT.size * len(blocks)) // _LINE) * _LINE
    for whole in blocks:
        part = whole.rows(slice(0, 1))
        wide, minimums = part.scales_NG.dtype == torch.float32, part.minimums_NG is not None
        scales = 16 * (GROUP // part.group) * part.scales_NG.element_size() * (1 + minimums)
        record = 64 * part.bits + scales
        header += _SEGMENT.pack(whole.shape[0], part.bits, part.group, wide, minimums, record, begin + sum(sizes))
        sizes.append(-(-whole.shape[0] // 16) * groups * record)
    packed = _room(begin + sum(sizes))
    packed[: len(header)] = torch.frombuffer(header, dtype=torch.uint8)
    pieces = [
        (whole, slice(first, first + rows), room[first * (len(room) // -(-whole.shape[0] // 16) // 16) :])
        for whole, room in zip(blocks, packed[begin:].split(sizes))
        for first in range(0, whole.shape[0], rows)
    ]

    def fill(piece: tuple[BlockRows, slice, Tensor]) -> None:
        whole, which, room = piece
        records = _records(whole.rows(which)).flatten()
        room[: len(records)] = records

    _run_on_threads(fill, pieces)
    return packed


def _run_on_threads(work: Callable[[Piece], None], pieces: Sequence[Piece]) -> None:
    """Do some work for each piece, on as many threads as torch uses.

    Each operator of a piece takes one thread: several would wait for each other after every operator, for long where
    another program keeps a core busy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if min(threads, len(pieces)) < 2:
            for piece in pieces:
                work(piece)
            return
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(work, pieces):
                pass
    finally:
        torch.set_num_threads(threads)


def _records(part: BlockWeight) -> Tensor:
    """Return the records of a matrix, (ceil(N / 16), ceil(K / 32), bytes) uint8."""
    N, K = part.shape
    blocks, groups = -(-N // 16), -(-K // GROUP)
    added = 0 if part.bits == 8 or part.minimums_NG is not None else 1 << part.bits - 1
    codes = part.codes_NK
    if N % 16 or K % GROUP or added:
        codes = torch.zeros(16 * blocks, groups * GROUP, dtype=torch.int8)
        torch.add(part.codes_NK, added, out=codes[:N, :K])
    codes = codes.view(torch.uint8).view(-1, groups, GROUP)
    if part.bits == 8:
        fields = [codes]
    else:
        low = codes if part.bits == 4 else codes & 15
        fields = [low[..., GROUP // 2 :] << 4 | low[..., : GROUP // 2]]
        if part.bits == 5:
            high = (codes >> 4).view(-1, groups, 8, 4) << torch.arange(8, dtype=torch.uint8)[:, None]
            fields.append(high.sum(2, dtype=torch.uint8))
    # Four inputs of an output stay together: (block, half, output, group, step) -> (block, group, half, step, output).
    steps = [field.view(torch.int32).view(blocks, 2, 8, groups, -1).permute(0, 3, 1, 4, 2) for field in fields]
    records = [field.contiguous().view(torch.uint8).view(blocks, groups, -1) for field in steps]
    for values in (part.scales_NG, part.minimums_NG):
        if values is not None:
            padded = values.new_zeros(16 * blocks, groups * (GROUP // part.group))
            padded[:N, : values.shape[1]] = values
            scales = padded.view(blocks, 16, groups, -1).permute(0, 2, 3, 1)
            records.append(scales.contiguous().view(torch.uint8).view(blocks, groups, -1))
    return torch.cat(records, 2)


def _copy_into_chunk(x: Tensor) -> Tensor:
    return _room(x.nbytes).view(x.dtype).view(x.shape).copy_(x)


def _room(size: int) -> Tensor:
    """Return `size` bytes of memory, next to those returned before.

    Separate matrices of a few megabytes would be in huge pages by two thirds only. A chunk is freed with its last part.
    """
    global _chunk, _used
    with _lock:
        if _used + size > _chunk.numel():
            _chunk, _used = huge_pages(torch.empty(max(_CHUNK, size), dtype=torch.uint8)), 0
        room = _chunk[_used : _used + size]
        _used = -(-(_used + size) // _LINE) * _LINE
    return room
