"""The draft vocabulary of new heads: the tokens that are most frequent in what they train on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from headstart.data.shards import TokenShards

PIECE = 1 << 22
"""Tokens counted at once."""


def most_frequent(splits: Sequence[TokenShards], vocab_size: int, size: int) -> tuple[Tensor, float]:
    """Return the `size` most frequent tokens in ascending order, (size,) int64, and their share of all that is counted.

    Tokens to be predicted are counted, special ones and end tokens like all others. Equally frequent ones are taken by
    their number among all tokens of the splits, then by their id.
    """
    targets, read = np.zeros((2, vocab_size), dtype=np.int64)
    for tokens, is_target in _pieces(splits):
        read += np.bincount(tokens, minlength=vocab_size)
        targets += np.bincount(tokens if is_target is None else tokens[is_target], minlength=vocab_size)
    order = np.lexsort((np.arange(vocab_size), -read, -targets))  # the last key comes first
    chosen = np.sort(order[:size])
    return torch.from_numpy(chosen), float(targets[chosen].sum() / max(1, targets.sum()))


def _pieces(splits: Sequence[TokenShards]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield tokens of the splits, and which of them are to be predicted (None: all)."""
    for split in splits:
        for first in range(0, len(split.tokens), PIECE):
            where = slice(first, first + PIECE)
            yield split.tokens[where], None if split.targets is None else split.targets[where]
