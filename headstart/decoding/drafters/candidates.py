"""The tokens that heads draft from: those of their draft vocabulary, or all.

Greedy drafts, and those of dynamic trees, are chosen among draft ids, because that costs less. Penalties, constraints,
rules that weigh drafts, and elsewhere noise speak of all tokens: with them, logits are widened first, -inf for tokens
outside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from headstart.decoding.sampling import Noise
from headstart.decoding.state import DecodingState
from headstart.model.draft_vocabulary import widen


class Candidates:
    """The candidates of the drafts of one pass; `C` in shapes is their number."""

    def __init__(self, d2t: Tensor | None, state: DecodingState, slots: slice, tree: bool = False) -> None:
        """Describe the candidates.

        Args:
            d2t: the draft vocabulary of the heads (None: all tokens).
            state: the state of decoding.
            slots: the slots of the pass.
            tree: whether drafts are the nodes of dynamic trees, which read the noise of candidates alone.
        """
        every = state.penalties.any(slots) or state.constraints.any(slots)
        every = every or (state.sampling.any_sampled(slots) and not tree) or not state.sampling.plain_rules(slots)
        self._d2t, self._vocab_size = d2t, state.windows.vocab_size
        self._chosen = None if every else d2t
        """Token ids of the candidates (None: all)."""

    def logits(self, drafted: Tensor) -> Tensor:
        """Return the logits (..., C), given those over the heads' draft vocabulary."""
        if self._d2t is None or self._chosen is not None:
            return drafted
        return widen(drafted, self._d2t, self._vocab_size, -math.inf)

    def noise(self, noise_SR: Noise) -> Tensor:
        """Return the noise (S, R, C) of the candidates."""
        values_SRV = noise_SR.values(self._vocab_size)
        return values_SRV if self._chosen is None else values_SRV[..., self._chosen]

    def tokens(self, chosen: Tensor) -> Tensor:
        """Return the token ids of chosen candidates."""
        return chosen if self._chosen is None else self._chosen[chosen]


@dataclass
class Proposal:
    """Drafts of heads 2..K as candidates, and the logits that they were chosen from."""

    logits_SKC: Tensor
    chosen_SK: Tensor
    """The best candidate of each head."""
