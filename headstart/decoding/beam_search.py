"""Find a probable continuation by beam search, as data for distillation (Stern et al. 2018, section 6)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

ALPHA = 0.6
"""Exponent of the length by which scores are divided, ((5 + length) / 6)^ALPHA (Wu et al. 2016)."""


@torch.no_grad()
def search_beams(
    logits_of: Callable[[Tensor], Tensor], prompt: Sequence[int], beams: int, new_tokens: int, ends: Collection[int]
) -> tuple[list[int], bool]:
    """Return the most probable continuation found, without its end token, and whether it has reached one.

    Args:
        logits_of: returns the logits (B, V) of the token behind each row of tokens (B, T).
        prompt: tokens before the continuation.
        beams: continuations kept at each length.
        new_tokens: largest number of tokens of the continuation.
        ends: tokens that end it.
    """
    rows = torch.tensor([list(prompt)])
    scores = torch.zeros(1)
    finished: list[tuple[float, list[int]]] = []
    for length in range(1, new_tokens + 1):
        total = scores.unsqueeze(1) + logits_of(rows).float().cpu().log_softmax(-1)  # (B, V)
        # Twice as many as beams: at least half of them continue, unless there are several end tokens.
        best, places = total.flatten().topk(min(beams * (1 + len(ends)), total.numel()))
        kept: list[tuple[float, list[int]]] = []
        for score, place in zip(best.tolist(), places.tolist()):
            row, token = divmod(place, total.shape[1])
            if token in ends:
                finished.append((score / _penalty(length), rows[row, len(prompt) :].tolist()))
            elif len(kept) < beams:
                kept.append((score, [*rows[row].tolist(), token]))
        # Scores only fall, so no open continuation passes one that is ahead of it at the largest length.
        if not kept or (finished and max(finished)[0] >= kept[0][0] / _penalty(new_tokens)):
            break
        scores, rows = torch.tensor([score for score, _ in kept]), torch.tensor([tokens for _, tokens in kept])
    if finished:
        return max(finished)[1], True
    return rows[0, len(prompt) :].tolist(), False


def _penalty(length: int) -> float:
    return ((5 + length) / 6) ** ALPHA
