"""The decoding half of the demo: the same held-out prompts, decoded plainly and with more and more heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from headstart.api import LanguageModel
from headstart.data.textstream import TextStream
from headstart.decoding.engine import Generation, Request, generate_all
from headstart.decoding.sampling import Sampling
from headstart.demo.report import DecodingRow, Sample
from headstart.evaluation.repetition import repeated


@dataclass
class _Total:
    tokens: int = 0
    passes: int = 0
    seconds: float = 0.0
    outputs: list[list[int]] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def add(self, generation: Generation) -> None:
        stats = generation.stats
        self.tokens += stats.tokens
        self.passes += stats.passes
        self.seconds += stats.seconds - stats.prefill_seconds
        self.outputs.append(generation.tokens)
        pad = [0] * (len(stats.drafted) - len(self.drafted))
        self.drafted = [a + b for a, b in zip(self.drafted + pad, stats.drafted)]
        self.accepted = [a + b for a, b in zip(self.accepted + pad, stats.accepted)]


def compare(
    model: LanguageModel, prompts: Sequence[tuple[int, ...]], new_tokens: int, temperature: float, heads: Sequence[int]
) -> tuple[list[DecodingRow], DecodingRow, float]:
    """Rows for each number of `heads` (the first of them 1: plain exact decoding), the row of plain decoding
    with exact=False, and how much of the output repeats itself. Variants take turns on every prompt, so
    that a busy moment meets them all."""
    totals = {k: _Total() for k in heads}
    fastest = _Total()
    exact = model.engine(1, len(prompts[0]) + new_tokens, exact=True)
    small = model.engine(1, len(prompts[0]) + new_tokens, exact=False)
    for i, prompt in enumerate(prompts):
        request = Request(prompt, new_tokens, Sampling(temperature=temperature, seed=i))
        for k in heads:
            totals[k].add(generate_all(exact, [replace(request, heads=k)])[0])
        fastest.add(generate_all(small, [replace(request, heads=1)])[0])
    plain = totals[heads[0]]

    def row(k: int, total: _Total) -> DecodingRow:
        speed = total.tokens / total.seconds
        return DecodingRow(
            heads=k,
            tokens_per_second=speed,
            tokens_per_pass=total.tokens / total.passes,
            speedup=speed / (plain.tokens / plain.seconds),
            identical=total.outputs == plain.outputs,
            acceptance=[a / d if d else 0.0 for a, d in zip(total.accepted, total.drafted)],
        )

    return [row(k, total) for k, total in totals.items()], row(1, fastest), repeated(plain.outputs)


def sample(model: LanguageModel, prompt: tuple[int, ...], new_tokens: int, sampling: Sampling) -> Sample:
    """A continuation as pieces of text, each with the head that proposed its last token."""
    generation = generate_all(model.engine(1, len(prompt) + new_tokens), [Request(prompt, new_tokens, sampling)])[0]
    stream = TextStream(model.tokenizer)
    pieces = [(stream.push([token]), origin) for token, origin in zip(generation.tokens, generation.origins)]
    pieces.append((stream.finish(), 1))
    return Sample(model.tokenizer.decode(prompt), [(text, origin) for text, origin in pieces if text])
