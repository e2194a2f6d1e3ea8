"""Measure speculative decoding: answers with the drafts of every pass, and what follows from many of them.

The engine (`decode_all`) and a server (`server_client.py`) fill the same `Answer`, and `summarize` reads only these.
Names are those of vLLM's per-request metrics, if it has one. Definitions:

- tokens per pass (tau): all tokens committed, end tokens included, over all passes; exactly 1 in plain decoding.
- mean acceptance length: 1 + accepted drafts, over the passes that had drafts, as vLLM and Spec-Bench count.
- acceptance of draft j: *unconditional* of the passes that fed a draft j, *conditional* of those that accepted all
  drafts before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from headstart.decoding.engine import Engine
from headstart.decoding.generation import Generation
from headstart.decoding.settings import Request
from headstart.evaluation.intervals import Estimate, resample

PLACES = (64, 128, 256, 512)
"""Ends of the parts of an output in which acceptance is counted apart, in tokens."""
GRAM = 8
"""Tokens of the pieces whose repetition is counted."""


class TooLong(Exception):
    """Report a prompt that the model has no room for."""


@dataclass
class Answer:
    """One answer and its costs.

    Attributes:
        text: the answer.
        prompt_tokens: tokens read.
        tokens: tokens committed, end tokens included.
        seconds: time of decoding, without reading the prompt.
        prompt_seconds: time of reading the prompt; from a server, to the first token.
        passes: passes of the model after the prompt; None if a server does not report drafts.
        num_draft_tokens: drafts fed.
        num_accepted_draft_tokens: drafts accepted.
        num_spec_tokens: the most drafts of a pass.
        per_step_drafted: drafts or depths of a tree that each pass fed, 0 included; empty if unknown.
        per_step_accepted: drafts that each pass accepted.
        ordered: whether the passes stand in the order of the output.
        repeated: pieces of GRAM tokens that occurred before in the answer, and all such pieces.
        finish_reason: the engine's or the server's.
        output: token ids without end tokens, which records leave out; empty from a server.
    """

    text: str
    prompt_tokens: int
    tokens: int
    seconds: float
    prompt_seconds: float
    passes: int | None = None
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    num_spec_tokens: int = 0
    per_step_drafted: list[int] = field(default_factory=list)
    per_step_accepted: list[int] = field(default_factory=list)
    ordered: bool = True
    repeated: tuple[int, int] = (0, 0)
    finish_reason: str = ""
    output: list[int] = field(default_factory=list, repr=False)

    def record(self) -> dict[str, Any]:
        """Return plain data, without fields at their defaults."""
        kept = asdict(replace(self, output=[]))
        return {each.name: kept[each.name] for each in fields(self) if each.default != kept[each.name] != []}


class _Passes:
    """The drafts that each pass of one generation fed and accepted, read off its counts after each step."""

    def __init__(self) -> None:
        self.drafted: list[int] = []
        self.accepted: list[int] = []
        self._seen = (0, 0, 0)

    def observe(self, generation: Generation) -> None:
        stats = generation.stats
        fed = sum(stats.drafted) + stats.looked_up + stats.forced
        now = (stats.passes, fed, sum(stats.accepted) + stats.looked_up_accepted)
        if now[0] > self._seen[0]:
            self.drafted.append(now[1] - self._seen[1])
            self.accepted.append(now[2] - self._seen[2])
            self._seen = now


def decode_all(
    engine: Engine, requests: Sequence[Request], progress: Callable[[int], None] = lambda finished: None
) -> list[Answer]:
    """Decode `requests` to their ends, as many at once as the engine has slots; return the answers in order.

    `progress` gets the number of requests that ended in each step. With one slot, the seconds of an answer are its own.
    """
    generations = [engine.submit(request) for request in requests]
    passes = {generation: _Passes() for generation in generations}
    while engine.busy:
        finished = 0
        for generation, _ in engine.step():
            passes[generation].observe(generation)
            finished += generation.finished
        progress(finished)
    return [_answer(generation, passes[generation], engine.width - 1) for generation in generations]


def _answer(generation: Generation, passes: _Passes, most: int) -> Answer:
    stats = generation.stats
    return Answer(
        text=generation.text,
        prompt_tokens=len(generation.request.prompt),
        tokens=stats.tokens + stats.ends,
        seconds=stats.seconds - stats.prefill_seconds,
        prompt_seconds=stats.prefill_seconds,
        passes=stats.passes,
        num_draft_tokens=sum(passes.drafted) + stats.siblings,
        num_accepted_draft_tokens=sum(passes.accepted),
        num_spec_tokens=most,
        per_step_drafted=passes.drafted,
        per_step_accepted=passes.accepted,
        repeated=count_repeated(generation.tokens),
        finish_reason=generation.finish_reason or "",
        output=generation.tokens,
    )


def count_repeated(tokens: Sequence[Any], size: int = GRAM) -> tuple[int, int]:
    """Return how many `size`-grams of a sequence occurred in it before, and how many it has."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return len(grams) - len(set(grams)), len(grams)


@dataclass(frozen=True)
class Pair:
    """The answers of one prompt, one for each turn: with drafts, and plain ones unless only drafts were measured."""

    drafted: Sequence[Answer]
    plain: Sequence[Answer] = ()
    equal: int = 0
    """Answers with the tokens of the plain ones."""
    other: Sequence[Answer] = ()
    """Answers to the same prompt in another run."""


def summarize(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Return what at least one prompt's answers show, as plain data; intervals are from resampled prompts."""
    answers = [answer for pair in pairs for answer in pair.drafted]
    tokens, seconds = sum(a.tokens for a in answers), sum(a.seconds for a in answers)
    again, grams = (sum(a.repeated[i] for a in answers) for i in (0, 1))
    found: dict[str, Any] = {
        "prompts": len(pairs),
        "answers": len(answers),
        "tokens": tokens,
        "seconds": seconds,
        "prompt_tokens": sum(a.prompt_tokens for a in answers),
        "prompt_seconds": sum(a.prompt_seconds for a in answers),
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "repeated_8_grams": again / grams if grams else 0.0,
    }
    known = [pair for pair in pairs if all(answer.passes for answer in pair.drafted)]
    if known:
        passed = [[sum(a.tokens for a in p.drafted), sum(a.passes or 0 for a in p.drafted)] for p in known]
        found["passes"] = sum(row[1] for row in passed)
        found["tokens_per_pass"] = asdict(resample(passed, lambda t, p: t / p))
        of_known = [answer for pair in known for answer in pair.drafted]
        found["speculative_decoding"] = acceptance(of_known)
        found["acceptance_by_position"] = by_position(of_known)
        found["acceptance_by_place"] = by_place(of_known)
    compared = [pair for pair in pairs if pair.plain]
    if compared:
        found["speedup"] = asdict(_speedup([(p.plain, p.drafted) for p in compared]))
        found["speedup_with_prompt"] = asdict(_speedup([(p.plain, p.drafted) for p in compared], prompt=True))
        found["plain_tokens_per_second"] = sum(a.tokens for p in compared for a in p.plain) / sum(
            a.seconds for p in compared for a in p.plain
        )
        found["equal"] = sum(pair.equal for pair in compared)
        found["compared"] = sum(len(pair.plain) for pair in compared)
    others = [(pair.other, pair.drafted) for pair in pairs if pair.other]
    if others:
        found["speedup_over_other"] = asdict(_speedup(others))
        found["speedup_over_other_with_prompt"] = asdict(_speedup(others, prompt=True))
    return found


def _speedup(pairs: Sequence[tuple[Sequence[Answer], Sequence[Answer]]], prompt: bool = False) -> Estimate:
    """Estimate the time of a token in the first answers over that in the second, each pair of one prompt."""
    rows = [
        [
            total
            for answers in pair
            for total in (
                sum(a.seconds + (a.prompt_seconds if prompt else 0.0) for a in answers),
                sum(a.tokens for a in answers),
            )
        ]
        for pair in pairs
    ]
    return resample(rows, lambda plain, plain_tokens, ours, tokens: (plain / plain_tokens) / (ours / tokens))


def acceptance(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return the fields of vLLM's `metrics.speculative_decoding`, summed over answers; passes without drafts are out.

    Histograms are left out if a server reports only totals.
    """
    drafted, accepted = (sum(getattr(a, f"num_{kind}_tokens") for a in answers) for kind in ("draft", "accepted_draft"))
    most = max((a.num_spec_tokens for a in answers), default=0)
    steps = [(d, a) for each in answers for d, a in zip(each.per_step_drafted, each.per_step_accepted) if d]
    found: dict[str, Any] = {
        "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
        "num_spec_tokens": most,
    }
    if any(a.passes and not a.per_step_drafted for a in answers):
        return found
    by_length = {length: [0] * (length + 1) for length in sorted({d for d, _ in steps})}
    for length, count in steps:
        by_length[length][count] += 1
    histogram = [sum(row[count] for row in by_length.values() if count < len(row)) for count in range(most + 1)]
    return {
        "mean_acceptance_length": 1 + accepted / len(steps) if steps else 1.0,
        **found,
        "num_spec_steps": len(steps),
        "acceptance_histogram": histogram,
        "acceptance_histogram_by_draft_length": {str(length): row for length, row in by_length.items()},
    }


def by_position(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Return the acceptance of drafts 1, 2, ... of a pass, by both definitions."""
    steps = [step for each in answers for step in zip(each.per_step_drafted, each.per_step_accepted)]
    found = []
    for position in range(1, max((drafted for drafted, _ in steps), default=0) + 1):
        fed = sum(drafted >= position for drafted, _ in steps)
        reached = sum(drafted >= position and accepted >= position - 1 for drafted, accepted in steps)
        right = sum(accepted >= position for _, accepted in steps)
        row = {"position": position, "fed": fed, "reached": reached, "accepted": right, "unconditional": right / fed}
        found.append({**row, "conditional": right / reached if reached else 0.0})
    return found


def by_place(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Return tokens per pass of the passes that begin within each of PLACES; answers without an order are left out."""
    edges = (0, *PLACES)
    tokens, passes = [0] * len(edges), [0] * len(edges)
    for answer in answers:
        if not answer.ordered:
            continue
        written = 0
        for accepted in answer.per_step_accepted:
            committed = min(accepted + 1, answer.tokens - written)
            place = sum(written >= edge for edge in PLACES)
            tokens[place] += committed
            passes[place] += 1
            written += committed
    return [
        {
            "from": edge + 1,
            "to": edges[i + 1] if i + 1 < len(edges) else None,
            "passes": passes[i],
            "tokens_per_pass": tokens[i] / passes[i],
        }
        for i, edge in enumerate(edges)
        if passes[i]
    ]
