"""Time decoding passes so that their ratios hold: variants take turns in one process."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from headstart.console import Progress
from headstart.decoding.drafters.tree import DraftTree, DynamicTree, TreeRows
from headstart.decoding.engine import SPAN, Engine, EngineConfig
from headstart.decoding.generation import Generation, Stats
from headstart.decoding.policy.calibration import AcceptanceTable, PassCosts, Tuning
from headstart.decoding.policy.policy import DraftPolicy
from headstart.decoding.settings import Request, Sampling
from headstart.decoding.state import PassPlan
from headstart.decoding.stopping import Stopper
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PASSES_OF_A_BLOCK = 6
"""The `block` of ratios between single passes."""
TREE_ROWS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Rows of the trees that `pass_costs` times; costs between lie on the line through the nearest two."""
ASSUMED_ACCEPTANCE = 0.8
"""The acceptance of drafts that decides which passes of more rows are worth timing."""
QUICK_LENGTH = 128
"""Cached positions of the passes that `quick_pass_costs` times."""
QUICK_ROUNDS, QUICK_SECONDS = (3, 128), 0.03
"""The least and the most rounds of timing one kind of pass; between them it ends after this many seconds."""
QUICK_TEMPERATURE = 0.8
"""The temperature of timed sampled passes. No other setting changes the cost of a pass as much as sampling does."""
LOOKUP_ROWS = 9
"""Most rows of passes that are timed for a model with one head, whose drafts come from prompt lookup."""
PATIENCE = 1.25
"""Rows that cost this many times what they could bring end the timing of more rows; a smaller factor may be noise."""
ENDLESS = 1 << 40


def interleave(
    variants: Mapping[str, Callable[[], float]], repetitions: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Call the variants in turn, A B A B ..., and return the values of each.

    A machine that slows down slows all of them alike. The first `warmup` rounds are not counted.
    """
    values: dict[str, list[float]] = {name: [] for name in variants}
    for repetition in range(-warmup, repetitions):
        for name, measure in variants.items():
            value = measure()
            if repetition >= 0:
                values[name].append(value)
    return values


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """Return a variant for `interleave` that gives the seconds of `call`, which must wait for the device itself."""

    def measure() -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return measure


def ratios(numerators: Sequence[float], denominators: Sequence[float], block: int = 1) -> list[float]:
    """Return the ratios between the medians of each `block` rounds, so that slow stretches of rounds cancel.

    Blocks of several rounds are for short measurements: an interruption may be as long as a single pass.
    """
    block = min(block, len(numerators))
    starts = range(0, len(numerators) - block + 1, block)
    return [
        statistics.median(numerators[i : i + block]) / statistics.median(denominators[i : i + block]) for i in starts
    ]


class FixedRows(DraftPolicy):
    """Feed the same number of rows in every pass, with all the work that a policy does to choose them."""

    def __init__(self, rows: int, heads: int, tree: DraftTree | DynamicTree | None) -> None:
        table = AcceptanceTable.uniform(0.5, heads, tree)
        trees = () if tree is None else ((tree.rows,), ((1.0,),))
        super().__init__(Tuning(table, table, PassCosts((1,), (1.0,), ((1.0,) * heads,), *trees)))
        self.rows = rows

    def plan(self, slots: int, prefixes: Sequence[Sequence[float]], sampled: bool = False) -> tuple[int, bool]:
        """Return the fixed number of rows, and that heads draft."""
        super().plan(slots, prefixes, sampled)
        return self.rows, True


class Step:
    """A step of an engine that decodes `slots` requests at `length` cached positions; call it to run it.

    It includes all that an engine does for a pass, because that is the cost that a policy weighs: `Pass` leaves out the
    bookkeeping of requests, the choice of rows and, for greedy requests, the noise. Windows have `rows` rows, of a
    `tree` its first ones; all heads draft, under a policy, or with `drafting` False none, in plain decoding of one row.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        rows: int = 1,
        drafting: bool = True,
        slots: int = 1,
        length: int = 128,
        sampling: Sampling | None = None,
        tree: DraftTree | DynamicTree | None = None,
    ) -> None:
        self.length = length
        policy = FixedRows(rows, model.config.heads, tree) if drafting else None
        self.engine = Engine(
            model, EngineConfig(slots=slots, context=length + 1, exact=False, tree=tree), policy=policy
        )
        self.generations: list[Generation] = []
        generator = torch.Generator().manual_seed(0)
        for slot in range(slots):
            prompt = torch.randint(model.config.vocab_size, (length + 1,), generator=generator).tolist()
            request = Request(tuple(prompt), ENDLESS, sampling or Sampling(), None if drafting else 1)
            heads = self.engine.most_heads if drafting else 1
            self.generations.append(Generation(request, heads, Stopper(ENDLESS)))
            self.engine.begin(slot, self.generations[-1])

    def __call__(self) -> None:
        """Run the step."""
        self.engine.rewind(self.length)
        self.engine.step()


class Pass:
    """A decoding pass of `slots` windows at `length` cached positions without an engine around it; call it to run it.

    Windows have `rows` tokens. They may exceed the model's heads: the window is widened then, so that the same weights
    can be timed at any width. Of a `tree` they are its first rows, and all of it is drafted. `heads` heads draft, head
    1 included.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        rows: int,
        heads: int = 1,
        slots: int = 1,
        length: int = 128,
        deferred: bool = True,
        confident: bool = False,
        tree: DraftTree | DynamicTree | None = None,
    ) -> None:
        self.model, self.length = model, length
        engine = Engine(model, EngineConfig(slots=slots, context=length + rows, exact=False, tree=tree))
        self.state = state = engine.state
        self._decode = engine.decode_pass  # through CUDA graphs if the engine's passes are
        width = max(rows, engine.width)
        device = state.length_S.device
        state.windows.tokens_SW = torch.randint(model.config.vocab_size, (slots, width), device=device)
        state.heads_S[:] = heads
        draft_tree = TreeRows(tree, device) if isinstance(tree, DraftTree) else tree
        self.plan = PassPlan(
            slots=slice(0, slots),
            rows=rows,
            heads=heads,
            span=-(-(length + rows) // SPAN) * SPAN,
            starts=[length] * slots,
            tree=draft_tree.first(rows) if isinstance(draft_tree, TreeRows) else draft_tree,
            draft_tree=draft_tree,
            deferred=deferred,
            confident=confident,
        )

    @torch.no_grad()
    def __call__(self) -> list[list[int]]:
        """Run the pass and return the tokens of head 1."""
        self.state.length_S[:] = self.length
        tokens, accepted = self._decode(self.plan)
        # The engine waits for these values, so reading them belongs to the pass.
        accepted.tolist()
        if self.plan.confident:
            self.state.windows.confidence_SK.tolist()
        return tokens.tolist()


def pass_costs(
    model: Transformer,
    batches: tuple[int, ...],
    length: int,
    seconds: float,
    tree: DraftTree | DynamicTree | None = None,
    temperature: float = 0.0,
) -> PassCosts:
    """Time steps of an engine with care, for `headstart tune`.

    Only the ratios to plain passes matter to a policy. They are taken between passes a few milliseconds apart, over
    enough `seconds` at each batch size (`batches`, ascending) that other work on the machine comes and goes. With
    `tree`, windows that are the beginnings of this tree are timed too.
    """
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


def quick_pass_costs(model: Transformer, slots: int, sampled: bool) -> tuple[float, tuple[float, ...]]:
    """Time steps of an engine for a fraction of a second, for a model that was not tuned.

    Costs between the numbers of rows that are timed lie on the straight line. More rows than could pay are not timed
    and continue the last line. Return the milliseconds of a plain step of `slots` windows, and of drafting steps by
    rows, 1 to n; for a model with one head, of passes of 1 to LOOKUP_ROWS rows, which prompt lookup fills.
    """
    n, context = model.config.heads, model.config.context
    length = max(1, min(QUICK_LENGTH, context - max(n, LOOKUP_ROWS)))
    sampling = Sampling(QUICK_TEMPERATURE if sampled else 0.0)
    make: Callable[..., Callable[[], object]] = partial(Step, model, slots=slots, length=length, sampling=sampling)
    plain = make(drafting=False)
    if n == 1:
        n, make = LOOKUP_ROWS, partial(Pass, model, slots=slots, length=length)
        plain = make(rows=1)
    plains: list[float] = []
    over: dict[int, float] = {}
    for rows in sorted({1, *(r for r in (2, 4, 8) if r < n), n}):
        milliseconds, plain_milliseconds = _fastest(make(rows=rows), plain)
        plains.append(plain_milliseconds)
        over[rows] = milliseconds / plain_milliseconds
        if rows > 1 and over[rows] > PATIENCE * sum(ASSUMED_ACCEPTANCE**i for i in range(rows)):
            break
    base = min(plains)
    known = {rows: base * ratio for rows, ratio in over.items()}
    at = sorted(known)
    costs = []
    for rows in range(1, n + 1):
        high = max(1, next((i for i, r in enumerate(at) if r >= rows), len(at) - 1))
        low = high - 1
        slope = (known[at[high]] - known[at[low]]) / (at[high] - at[low])
        costs.append(known[at[low]] + (rows - at[low]) * slope)
    return base, tuple(itertools.accumulate(costs, max))


def _fastest(drafting: Callable[[], object], plain: Callable[[], object]) -> tuple[float, float]:
    """Return the milliseconds of the fastest run of each, in turns: a disturbance only adds to a run."""
    variants = {"drafting": timed(drafting), "plain": timed(plain)}
    fastest = dict.fromkeys(variants, math.inf)
    least, most = QUICK_ROUNDS
    began = time.perf_counter()
    interleave(variants, 0)
    for turn in range(1, most + 1):
        for name, values in interleave(variants, 1, warmup=0).items():
            fastest[name] = min(fastest[name], 1e3 * values[0])
        if turn >= least and time.perf_counter() - began > QUICK_SECONDS:
            break
    return fastest["drafting"], fastest["plain"]


def random_model(config: ModelConfig, dtype: str, device: str) -> Transformer:
    """Return a model with random weights, which a pass takes as long for as for trained ones."""
    torch.manual_seed(0)
    with torch.device(device):  # billions of weights are drawn in seconds on a GPU, in minutes on a CPU
        model = Transformer(config)
    return model.to(DTYPES[dtype])


@dataclass
class Decoded:
    """The outputs of one variant of decoding, and the time it took."""

    generations: list[Generation]
    seconds: float
    """Seconds of passes alone, without those of prompts."""

    @property
    def stats(self) -> Stats:
        """The statistics of all outputs together."""
        return Stats.summed([g.stats for g in self.generations])

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of passes."""
        return self.stats.tokens / self.seconds

    @property
    def tokens(self) -> list[list[int]]:
        """The tokens of each output."""
        return [g.tokens for g in self.generations]


def decode(
    model: Transformer, requests: Sequence[Request], batch: int = 1, exact: bool = True, tuning: Tuning | None = None
) -> Decoded:
    """Decode `requests`, `batch` at a time; end tokens end no output, so that all variants do the same work."""
    done = Decoded([], 0.0)
    context = max(len(r.prompt) + r.max_new_tokens for r in requests)
    for start in range(0, len(requests), batch):
        group = requests[start : start + batch]
        policy = None if tuning is None else DraftPolicy(tuning)
        engine = Engine(
            model, EngineConfig(slots=len(group), context=context, exact=exact, prefill_budget=None), policy=policy
        )
        generations = [engine.submit(request) for request in group]
        began = time.perf_counter()
        while engine.busy:
            engine.step()
        done.seconds += time.perf_counter() - began - sum(g.stats.prefill_seconds for g in generations)
        done.generations += generations
    return done


def first_difference(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """Return the output and the token, both counted from 0, at which two lists of outputs first differ, if they do."""
    for output, (x, y) in enumerate(zip(a, b)):
        for token, (p, q) in enumerate(zip(x, y)):
            if p != q:
                return output, token
        if len(x) != len(y):
            return output, min(len(x), len(y))
    return None
