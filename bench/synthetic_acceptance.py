"""Drafts that are right at a given rate: what several tokens per pass bring, without a model that was trained for it.

For benchmarks alone. The text is decoded plainly first; then, before each pass, the drafts in the windows are replaced
by what comes next in that text, up to the first that is to be wrong. Passes, rows and caches are those of any decoding,
and the output is that of plain decoding. Nothing in `decoding` knows of it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence

import torch

from headstart.decoding.engine import Engine
from headstart.decoding.generation import Generation
from headstart.decoding.policy.calibration import EDGES, AcceptanceTable
from headstart.errors import UsageError


def share_right(tokens_per_pass: float, heads: int) -> float:
    """The p for which drafts that are each right with probability p, as long as those before are, give so many tokens
    per pass with this many heads: 1 + p + p^2 + ... + p^(heads-1)."""
    if not 1 <= tokens_per_pass <= heads:
        raise UsageError(f"{tokens_per_pass} tokens per pass with {heads} heads: it must lie between 1 and {heads}")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(middle**j for j in range(heads)) < tokens_per_pass:
            low = middle
        else:
            high = middle
    return high


def acceptance_table(share: float, heads: int) -> AcceptanceTable:
    """What `headstart tune` would measure of such drafts: how sure a head is says nothing."""
    return AcceptanceTable((share,) * (heads - 1), ((share,) * (len(EDGES) + 1),) * (heads - 1))


class SyntheticAcceptance:
    """An engine whose drafts are right at a given rate. The same engine, seed and requests make the same passes.

    Args:
        texts: for each generation what it writes, known beforehand.
        share: the probability that a draft is right, if those before it are.
        together: all windows of a pass have as many right drafts; else each draws its own number.
    """

    def __init__(
        self,
        engine: Engine,
        texts: Mapping[Generation, Sequence[int]],
        share: float,
        *,
        seed: int = 0,
        together: bool = False,
    ) -> None:
        self.engine, self.texts, self.share, self.together = engine, texts, share, together
        self.seconds = 0.0
        """Spent on replacing drafts: no part of decoding."""
        self._random = random.Random(seed)
        self._vocab_size = engine.model.config.vocab_size

    def step(self) -> None:
        """A pass of the engine; then the drafts of the next one are replaced."""
        self.engine.step()
        began = time.perf_counter()
        drafts = self.engine.model.config.heads - 1
        window = self.engine.state.window_SW
        rows = [[0] * drafts for _ in window]
        right = self._right(drafts)
        for generation, text in self.texts.items():
            if generation.slot is None or generation.finished:
                continue
            if not self.together:
                right = self._right(drafts)
            ahead = list(text[len(generation.tokens) :][:drafts])
            ahead += [0] * (drafts - len(ahead))
            if right < drafts:
                ahead[right] = (ahead[right] + 1) % self._vocab_size
            rows[generation.slot] = ahead
        window[:, 1 : 1 + drafts] = torch.tensor(rows, device=window.device)
        self.seconds += time.perf_counter() - began

    def _right(self, drafts: int) -> int:
        right = 0
        while right < drafts and self._random.random() < self.share:
            right += 1
        return right
