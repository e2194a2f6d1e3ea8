"""Log-probabilities of tokens, as requests may ask for them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def log_probabilities(
    logits_SRV: Tensor, tokens_SR: Tensor, alternatives: int
) -> tuple[list[Any], list[Any], list[Any]]:
    """Of each slot and row the log-probability of its token, and the best `alternatives` tokens with theirs."""
    logs = (logits_SRV if logits_SRV.element_size() == 8 else logits_SRV.float()).log_softmax(-1)
    best = logs.topk(alternatives, dim=-1)
    own = logs.gather(-1, tokens_SR[..., None])[..., 0]
    return own.tolist(), best.indices.tolist(), best.values.tolist()
