"""Measure how many drafts a model accepts in its own outputs, and how often its outputs repeat themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from headstart.decoding.engine import Engine
from headstart.decoding.kernels.pack import PackedUnembedding
from headstart.decoding.sampling import position_noise
from headstart.decoding.settings import Request, Sampling
from headstart.evaluation.speculation import GRAM, Pair, count_repeated, decode_all, summarize
from headstart.model.transformer import Transformer


@dataclass(frozen=True)
class FreeRunning:
    """The result of decoding with all heads.

    Attributes:
        tokens: tokens of all outputs.
        passes: passes that they took.
        tokens_per_pass: 1 + accepted drafts, the mean over passes.
        acceptance: entry k-2 is the share of the passes fed a draft of head k that accepted it.
        repeated_8_grams: share of 8-grams that occurred in the same output before.
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
    """Continue `prompts` with all heads, greedily (temperature 0) or sampled; prompt i has seed i.

    An output ends where the model ends it or at a token of `ends[i]`, so drafts beyond its end do not count.
    """
    requests = [
        Request(tuple(prompt), new_tokens, Sampling(temperature, seed=i), ends=own)
        for i, (prompt, own) in enumerate(zip(prompts, ends or [frozenset[int]()] * len(prompts)))
    ]
    found = summarize([Pair([answer]) for answer in decode_all(engine, requests, progress)])
    shares = [row["unconditional"] for row in found["acceptance_by_position"]]
    return FreeRunning(
        tokens=found["tokens"],
        passes=found["passes"],
        tokens_per_pass=found["tokens_per_pass"]["value"],
        acceptance=shares + [0.0] * (engine.model.config.drafting_heads - 1 - len(shares)),
        repeated_8_grams=found["repeated_8_grams"],
    )


def repeated(outputs: Sequence[Sequence[int]], size: int = GRAM) -> float:
    """Return the share of `size`-grams that occurred in the same output before.

    A loop is easy to draft: with many repetitions, tokens per pass say little about a model.
    """
    counts = [count_repeated(output, size) for output in outputs]
    seen = sum(all_of_it for _, all_of_it in counts)
    return sum(again for again, _ in counts) / seen if seen else 0.0


@torch.no_grad()
def draft_ranks(
    model: Transformer, text: Sequence[int], rows: Sequence[int], sampling: Sampling
) -> list[list[tuple[float, int]]]:
    """Return the confidence of each head at some positions, and the rank of the right token among its candidates.

    Candidates are ranked like drafts: by logits, or at a temperature with the noise of their position. Top-k, top-p and
    min-p are left out. `rows` are positions of the tokens `text` with n tokens after them. For each the list has entry
    k-2 for head k = 2..n: the probability of its best candidate, and the rank of the token k later in the text.
    """
    n = model.config.heads
    tokens = torch.tensor([text], device=model.device)
    at = torch.tensor(rows, device=tokens.device)
    latents = model.latents(tokens, list(range(2, n + 1)))
    found: list[list[tuple[float, int]]] = []
    for k in range(2, n + 1):
        unembedding = model.unembedding
        assert isinstance(unembedding, PackedUnembedding)
        logits = unembedding(latents[k][:, at], k)[0].float() / (sampling.temperature or 1)  # (P, V)
        scores = logits
        if sampling.temperature:
            scores = logits + position_noise(torch.full_like(at, sampling.seed), at + k, logits.shape[-1])
        right = scores.gather(-1, tokens[0, at + k, None])
        ranks = (scores > right).sum(-1)
        confidence = logits.softmax(-1).gather(-1, scores.argmax(-1, keepdim=True))[:, 0]
        found.append(list(zip(confidence.tolist(), ranks.tolist())))
    return [list(heads) for heads in zip(*found)]
