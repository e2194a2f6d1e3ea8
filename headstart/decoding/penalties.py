"""Penalties and biases: changes of the logits by the tokens generated so far.

Along a window the output grows row by row: row j counts the drafts before it, because it matters only if they are
accepted. So penalised decoding with drafts is penalised plain decoding, token for token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headstart.decoding.drafters.tree import RowPaths
from headstart.decoding.settings import MOST_BIAS, Penalties


class PenaltyRows:
    """The penalties of all slots, and what each has generated. Nothing is allocated before a slot has penalties."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device | str) -> None:
        self._of = [Penalties()] * slots
        self._shape, self._device = (slots, vocab_size), device
        self._written: Tensor | None = None

    def set(self, slot: int, penalties: Penalties, prompt: Tensor) -> None:
        """Set the penalties of `slot`, for a request with this prompt (T,) int64."""
        self.clear(slot)
        self._of[slot] = penalties
        if penalties.none:
            return
        if self._written is None:
            slots, vocab_size = self._shape
            self._written = torch.zeros((slots, vocab_size), dtype=torch.int32, device=self._device)
            self._prompt = torch.zeros((slots, vocab_size), dtype=torch.bool, device=self._device)
            self._bias = torch.zeros((slots, vocab_size), device=self._device)
            self._numbers = torch.zeros((3, slots, 1, 1), device=self._device)
            self._has = torch.zeros(slots, dtype=torch.bool, device=self._device)
        self._has[slot] = True
        self._written[slot] = 0
        self._prompt[slot] = False
        self._prompt[slot, prompt] = True
        self._bias[slot] = 0
        for token, value in penalties.bias:
            self._bias[slot, token] = max(value, -MOST_BIAS)  # never, and yet finite
        numbers = (penalties.repetition, penalties.presence, penalties.frequency)
        self._numbers[:, slot, 0, 0] = torch.tensor(numbers, device=self._device)

    def clear(self, slot: int) -> None:
        """Remove the penalties of `slot`."""
        self._of[slot] = Penalties()
        if self._written is not None:
            self._has[slot] = False

    def any(self, slots: slice) -> bool:
        """Return whether any of these slots has penalties."""
        return self._written is not None and any(not penalties.none for penalties in self._of[slots])

    def apply(self, logits_SRV: Tensor, drafts_SG: Tensor | None, slots: slice, tree: RowPaths | None = None) -> Tensor:
        """Return penalised logits (S, R, V).

        Row j comes after the first j drafts, in a tree after those of its path; without drafts all rows come after the
        committed tokens.
        """
        if not self.any(slots):
            return logits_SRV
        assert self._written is not None
        logits = logits_SRV.float() if logits_SRV.dtype != torch.float64 else logits_SRV
        counts = self._written[slots, None].expand_as(logits)
        if drafts_SG is not None and drafts_SG.shape[1]:
            drafts = torch.zeros_like(logits, dtype=torch.int32)
            drafts[:, 1:].scatter_(2, drafts_SG[..., None], 1)
            if tree is None:
                counts = counts + drafts.cumsum(1, dtype=torch.int32)
            else:
                counts = counts + (tree.sees_SRT.float() @ drafts.float()).int()
        repetition, presence, frequency = self._numbers[:, slots].to(logits.dtype)
        seen = (counts > 0) | self._prompt[slots, None]
        penalised = torch.where(logits > 0, logits / repetition, logits * repetition)
        result = torch.where(seen, penalised, logits)
        result = result - presence * (counts > 0) - frequency * counts + self._bias[slots, None].to(logits.dtype)
        # A slot without penalties keeps its logits as they are: adding zeros could turn -0.0.
        return torch.where(self._has[slots, None, None], result, logits)

    def wrote(self, tokens_SR: Tensor, accepted_S: Tensor, slots: slice) -> None:
        """Count the tokens[s, : accepted[s] + 1] that a pass has committed."""
        if not self.any(slots):
            return
        assert self._written is not None
        committed = torch.arange(tokens_SR.shape[1], device=tokens_SR.device) <= accepted_S[:, None]
        self._written[slots].scatter_add_(1, tokens_SR, committed.to(torch.int32))
