"""Decoding with a clock at every pass: rates, and the times between tokens as a reader of the stream sees them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from bench.synthetic_acceptance import SyntheticAcceptance
from headstart.decoding.engine import Engine, generate_all
from headstart.decoding.policy.policy import DraftPolicy
from headstart.decoding.settings import Request
from headstart.model.transformer import Transformer

Stamp = tuple[float, Sequence[int]]
"""Seconds on some clock, and how many tokens of each row the pass committed that ended then."""


@dataclass(frozen=True)
class Stream:
    """What was decoded, and when."""

    stamps: list[Stamp]
    tokens: list[list[int]]


@dataclass(frozen=True)
class Synthetic:
    """Drafts that are right at a given rate: see `SyntheticAcceptance`, for which these are arguments."""

    texts: list[list[int]]
    share: float
    seed: int = 0
    together: bool = False


def decode(
    model: Transformer,
    requests: Sequence[Request],
    *,
    exact: bool = True,
    policy: DraftPolicy | None = None,
    synthetic: Synthetic | None = None,
    engine: Engine | None = None,
) -> Stream:
    """Decodes `requests` as one batch. Replacing drafts is left out of the clock. `engine`: one that has decoded such
    requests before; on a GPU it has its graphs already."""
    engine = engine or engine_for(model, requests, exact=exact, policy=policy)
    generations = [engine.submit(request) for request in requests]
    stepper = None
    if synthetic is not None:
        texts = dict(zip(generations, synthetic.texts))
        stepper = SyntheticAcceptance(engine, texts, synthetic.share, seed=synthetic.seed, together=synthetic.together)
    stamps: list[Stamp] = []
    done = [0] * len(generations)
    while engine.busy:
        if stepper is None:
            engine.step()
        else:
            stepper.step()
        now = time.perf_counter() - (0.0 if stepper is None else stepper.seconds)
        written = [len(g.tokens) for g in generations]
        stamps.append((now, [after - before for after, before in zip(written, done)]))
        done = written
    return Stream(stamps, [g.tokens for g in generations])


def engine_for(
    model: Transformer, requests: Sequence[Request], *, exact: bool = True, policy: DraftPolicy | None = None
) -> Engine:
    """An engine that decodes `requests` as one batch."""
    context = max(len(r.prompt) + r.max_new_tokens for r in requests)
    return Engine(model, slots=len(requests), context=context, exact=exact, policy=policy, prefill_budget=None)


def plain_texts(model: Transformer, requests: Sequence[Request]) -> list[list[int]]:
    """What `requests` write, decoded plainly and exactly, and what follows as far as a window reaches past the end."""
    more = model.config.heads
    plain = [replace(r, heads=1, max_new_tokens=r.max_new_tokens + more) for r in requests]
    context = max(len(r.prompt) + r.max_new_tokens for r in plain)
    engine = Engine(model, slots=len(plain), context=context, prefill_budget=None)
    return [g.tokens for g in generate_all(engine, plain)]


def full(stamps: Sequence[Stamp]) -> Sequence[Stamp]:
    """The stamps during which every row writes: from the first one at which all have begun to the last one before some
    row has ended. So a batch whose rows accept more or less is not judged by its last row's tail."""
    begun, first = list(stamps[0][1]), 0
    while not all(begun):
        first += 1
        begun = [a + b for a, b in zip(begun, stamps[first][1])]
    last = first
    while last + 1 < len(stamps) and all(stamps[last + 1][1]):
        last += 1
    return stamps[first : last + 1]


def tokens_per_second(stamps: Sequence[Stamp]) -> float:
    """Of all rows together, while all of them write; the first pass, which reads the prompts, is not counted."""
    kept = full(stamps)
    return sum(sum(counts) for _, counts in kept[1:]) / (kept[-1][0] - kept[0][0])


def tokens_per_pass(stamps: Sequence[Stamp]) -> float:
    """Of a row, in the passes that `tokens_per_second` counts."""
    kept = full(stamps)[1:]
    return statistics.fmean(count for _, counts in kept for count in counts)


def gaps(stamps: Sequence[Stamp]) -> tuple[list[float], list[float]]:
    """Seconds between passes, and between the tokens of each row as they are streamed: those of one pass arrive at
    once, so all but its first have a gap of 0."""
    kept = full(stamps)
    passes = [after[0] - before[0] for before, after in pairwise(kept)]
    tokens: list[float] = []
    for gap, (_, counts) in zip(passes, kept[1:]):
        for count in counts:
            tokens += [gap] + [0.0] * (count - 1)
    return passes, tokens


def percentile(values: Sequence[float], percent: float) -> float:
    """By straight lines between the ordered values."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
