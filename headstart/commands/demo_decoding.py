"""The decoding half of the demo: the same held-out prompts, decoded plainly and with more and more heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from headstart.api import LanguageModel
from headstart.decoding.engine import generate_all
from headstart.decoding.generation import Generation, OriginStream, Stats
from headstart.decoding.settings import Request, Sampling
from headstart.evaluation.repetition import repeated
from headstart.reports.demo import DecodingRow, Sample


def compare(
    model: LanguageModel, prompts: Sequence[tuple[int, ...]], new_tokens: int, temperature: float, heads: Sequence[int]
) -> tuple[list[DecodingRow], DecodingRow, float]:
    """Rows for each number of `heads` (the first of them 1: plain exact decoding), the row of plain decoding
    with exact=False, and how much of the output repeats itself. Variants take turns on every prompt, so
    that a busy moment meets them all."""
    written: dict[int, list[Generation]] = {k: [] for k in heads}
    fastest: list[Generation] = []
    exact = model.engine(1, len(prompts[0]) + new_tokens, exact=True)
    small = model.engine(1, len(prompts[0]) + new_tokens, exact=False)
    for i, prompt in enumerate(prompts):
        request = Request(prompt, new_tokens, Sampling(temperature=temperature, seed=i))
        for k in heads:
            written[k] += generate_all(exact, [replace(request, heads=k)])
        fastest += generate_all(small, [replace(request, heads=1)])
    plain = written[heads[0]]
    outputs = [generation.tokens for generation in plain]

    def row(k: int, generations: Sequence[Generation]) -> DecodingRow:
        stats = Stats.summed([generation.stats for generation in generations])
        return DecodingRow(
            heads=k,
            tokens_per_second=_speed(generations),
            tokens_per_pass=stats.tokens_per_pass,
            speedup=_speed(generations) / _speed(plain),
            identical=[generation.tokens for generation in generations] == outputs,
            acceptance=stats.acceptance,
        )

    return [row(k, generations) for k, generations in written.items()], row(1, fastest), repeated(outputs)


def _speed(generations: Sequence[Generation]) -> float:
    """Tokens per second, without the prompts' prefill."""
    stats = Stats.summed([generation.stats for generation in generations])
    return stats.tokens / (stats.seconds - stats.prefill_seconds)


def sample(model: LanguageModel, prompt: tuple[int, ...], new_tokens: int, sampling: Sampling) -> Sample:
    """A continuation with all heads, as pieces of text, each with the head that proposed it."""
    request = Request(prompt, new_tokens, sampling, heads=model.config.heads)
    generation = generate_all(model.engine(1, len(prompt) + new_tokens), [request])[0]
    return Sample(model.tokenizer.decode(prompt), OriginStream(generation, model.tokenizer).new())
