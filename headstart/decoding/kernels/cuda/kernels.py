"""The Triton kernels of a decoding pass on a GPU: few rows against all weights, so reading the weights bounds them.

A block takes five products and attentions. Elementwise work is done at their ends, where it costs nothing. A row's bits
depend on that row and its past alone, for any number of rows: an output is one chain of products over the width in one
order, however many rows share a program, and the blocks of attention start at fixed positions.

The kernels take one argument per tensor, size and stride, up to 23: every version of Triton and its interpreter accept
that, while tuples of arguments are new.

Suffixes: M rows of all windows, N outputs, K inputs, S slots, H query heads, G query heads for one key/value head,
E width of a head. Products multiply bf16 and add in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

KEYS = 64
"""Positions that a program of attention reads at a time."""
PART = 128
"""Positions that one program of attention reads in all. `_join` combines the parts of longer sequences."""
FAR = tl.constexpr(float("-inf"))


@triton.jit
def _norm(x, weight, y, K, eps, BK: tl.constexpr):
    """Compute the RMS norm of a row."""
    row, column = tl.program_id(0), tl.arange(0, BK)
    inside = column < K
    wide = tl.load(x + row * K + column, mask=inside, other=0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / K + eps)
    weights = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    tl.store(y + row * K + column, (wide * scale * weights).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _products(
    x, weight, second, M, K, row_M, output_N, inside_N,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, PAIR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Return (BN, BM) products of `x` (M, K) with rows `output_N` of `weight`, and with those `second` elements on."""
    sums = tl.zeros((BN, BM), tl.float32)
    others = tl.zeros((BN, BM), tl.float32)
    inside_M = row_M < M
    column = tl.arange(0, BK)
    x_KM = x + row_M[None, :] * K + column[:, None]
    weight_NK = weight + output_N.to(tl.int64)[:, None] * K + column[None, :]
    for start in range(0, K, BK):
        if EVEN:
            values = tl.load(x_KM, mask=inside_M[None, :], other=0)
            weights = tl.load(weight_NK, mask=inside_N[:, None], other=0)
        else:
            inside_K = start + column < K
            values = tl.load(x_KM, mask=inside_M[None, :] & inside_K[:, None], other=0)
            weights = tl.load(weight_NK, mask=inside_N[:, None] & inside_K[None, :], other=0)
        sums = tl.dot(weights, values, sums)
        if PAIR:
            if EVEN:
                more = tl.load(weight_NK + second, mask=inside_N[:, None], other=0)
            else:
                more = tl.load(weight_NK + second, mask=inside_N[:, None] & inside_K[None, :], other=0)
            others = tl.dot(more, values, others)
        x_KM += BK
        weight_NK += BK
    return sums, others


@triton.jit
def _linear(
    x, weight, bias, residual, y, M, N, K, second,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Compute y (M, N) = x @ weight.T + bias + residual, or with `GATED` silu of it times the product `second` on."""
    blocks = tl.cdiv(M, BM)
    row_M = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    output_N = tl.program_id(0) // blocks * BN + tl.arange(0, BN)
    inside_N = output_N < N
    sums, others = _products(x, weight, second, M, K, row_M, output_N, inside_N, BN, BK, BM, GATED, EVEN)
    kind = y.dtype.element_ty
    if BIAS:
        sums += tl.load(bias + output_N, mask=inside_N, other=0).to(tl.float32)[:, None]
    values = sums.to(kind)
    if GATED:
        gate = values.to(tl.float32)
        gate = (gate / (1 + tl.exp(-gate))).to(kind)
        values = (gate.to(tl.float32) * others.to(kind).to(tl.float32)).to(kind)
    inside = inside_N[:, None] & (row_M < M)[None, :]
    place = row_M[None, :] * N + output_N[:, None]
    if RESIDUAL:
        before = tl.load(residual + place, mask=inside, other=0)
        values = (before.to(tl.float32) + values.to(tl.float32)).to(kind)
    tl.store(y + place, values, mask=inside)


@triton.jit
def _rotated_qkv(
    x, weight, bias, cos, sin, positions, queries, keys, values,
    M, K, W, capacity, slot_stride, head_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, E: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Compute queries, keys and values of rows, rotated, and write keys and values into the cache.

    A program makes coordinates j of a head together with j + E/2, because they rotate together.
    """
    HALF: tl.constexpr = E // 2
    blocks = tl.cdiv(M, BM)
    row_M = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    number = tl.program_id(0) // blocks
    head = number // (HALF // BN)
    low_N = number % (HALF // BN) * BN + tl.arange(0, BN)
    output_N = head * E + low_N
    inside_N = low_N < HALF
    first, second = _products(x, weight, HALF * K, M, K, row_M, output_N, inside_N, BN, BK, BM, True, EVEN)
    if BIAS:
        first += tl.load(bias + output_N).to(tl.float32)[:, None]
        second += tl.load(bias + output_N + HALF).to(tl.float32)[:, None]
    _rotate(
        first, second, cos, sin, positions, queries, keys, values, M, W, capacity, slot_stride, head_stride, row_M,
        head, low_N, HEADS, KV_HEADS, E,
    )  # fmt: skip


@triton.jit
def _rotated(
    qkv, cos, sin, positions, queries, keys, values, M, W, capacity, slot_stride, head_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, E: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Do the work of `_rotated_qkv` on existing products (M, heads, E); a program takes one head."""
    row_M = tl.program_id(0) * BM + tl.arange(0, BM)
    head = tl.program_id(1)
    low_N = tl.arange(0, E // 2)
    place = qkv + (row_M[None, :].to(tl.int64) * (HEADS + 2 * KV_HEADS) + head) * E + low_N[:, None]
    inside = (row_M < M)[None, :]
    first, second = tl.load(place, mask=inside, other=0), tl.load(place + E // 2, mask=inside, other=0)
    _rotate(
        first, second, cos, sin, positions, queries, keys, values, M, W, capacity, slot_stride, head_stride, row_M,
        head, low_N, HEADS, KV_HEADS, E,
    )  # fmt: skip


@triton.jit
def _rotate(
    first, second, cos, sin, positions, queries, keys, values, M, W, capacity, slot_stride, head_stride, row_M, head,
    low_N, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Rotate coordinates `low_N` and `low_N` + E/2 of a head, for rows `row_M`, and store them where they belong."""
    HALF: tl.constexpr = E // 2
    kind = queries.dtype.element_ty
    first, second = first.to(kind), second.to(kind)
    inside_M = row_M < M
    inside = (low_N < HALF)[:, None] & inside_M[None, :]
    if head < HEADS + KV_HEADS:
        low = row_M[None, :] * E + low_N[:, None]
        high = low + HALF
        a, b = first.to(tl.float32), second.to(tl.float32)
        turned = a * tl.load(cos + low, mask=inside, other=0) + b * tl.load(sin + low, mask=inside, other=0)
        other = b * tl.load(cos + high, mask=inside, other=0) + a * tl.load(sin + high, mask=inside, other=0)
        first, second = turned.to(kind), other.to(kind)
    if head < HEADS:
        query = queries + (row_M[None, :] * HEADS + head) * E + low_N[:, None]
        tl.store(query, first, mask=inside)
        tl.store(query + HALF, second, mask=inside)
    else:
        # The negative positions of a slot without a request count from the end.
        position = tl.load(positions + row_M, mask=inside_M, other=0)
        position = tl.where(position < 0, position + capacity, position)
        kv_head = (head - HEADS) % KV_HEADS
        place = (row_M // W).to(tl.int64) * slot_stride + kv_head * head_stride + position * E
        place = place[None, :] + low_N[:, None]
        if head < HEADS + KV_HEADS:
            tl.store(keys + place, first, mask=inside)
            tl.store(keys + place + HALF, second, mask=inside)
        else:
            tl.store(values + place, first, mask=inside)
            tl.store(values + place + HALF, second, mask=inside)


@triton.jit
def _gate(both, y, N, BN: tl.constexpr):
    """Compute y (M, N): silu of the first half of `both` (M, 2 N) times the second half."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN + tl.arange(0, BN)
    inside = column < N
    place = both + row * 2 * N + column
    gate = tl.load(place, mask=inside, other=0).to(tl.float32)
    gate = (gate / (1 + tl.exp(-gate))).to(y.dtype.element_ty)
    up = tl.load(place + N, mask=inside, other=0)
    tl.store(y + row * N + column, (gate.to(tl.float32) * up.to(tl.float32)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _attend(
    queries, keys, values, positions, row, y, sums, W, R, slot_stride, head_stride, scale, parts,
    HEADS: tl.constexpr, G: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, ONE: tl.constexpr, KEYS: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Attend from rows of a window to one part of the positions up to each.

    R rows of each slot have queries: all W, or with `ONE` the one that `row` names. With a single part y (S, R, H, E)
    is the result. With several, y holds each part's sum, not yet divided, and `sums` (S, R, H, parts, 2) the largest
    score and the sum of weights.
    """
    blocks = tl.cdiv(R * G, BM)
    part = tl.program_id(1)
    slot = tl.program_id(0) // (blocks * (HEADS // G))
    kv_head = tl.program_id(0) // blocks % (HEADS // G)
    asked_M = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    inside_M = asked_M < R * G
    r, head = asked_M // G, kv_head * G + asked_M % G
    w = tl.load(row + slot) + r * 0 if ONE else r
    position = tl.load(positions + slot * W + w, mask=inside_M, other=-1)
    last = tl.maximum(tl.max(position), 0)
    position = tl.maximum(position, 0)
    e, t = tl.arange(0, E), tl.arange(0, KEYS)
    q_ME = tl.load(queries + ((slot * W + w) * HEADS + head)[:, None] * E + e[None, :], mask=inside_M[:, None], other=0)
    largest = tl.full((BM,), FAR, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    answer = tl.zeros((BM, E), tl.float32)
    base = slot.to(tl.int64) * slot_stride + kv_head * head_stride
    for start in range(part * PART, tl.minimum(part * PART + PART, last + 1), KEYS):
        place = base + (start + t) * E
        seen_T = start + t <= last
        k_ET = tl.load(keys + place[None, :] + e[:, None], mask=seen_T[None, :], other=0)
        scores = tl.dot(q_ME, k_ET) * scale
        scores = tl.where((start + t)[None, :] <= position[:, None], scores, FAR)
        top = tl.maximum(largest, tl.max(scores, 1))
        safe = tl.where(top == FAR, 0.0, top)
        shares = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(largest - safe)
        v_TE = tl.load(values + place[:, None] + e[None, :], mask=seen_T[:, None], other=0)
        total = total * shrink + tl.sum(shares, 1)
        answer = answer * shrink[:, None] + tl.dot(shares.to(v_TE.dtype), v_TE)
        largest = top
    place = (slot * R + r) * HEADS + head
    if parts > 1:
        place = place * parts + part
        tl.store(sums + place * 2, largest, mask=inside_M)
        tl.store(sums + place * 2 + 1, total, mask=inside_M)
    else:
        answer = answer / total[:, None]
    y_ME = y + place[:, None] * E + e[None, :]
    tl.store(y_ME, answer.to(y.dtype.element_ty), mask=inside_M[:, None])


@triton.jit
def _join(y, sums, joined, parts, E: tl.constexpr, BP: tl.constexpr):
    """Combine the parts of one row and head."""
    place, p, e = tl.program_id(0), tl.arange(0, BP), tl.arange(0, E)
    inside = p < parts
    at = place * parts + p
    largest = tl.load(sums + at * 2, mask=inside, other=FAR)
    total = tl.load(sums + at * 2 + 1, mask=inside, other=0)
    weight = tl.exp2(largest - tl.max(largest))
    answers = tl.load(y + at[:, None] * E + e[None, :], mask=inside[:, None], other=0)
    answer = tl.sum(answers * weight[:, None], 0) / tl.sum(total * weight)
    tl.store(joined + place * E + e, answer.to(joined.dtype.element_ty))
