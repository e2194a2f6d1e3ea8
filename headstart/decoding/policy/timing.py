"""Time passes so that their ratios hold: variants take turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from headstart.console import Progress
from headstart.decoding.drafters.tree import DraftTree
from headstart.decoding.engine import Engine
from headstart.decoding.generation import Generation, Stats
from headstart.decoding.policy.calibration import PassCosts, Tuning
from headstart.decoding.policy.policy import DraftPolicy
from headstart.decoding.policy.timing_step import Step
from headstart.decoding.settings import Request, Sampling
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer


def interleave(
    variants: Mapping[str, Callable[[], float]], repetitions: int, warmup: int = 1
) -> dict[str, list[float]]:
    """What each variant returns, A B A B ...: a machine that slows down slows all of them alike.

    The first `warmup` rounds are not counted.
    """
    values: dict[str, list[float]] = {name: [] for name in variants}
    for repetition in range(-warmup, repetitions):
        for name, measure in variants.items():
            value = measure()
            if repetition >= 0:
                values[name].append(value)
    return values


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """A variant for `interleave`: the seconds that `call` takes. It must wait for the device itself."""

    def measure() -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return measure


def ratios(numerators: Sequence[float], denominators: Sequence[float], block: int = 1) -> list[float]:
    """Of the medians of each `block` rounds, so that what disturbs a stretch of rounds cancels.

    Blocks of several rounds are for short measurements: a single pass may be hit by an interruption as long as itself.
    """
    block = min(block, len(numerators))
    starts = range(0, len(numerators) - block + 1, block)
    return [
        statistics.median(numerators[i : i + block]) / statistics.median(denominators[i : i + block]) for i in starts
    ]


PASSES_OF_A_BLOCK = 6
"""The `block` of ratios between single passes."""


TREE_ROWS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Of the trees that `pass_costs` times; costs between are judged by the nearest two."""


DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def pass_costs(
    model: Transformer,
    batches: tuple[int, ...],
    length: int,
    seconds: float,
    tree: DraftTree | None = None,
    temperature: float = 0.0,
) -> PassCosts:
    """Milliseconds of passes of `model`, in decoding form, at `length` cached positions, with all that the engine does
    for one, timed for `seconds` at each of the batch sizes, ascending. Only the ratios to plain passes matter to the
    policy, so those are what is taken with care: of passes a few milliseconds apart, over long enough that neighbours
    on the machine come and go. With a `tree` passes of its beginnings too; with a `temperature` all are sampled."""
    n = model.config.heads
    plain, drafting, trees = [], [], []
    tree_rows = () if tree is None else tuple(sorted({r for r in TREE_ROWS if r < tree.rows} | {tree.rows}))
    with Progress("passes, sampled" if temperature else "passes, greedy", len(batches), unit="batch sizes") as bar:
        for slots in batches:
            step = partial(Step, model, slots=slots, length=length, sampling=Sampling(temperature))
            variants = {"0": timed(step(drafting=False))}
            variants |= {str(rows): timed(step(rows=rows)) for rows in range(1, n + 1)}
            variants |= {f"tree {rows}": timed(step(rows=rows, tree=tree)) for rows in tree_rows}
            interleave(variants, 0, warmup=3)
            seen: dict[str, list[float]] = {w: [] for w in variants}
            began = time.perf_counter()
            while not seen["0"] or time.perf_counter() - began < seconds:
                for w, values in interleave(variants, PASSES_OF_A_BLOCK, warmup=0).items():
                    seen[w] += values
            plain.append(1e3 * statistics.median(seen["0"]))
            over = [statistics.median(ratios(times, seen["0"], PASSES_OF_A_BLOCK)) for times in seen.values()]
            drafting.append(tuple(plain[-1] * ratio for ratio in over[1 : n + 1]))
            trees.append(tuple(plain[-1] * ratio for ratio in over[n + 1 :]))
            bar.advance(1)
    return PassCosts(batches, tuple(plain), tuple(drafting), tree_rows, tuple(trees) if tree_rows else ())


def random_model(config: ModelConfig, dtype: str, device: str) -> Transformer:
    """Random weights; their values do not matter to what a pass costs."""
    torch.manual_seed(0)
    with torch.device(device):  # billions of weights are drawn in seconds on a GPU, in minutes on a CPU
        model = Transformer(config)
    return model.to(DTYPES[dtype])


@dataclass
class Decoded:
    """What one variant decoded."""

    generations: list[Generation]
    seconds: float
    """Of passes alone: prompts are read before."""

    @property
    def stats(self) -> Stats:
        return Stats.summed([g.stats for g in self.generations])

    @property
    def tokens_per_second(self) -> float:
        return self.stats.tokens / self.seconds

    @property
    def tokens(self) -> list[list[int]]:
        return [g.tokens for g in self.generations]


def decode(
    model: Transformer,
    requests: Sequence[Request],
    batch: int = 1,
    exact: bool = True,
    tuning: Tuning | None = None,
) -> Decoded:
    """Decodes `requests`, `batch` at a time. End tokens do not end a text, so that all variants do the same work."""
    done = Decoded([], 0.0)
    context = max(len(r.prompt) + r.max_new_tokens for r in requests)
    for start in range(0, len(requests), batch):
        group = requests[start : start + batch]
        policy = None if tuning is None else DraftPolicy(tuning)
        engine = Engine(model, slots=len(group), context=context, exact=exact, policy=policy, prefill_budget=None)
        generations = [engine.submit(request) for request in group]
        began = time.perf_counter()
        while engine.busy:
            engine.step()
        done.seconds += time.perf_counter() - began - sum(g.stats.prefill_seconds for g in generations)
        done.generations += generations
    return done


def first_difference(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """(text, token) at which two lists of outputs first differ, both from 0; None where they are identical."""
    for text, (x, y) in enumerate(zip(a, b)):
        for token, (p, q) in enumerate(zip(x, y)):
            if p != q:
                return text, token
        if len(x) != len(y):
            return text, min(len(x), len(y))
    return None
