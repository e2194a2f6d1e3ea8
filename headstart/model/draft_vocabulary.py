"""Draft vocabularies: the tokens that heads 2..n predict, as a map `d2t` (Vd,) int64 from draft ids to token ids.

The map is strictly increasing, so that the order of logits, and with it the choice between equal ones, is that of the
whole vocabulary. Head 1 always predicts all tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headstart.errors import UsageError


def check_draft_tokens(d2t: Tensor, vocab_size: int, name: str) -> None:
    """Raise UsageError, which begins with `name`, unless `d2t` lists different tokens of the vocabulary in order."""
    if bool((d2t[1:] <= d2t[:-1]).any()):
        raise UsageError(f"{name}: its token ids do not ascend; copy the heads again")
    for token in (int(d2t[0]), int(d2t[-1])):
        if not 0 <= token < vocab_size:
            raise UsageError(f"{name}: holds token {token}, and the vocabulary has {vocab_size}; copy the heads again")


def draft_ids(tokens: Tensor, d2t: Tensor, outside: int) -> Tensor:
    """Return the draft id of each token id, in any shape; `outside` for tokens that are not in the draft vocabulary."""
    found = torch.searchsorted(d2t, tokens.contiguous()).clamp_max(len(d2t) - 1)
    return torch.where(d2t[found] == tokens, found, outside)


def widen(values: Tensor, d2t: Tensor, vocab_size: int, fill: float) -> Tensor:
    """Return values (..., Vd) of draft ids as values (..., V) of token ids; those of all other tokens are `fill`."""
    wide = values.new_full((*values.shape[:-1], vocab_size), fill)
    wide[..., d2t] = values
    return wide
