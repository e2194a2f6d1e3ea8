"""Launch the kernels on tensors: their shapes, grids, and the share of the work that a program takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.decoding.kernels.cuda import kernels

MOST_ROWS = 64
"""The most rows, all windows together, for which these products are the faster ones. Arithmetic bounds products of more
rows, and the vendor's are faster there."""
QUERIES = 16
"""Pairs of a row and a head that share a program of attention."""


@dataclass(frozen=True)
class Share:
    """The part of a product that one program takes. No output's bits depend on it."""

    outputs: int = 16
    inputs: int = 256
    warps: int = 4
    stages: int = 4


def choose_share(outputs: int, inputs: int, pair: bool = False) -> Share:
    """Return the share that was measured as fastest for a matrix (N, K) (docs/lab-notes.md)."""
    if pair:
        return Share(32, 128, 2, 3) if outputs >= 8192 else Share(16, 64, 2, 8)
    if outputs >= 8192:
        return Share(64, 64, 4, 3)
    return Share(32, 128, 4, 8) if outputs >= 3072 else Share(16, 64, 4, 8)


def norm(x: Tensor, weight_K: Tensor, eps: float) -> Tensor:
    """Return the RMS norm of x (..., K)."""
    K = x.shape[-1]
    y = torch.empty_like(x)
    kernels._norm[(x.numel() // K,)](x, weight_K, y, K, eps, BK=_next_power(K), num_warps=8 if K > 2048 else 4)
    return y


def linear(
    x: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    share: Share | None = None,
) -> Tensor:
    """Return x (..., K) @ weight.T + bias, plus a residual (..., N).

    With `gated` the result (..., N / 2) is silu of the first half of the outputs times the second half.
    """
    K = x.shape[-1]
    N = weight_NK.shape[0] // 2 if gated else weight_NK.shape[0]
    M = x.numel() // K
    if M > MOST_ROWS:
        return _linear_of_many(x, weight_NK, bias_N, residual, gated)
    share = share or choose_share(N, K, gated)
    y = x.new_empty((*x.shape[:-1], N))
    rows = _rows_of_program(M)
    grid = (-(-M // rows) * -(-N // share.outputs),)
    kernels._linear[grid](
        x, weight_NK, x if bias_N is None else bias_N, x if residual is None else residual, y, M, N, K, N * K,
        BN=share.outputs, BK=share.inputs, BM=rows, BIAS=bias_N is not None, RESIDUAL=residual is not None, GATED=gated,
        EVEN=K % share.inputs == 0, num_warps=share.warps, num_stages=share.stages,
    )  # fmt: skip
    return y


def _linear_of_many(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gated: bool) -> Tensor:
    """Compute `linear` for many rows, in torch's product."""
    y = F.linear(x, weight, bias)
    if residual is not None:
        y += residual
    if not gated:
        return y
    N = weight.shape[0] // 2
    hidden = x.new_empty((*x.shape[:-1], N))
    kernels._gate[(x.numel() // x.shape[-1], -(-N // 1024))](y, hidden, N, BN=1024)
    return hidden


def rotated_qkv(
    x_SWD: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rotary: tuple[Tensor, Tensor],
    positions_SW: Tensor,
    cache: tuple[Tensor, Tensor],
    heads: int,
    share: Share | None = None,
) -> Tensor:
    """Return the rotated queries (S, W, H, E), and write keys and values of the rows into the cache.

    `cache` holds the keys and the values of the block, (S, K, capacity, E) each.
    """
    keys_SKTE, values_SKTE = cache
    (S, W, K), (_, kv_heads, capacity, E) = x_SWD.shape, keys_SKTE.shape
    queries = x_SWD.new_empty((S, W, heads, E))
    places = (*rotary, positions_SW, queries, keys_SKTE, values_SKTE)
    sizes = (W, capacity, keys_SKTE.stride(0), keys_SKTE.stride(1))
    if S * W > MOST_ROWS:
        qkv = F.linear(x_SWD, weight, bias)
        kernels._rotated[-(-S * W // QUERIES), heads + 2 * kv_heads](
            qkv, *places, S * W, *sizes, HEADS=heads, KV_HEADS=kv_heads, E=E, BM=QUERIES
        )
        return queries
    share = share or choose_share((heads + 2 * kv_heads) * E // 2, K, True)
    outputs = min(share.outputs, E // 2)
    rows = _rows_of_program(S * W)
    grid = (-(-S * W // rows) * (heads + 2 * kv_heads) * (E // 2 // outputs),)
    kernels._rotated_qkv[grid](
        x_SWD, weight, x_SWD if bias is None else bias, *places, S * W, K, *sizes,
        HEADS=heads, KV_HEADS=kv_heads, E=E, BN=outputs, BK=share.inputs, BM=rows, BIAS=bias is not None,
        EVEN=K % share.inputs == 0, num_warps=share.warps, num_stages=share.stages,
    )  # fmt: skip
    return queries


def attend(
    queries_SWHE: Tensor,
    keys_SKTE: Tensor,
    values_SKTE: Tensor,
    positions_SW: Tensor,
    row_S: Tensor | None,
    span: int,
) -> Tensor:
    """Attend from each row to the cache up to its position, which is less than `span`.

    Returns:
        (S, R, H, E), for all R = W rows of a slot, or for the one row that `row_S` names.
    """
    S, W, H, E = queries_SWHE.shape
    kv_heads = keys_SKTE.shape[1]
    R, G = (W if row_S is None else 1), H // kv_heads
    parts = -(-span // kernels.PART)
    y = queries_SWHE.new_empty((S, R, H, E))
    answers = y if parts == 1 else torch.empty((S, R, H, parts, E), dtype=torch.float32, device=y.device)
    sums = y if parts == 1 else torch.empty((S, R, H, parts, 2), dtype=torch.float32, device=y.device)
    kernels._attend[(S * kv_heads * -(-R * G // QUERIES), parts)](
        queries_SWHE, keys_SKTE, values_SKTE, positions_SW, positions_SW if row_S is None else row_S, answers, sums,
        W, R, keys_SKTE.stride(0), keys_SKTE.stride(1), math.log2(math.e) / math.sqrt(E), parts,
        HEADS=H, G=G, E=E, BM=QUERIES, ONE=row_S is not None, KEYS=kernels.KEYS, PART=kernels.PART,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    if parts > 1:
        kernels._join[(S * R * H,)](answers, sums, y, parts, E=E, BP=_next_power(parts))
    return y


def _rows_of_program(count: int) -> int:
    """Return the rows that a program of a product takes: all of them, up to `MOST_ROWS`."""
    return min(MOST_ROWS, max(16, _next_power(count)))


def _next_power(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()
