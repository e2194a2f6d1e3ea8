"""The tokens that heads draft from: those of their draft vocabulary, or all.

Greedy drafts are chosen among draft ids, because that costs less. Noise, penalties, constraints and rules that weigh
drafts speak of all tokens: with them, logits are widened first, -inf for tokens outside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from headstart.decoding.state import DecodingState
from headstart.model.draft_vocabulary import widen


class Candidates:
    """The candidates of the drafts of one pass; `C` in shapes is their number."""

    def __init__(self, d2t: Tensor | None, state: DecodingState, slots: slice) -> None:
        """Describe the candidates.

        Args:
            d2t: the draft vocabulary of the heads (None: all tokens).
            state: the state of decoding.
            slots: the slots of the pass.
        """
        every = state.penalties.any(slots) or state.constraints.any(slots)
        every = every or state.sampling.any_sampled(slots) or not state.sampling.plain_rules(slots)
        self._d2t, self._vocab_size = d2t, state.windows.vocab_size
        self._chosen = None if every else d2t
        """Token ids of the candidates (None: all)."""

    def logits(self, drafted: Tensor) -> Tensor:
        """Return the logits (..., C), given those over the heads' draft vocabulary."""
        if self._d2t is None or self._chosen is not None:
            return drafted
        return widen(drafted, self._d2t, self._vocab_size, -math.inf)

    def tokens(self, chosen: Tensor) -> Tensor:
        """Return the token ids of chosen candidates."""
        return chosen if self._chosen is None else self._chosen[chosen]


@dataclass
class Proposal:
    """Drafts of heads 2..K as candidates, and the logits that they were chosen from."""

    logits_SKC: Tensor
    chosen_SK: Tensor
    """The best candidate of each head."""
