"""Free running: what share of drafts a model accepts in texts that it writes itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headstart.decoding.engine import Engine
from headstart.decoding.generation import Stats
from headstart.decoding.settings import Request, Sampling
from headstart.evaluation.repetition import repeated


@dataclass(frozen=True)
class FreeRunning:
    """Decoding with all heads.

    tokens, passes, tokens_per_pass: written; 1 + accepted drafts.
    acceptance: share of passes that accepted the draft of head k, at k-2.
    repeated_8_grams: share of 8-grams that stood in the same output before.
    """

    tokens: int
    passes: int
    tokens_per_pass: float
    acceptance: list[float]
    repeated_8_grams: float


def run_freely(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    temperature: float,
    progress: Callable[[int], None] = lambda tokens: None,
    ends: Sequence[frozenset[int]] = (),
) -> FreeRunning:
    """Continues `prompts` with all heads, greedily (temperature 0) or sampled; prompt i with seed i. An output
    ends where the model ends it, or at a token of `ends[i]`: drafts of text that nobody asks for do not count."""
    generations = [
        engine.submit(Request(tuple(prompt), new_tokens, Sampling(temperature, seed=i), ends=own))
        for i, (prompt, own) in enumerate(zip(prompts, ends or [frozenset[int]()] * len(prompts)))
    ]
    while engine.busy:
        progress(sum(generation.finished for generation, _ in engine.step()))
    stats = Stats.summed([generation.stats for generation in generations])
    return FreeRunning(
        tokens=stats.tokens,
        passes=stats.passes,
        tokens_per_pass=stats.tokens_per_pass,
        acceptance=stats.acceptance,
        repeated_8_grams=repeated([generation.tokens for generation in generations]),
    )
