"""Lay out weights for the compiled kernels, in memory that is fast to read."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from headstart.hardware import huge_pages

COLUMNS = {torch.bfloat16: 32, torch.float32: 16}
"""The columns of a block of packed weights."""
_CHUNK, _LINE = 64 << 20, 64

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


def pack_int8(whole_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Return the result of `quantize_weight` in the layout of int8.h: (ceil(N/16), 128 + 64 ceil(K/4)) int8."""
    N, K = whole_NK.shape
    blocks = -(-N // 16)
    padded = torch.zeros(16 * blocks, -(-K // 4) * 4, dtype=torch.int8)
    padded[:N, :K] = whole_NK
    scale = torch.zeros(16 * blocks)
    scale[:N] = scale_N
    shift = 128 * padded.sum(1, dtype=torch.int32)
    weights = padded.view(blocks, 16, -1, 4).transpose(1, 2).reshape(blocks, -1)
    header = [shift.view(blocks, 16).view(torch.int8), scale.view(blocks, 16).view(torch.int8)]
    return _copy_into_chunk(torch.cat([*header, weights], dim=1))


def _copy_into_chunk(x: Tensor) -> Tensor:
    """Return a contiguous copy, next to the copies made before it.

    Separate matrices of a few megabytes would be in huge pages by two thirds only. A chunk is freed with its last copy.
    """
    global _chunk, _used
    with _lock:
        if _used + x.nbytes > _chunk.numel():
            _chunk, _used = huge_pages(torch.empty(max(_CHUNK, x.nbytes), dtype=torch.uint8)), 0
        room = _chunk[_used : _used + x.nbytes]
        _used = -(-(_used + x.nbytes) // _LINE) * _LINE
    return room.view(x.dtype).view(x.shape).copy_(x)
