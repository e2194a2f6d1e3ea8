"""Decode with a clock at every pass, with a model's own drafts or with drafts that are right at a given rate.

Synthetic acceptance measures what several tokens per pass bring without a model trained for it. The output is decoded
plainly first. Then, before each pass, the drafts in the windows are replaced by what comes next in that output, as far
as they are to be right. Passes, rows and caches are those of any decoding, and the output stays that of plain decoding.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.generation import Generation, Stats
from headstart.decoding.policy.calibration import EDGES, AcceptanceTable
from headstart.decoding.policy.policy import DraftPolicy
from headstart.decoding.settings import Request
from headstart.errors import UsageError
from headstart.model.transformer import Transformer

Stamp = tuple[float, Sequence[int]]
"""Seconds on some clock, and the number of tokens of each row that the pass which ended then committed."""


@dataclass(frozen=True)
class Stream:
    """Decoded sequences, with the times of their passes."""

    stamps: list[Stamp]
    tokens: list[list[int]]
    stats: Stats


class Synthetic:
    """Drafts that are right at a given rate. The same outputs and seed make the same passes.

    Args:
        outputs: the known output of each request, continued past its end, see `plain_outputs`.
        share: the probability that a draft is right after right drafts.
        seed: of the draws.
    """

    def __init__(self, outputs: Sequence[Sequence[int]], share: float, seed: int = 0) -> None:
        self.outputs, self.share = outputs, share
        self._random = random.Random(seed)

    def replace_drafts(self, engine: Engine, generations: Sequence[Generation]) -> None:
        """Replace the drafts of the next pass by what comes next in the output, as far as they are to be right."""
        drafts = engine.model.config.heads - 1
        window = engine.state.windows.tokens_SW
        rows = [[0] * drafts for _ in window]
        for generation, output in zip(generations, self.outputs):
            if generation.slot is None or generation.finished:
                continue
            right = next((i for i in range(drafts) if self._random.random() >= self.share), drafts)
            ahead = list(output[len(generation.tokens) :][:drafts])
            ahead += [0] * (drafts - len(ahead))
            if right < drafts:
                ahead[right] = (ahead[right] + 1) % engine.model.config.vocab_size
            rows[generation.slot] = ahead
        window[:, 1 : 1 + drafts] = torch.tensor(rows, device=window.device)


def decode(
    model: Transformer,
    requests: Sequence[Request],
    *,
    exact: bool = True,
    policy: DraftPolicy | None = None,
    synthetic: Synthetic | None = None,
    engine: Engine | None = None,
) -> Stream:
    """Decode `requests` as one batch. The clock stands still while drafts are replaced.

    An `engine` that has decoded such requests before has captured its graphs already, on a GPU.
    """
    engine = engine or engine_for(model, requests, exact=exact, policy=policy)
    generations = [engine.submit(request) for request in requests]
    stamps: list[Stamp] = []
    done, paused = [0] * len(generations), 0.0
    while engine.busy:
        engine.step()
        now = time.perf_counter()
        written = [len(g.tokens) for g in generations]
        stamps.append((now - paused, [after - before for after, before in zip(written, done)]))
        done = written
        if synthetic is not None:
            synthetic.replace_drafts(engine, generations)
            paused += time.perf_counter() - now
    return Stream(stamps, [g.tokens for g in generations], Stats.summed([g.stats for g in generations]))


def engine_for(
    model: Transformer, requests: Sequence[Request], *, exact: bool = True, policy: DraftPolicy | None = None
) -> Engine:
    """Return an engine that decodes `requests` as one batch."""
    context = max(len(r.prompt) + r.max_new_tokens for r in requests)
    return Engine(
        model, EngineConfig(slots=len(requests), context=context, exact=exact, prefill_budget=None), policy=policy
    )


def plain_outputs(model: Transformer, requests: Sequence[Request]) -> list[list[int]]:
    """Return the plain, exact outputs of `requests`, continued as far as a window reaches past their end."""
    beyond = model.config.heads
    plain = [replace(r, heads=1, max_new_tokens=r.max_new_tokens + beyond) for r in requests]
    return [g.tokens for g in generate_all(engine_for(model, plain), plain)]


def share_right(tokens_per_pass: float, heads: int) -> float:
    """Return the probability p that gives `tokens_per_pass` if each draft is right with p after right drafts.

    The tokens per pass are then 1 + p + p^2 + ... + p^(heads-1).
    """
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
    """Return what `headstart tune` would measure with such drafts: the confidence of a head says nothing."""
    return AcceptanceTable((share,) * (heads - 1), ((share,) * (len(EDGES) + 1),) * (heads - 1))


def full(stamps: Sequence[Stamp]) -> Sequence[Stamp]:
    """Return the stamps during which every row writes, so that the tail of the last row does not judge a batch.

    They begin with the first stamp at which all rows have begun, and end before some row has ended.
    """
    begun, first = list(stamps[0][1]), 0
    while not all(begun):
        first += 1
        begun = [a + b for a, b in zip(begun, stamps[first][1])]
    last = first
    while last + 1 < len(stamps) and all(stamps[last + 1][1]):
        last += 1
    return stamps[first : last + 1]


def tokens_per_second(*runs: Sequence[Stamp]) -> float:
    """Return the rate of all rows together while all of them write, without the first pass, which reads prompts."""
    kept = [full(stamps) for stamps in runs]
    tokens = sum(sum(counts) for stamps in kept for _, counts in stamps[1:])
    return tokens / sum(stamps[-1][0] - stamps[0][0] for stamps in kept)


def tokens_per_pass(stamps: Sequence[Stamp]) -> float:
    """Return the mean tokens of a row in the passes that `tokens_per_second` counts."""
    kept = full(stamps)[1:]
    return statistics.fmean(count for _, counts in kept for count in counts)


def gaps(stamps: Sequence[Stamp]) -> list[float]:
    """Return the seconds between passes."""
    return [after[0] - before[0] for before, after in pairwise(full(stamps))]


def p50_p95(seconds: Sequence[float]) -> str:
    """Return the two percentiles in ms, as a cell of a table."""
    if len(seconds) < 2:
        return ""
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    return f"{1e3 * cuts[9]:.3g} / {1e3 * cuts[18]:.3g}"


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of tokens with which both sequences begin."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
