"""Find equal and nearly equal documents by a digest and four keys of each.

Two documents are nearly equal if they share most runs of SHINGLE bytes (shingles). Shingle hashes fall into 24
buckets; each key joins the smallest hashes of six buckets. Documents that share a key count as near duplicates. This
finds about 99 % of the pairs that share 95 % of their shingles, 95 % at 90 %, 70 % at 80 %, and 6 % at 50 %.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

SHINGLE = 32
"""Bytes of a shingle."""
KEYS, MINIMA = 4, 6
LEAST = 128
"""Documents with fewer different shingles have no keys: only equality is found."""
SORTED_HASHES = 4096
"""About as many of a document's smallest hashes are sorted; the minima are among them."""
BLOCK = 1 << 18
_FACTOR, _MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
_MODULUS = 1 << 64
_WEIGHTS = np.array([pow(_FACTOR, power, _MODULUS) for power in range(MINIMA)], dtype=np.uint64)


def digest_of(content: bytes) -> int:
    """Return 64 bits that two documents share only if they are equal (SHA-256, cut)."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def keys_of(content: bytes) -> np.ndarray:
    """Return the keys of a document, (KEYS,) uint64; all 0 if it is too short or too repetitive to have any."""
    count = len(content) - SHINGLE + 1
    if count < LEAST:
        return np.zeros(KEYS, dtype=np.uint64)
    limit = np.uint64(min(_MODULUS - 1, _MODULUS * SORTED_HASHES // count))
    hashes = np.unique(np.concatenate([block[block <= limit] for block in _shingles(content)]))
    if len(hashes) < LEAST:
        return np.zeros(KEYS, dtype=np.uint64)
    minima = np.zeros(KEYS * MINIMA, dtype=np.uint64)
    minima[(hashes[::-1] % np.uint64(KEYS * MINIMA)).astype(np.int64)] = hashes[::-1]  # the smallest is written last
    return _mixed((minima.reshape(KEYS, MINIMA) * _WEIGHTS).sum(1, dtype=np.uint64)) | np.uint64(1)


def copies(values: np.ndarray) -> np.ndarray:
    """Return which of `values` (D,) equal an earlier one: (D,) bool."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    found: np.ndarray = first[inverse] != np.arange(len(values))
    return found


def near_copies(keys_DK: np.ndarray) -> np.ndarray:
    """Return which documents share a key with an earlier one: (D,) bool."""
    found = np.zeros(len(keys_DK), dtype=bool)
    for column in keys_DK.T:
        found |= copies(column) & (column != 0)
    return found


def _shingles(content: bytes) -> Iterator[np.ndarray]:
    """Yield the hashes of all runs of SHINGLE bytes, block by block: uint64."""
    for begin in range(0, len(content) - SHINGLE + 1, BLOCK):
        hashes = np.frombuffer(content[begin : begin + BLOCK + SHINGLE - 1], dtype=np.uint8).astype(np.uint64)
        shift, factor = 1, _FACTOR
        while shift < SHINGLE:  # the hash of 2n bytes from two of n
            hashes = hashes[:-shift] * np.uint64(factor) + hashes[shift:]
            shift, factor = 2 * shift, factor * factor % _MODULUS
        yield _mixed(hashes)


def _mixed(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MIX)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
