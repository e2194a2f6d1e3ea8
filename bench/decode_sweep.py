"""Measure heads, batch sizes, lengths and temperatures at a synthetic acceptance, laid out as the paper's tables.

Weights are random, and drafts are right at the rate of the paper's models. So the gain of several tokens per pass is
measured at sizes that nobody here has trained.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from bench import fresh_process, report, streams
from bench.decode_settings import SIZES, DecodeSettings, byte_heads, four_heads
from bench.report import NONE, Bar, Findings, count
from bench.streams import Stream, Synthetic, acceptance_table, share_right
from headstart.decoding.engine import Engine
from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.kernels.pack import pack
from headstart.decoding.policy.calibration import PassCosts, Tuning, cost_of_rows
from headstart.decoding.policy.policy import DraftPolicy
from headstart.decoding.policy.timing import interleave, pass_costs, random_model, ratios
from headstart.decoding.settings import Request, Sampling
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

POLICY_BAR = Bar(">=", 0.97)
RAGGED_BAR = Bar(">=", 0.9)
LOW = 1.1
"""Tokens per pass at which drafting loses, which the policy must find out."""
PLAIN, POLICY, POLICY_LOW = "plain", "policy", "policy, low"
POLICIES = (POLICY, POLICY_LOW)


class CountingPolicy(DraftPolicy):
    """A policy that sums the cost and the tokens of its passes, in the costs that it knows.

    Their ratio compares it with plain decoding without a clock, so busy neighbours of the machine have no part in it.
    """

    def __init__(self, tuning: Tuning) -> None:
        super().__init__(tuning)
        self.passes = self.drafting = 0
        self.spent = self.gained = 0.0

    def observe(self, slots: int, live: int, rows: int, drafted: bool, tokens: int, sampled: bool = False) -> None:
        """Count a pass."""
        super().observe(slots, live, rows, drafted, tokens, sampled)
        plain, drafting = self.calibration.current.costs.at(slots)
        self.passes, self.drafting = self.passes + 1, self.drafting + drafted
        self.spent += cost_of_rows(drafting, rows) / plain if drafted else 1.0
        self.gained += tokens / live


@dataclass(frozen=True)
class Heads:
    """A kind of heads to sweep, with the paper's numbers."""

    name: str
    put_on: Callable[[ModelConfig], ModelConfig]
    """Function that gives a model these heads."""
    ks: tuple[int, ...]
    tokens_per_pass: float
    """Synthetic acceptance with all heads: the paper's."""
    paper: dict[int, tuple[float, float]]
    """Speed-up and tokens per pass by k."""
    bar: Bar
    """Bar of the speed-up of all heads over their tokens per pass, batch 1, greedy."""


KINDS = {
    "tokens": Heads(
        "4 parallel transformer heads (Table S2)",
        four_heads,
        (1, 2, 3, 4),
        3.5,
        {1: (1.0, 1.0), 2: (1.85, 1.94), 3: (2.54, 2.78), 4: (3.05, 3.50)},
        Bar(">=", 0.85),
    ),
    "bytes": Heads(
        "8 replicated byte heads (Table S3)",
        byte_heads,
        (1, 2, 4, 8),
        7.04,
        {1: (1.0, 1.0), 2: (1.94, 1.98), 4: (3.67, 3.84), 8: (6.39, 7.04)},
        Bar(">=", 0.9),
    ),
}


@dataclass(frozen=True)
class Point:
    """A batch to decode."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    temperature: float = 0.0

    def __str__(self) -> str:
        name = f"batch {self.batch}, {self.prompt_tokens} + {self.new_tokens} tokens"
        return name + (f", temperature {self.temperature}" if self.temperature else "")


def points(batches: Sequence[int], lengths: Sequence[tuple[int, int]], temperatures: Sequence[float]) -> list[Point]:
    """Return the first point, and points that differ from it in one setting."""
    base = Point(batches[0], *lengths[0], temperatures[0])
    others = [replace(base, batch=batch) for batch in batches[1:]]
    others += [replace(base, prompt_tokens=prompt, new_tokens=new) for prompt, new in lengths[1:]]
    others += [replace(base, temperature=temperature) for temperature in temperatures[1:]]
    return [base, *others]


def sweep(settings: DecodeSettings) -> Findings:
    """Measure every point with every kind of heads and size."""
    found, threads = Findings("sweep"), settings.threads[-1]
    at = points(settings.sweep_batches, settings.sweep_lengths, settings.temperatures)
    for size in settings.sweep_sizes:
        for name in settings.sweep_kinds:
            kind = KINDS[name]
            case = settings.case(
                kind.put_on(SIZES[size]),
                kind=name,
                points=[asdict(point) for point in at],
                tune_seconds=settings.sweep_tune_seconds,
            )
            answer = fresh_process.call(sweep_case, case, threads=threads)
            _report_kind(found, f"{size}, {kind.name}", kind, at, answer)
    found.note(
        f"random weights, {settings.dtype}, {count(threads, 'thread')}; drafts made right at the rate of the "
        f"paper's models (synthetic acceptance: {' and '.join(str(k.tokens_per_pass) for k in KINDS.values())} tokens "
        "per pass with all heads), so the output stays that of plain decoding. Tokens/s of all rows together, while "
        "all of them write; prompts are not timed. Plain: K = 1, exact=False. The policy has measured what passes "
        "cost here and knows how often drafts are right; at the low rate, "
        f"{LOW} tokens per pass, it can only lose; it is one policy through all rounds, as in a server. By the costs "
        "of its passes: the tokens of all rounds over what their passes cost, each as it was timed beforehand. "
        "Ragged: prompts from half to one and a half times as long, every row with its own acceptance, against equal "
        "prompts and acceptance."
    )
    return found


def _report_kind(found: Findings, label: str, kind: Heads, at: Sequence[Point], answer: list[dict[str, Any]]) -> None:
    """Add the measurements of one kind of heads, and its table."""
    columns = []
    for point, numbers in zip(at, answer):
        where = f"{label}, {point}"
        columns.append(_report_speeds(found, where, kind, numbers, judged=point is at[0]))
        _report_checks(found, where, numbers)
    lines: list[list[object]] = []
    for i, k in enumerate(kind.ks):
        paper = " / ".join(f"{x:.2f}" for x in kind.paper[k])
        lines.append([str(k), *(column[i] for column in columns), paper])
    title = f"{label}: speed-up over plain / tokens per pass"
    found.tables.append(report.table(title, ["k", *map(str, at), "paper, code"], lines))


def _report_speeds(found: Findings, where: str, kind: Heads, numbers: dict[str, Any], *, judged: bool) -> list[str]:
    """Add the rates of every variant and their ratios to plain decoding, and return the cells of a point by k."""
    column = []
    speeds, ks = numbers["tokens_per_second"], [str(k) for k in kind.ks]
    for name in [PLAIN, *ks, *(n for n in POLICIES if n in speeds)]:
        per_pass, what = numbers["tokens_per_pass"][name], f"{where}: {_shown(name)}"
        found.measure(what, speeds[name], "tokens/s", tokens_per_pass=per_pass)
        if name == PLAIN:
            continue
        bar = POLICY_BAR if name in POLICIES else None
        gain = found.ratio(f"{what} / plain", speeds[name], speeds[PLAIN], bar)["median"]
        if name in ks:
            column.append(f"{gain:.2f} / {per_pass:.2f}")
        if name == ks[-1] and judged:
            kept = [gain / per_pass for gain in ratios(speeds[name], speeds[PLAIN])]
            found.measure(f"{what} / plain over its tokens per pass", kept, bar=kind.bar)
    return column


def _report_checks(found: Findings, where: str, numbers: dict[str, Any]) -> None:
    """Add the measurements of a point other than speeds."""
    for name, (ratio, share) in numbers["by_costs"].items():
        what = f"{where}: {name} / plain, by the costs of its passes"
        found.measure(what, [ratio], bar=POLICY_BAR, passes_that_draft=share)
    differing = numbers["differing"]
    what = f"{where}: numbers of heads whose output differs from K = 1"
    found.measure(what, [len(differing)], bar=NONE, differing=differing)
    for name, (passes, tokens) in numbers["gaps_ms"].items():
        for noun, (p50, p95) in (("passes", passes), ("tokens as streamed", tokens)):
            found.measure(f"{where}: {_shown(name)}, between {noun}, p50", [p50], "ms")
            found.measure(f"{where}: {_shown(name)}, between {noun}, p95", [p95], "ms")
    if "ragged" in numbers:
        found.ratio(f"{where}: ragged / equal rows", numbers["ragged"], numbers["equal"], RAGGED_BAR)


def _shown(name: str) -> str:
    return f"K = {name}" if name.isdigit() else name


def sweep_case(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the numbers of all points of one model."""
    kind, config = KINDS[case["kind"]], ModelConfig(**case["config"])
    model = pack(random_model(config, case["dtype"], case["device"]))
    at = [Point(**point) for point in case["points"]]
    costs = None
    if backend_of(model).row_exact:  # else a policy has nothing to choose
        batches = tuple(sorted({point.batch for point in at}))
        costs = pass_costs(model, batches, at[0].prompt_tokens + at[0].new_tokens // 2, case["tune_seconds"])
    # On a GPU one engine serves all rounds, as in a server: it captures its graphs in the first, which does not count.
    # On a CPU there is nothing to capture, and the caches of all engines together need not fit.
    keep = case["device"] != "cpu"
    return [
        PointRun(model, kind, point, costs, keep_engines=keep).measure(case["repetitions"], with_gaps=point is at[0])
        for point in at
    ]


@dataclass
class PointRun:
    """The variants of one point, and what they decoded round by round."""

    model: Transformer
    kind: Heads
    point: Point
    costs: PassCosts | None
    keep_engines: bool
    kept: dict[str, list[Stream]] = field(default_factory=dict)
    engines: dict[str, Engine] = field(default_factory=dict)
    policies: dict[str, CountingPolicy] = field(default_factory=dict)

    def measure(self, repetitions: int, *, with_gaps: bool) -> dict[str, Any]:
        """Time all variants in turns and return their numbers."""
        speeds = interleave(self.variants(), repetitions)
        ks = [str(k) for k in self.kind.ks]
        exact = ks + [name for name in POLICIES if name in self.kept]
        reference = self.kept["1"][-1].tokens
        others: dict[str, Any] = {name: speeds.pop(name) for name in ("ragged", "equal") if name in speeds}
        return {
            "tokens_per_second": speeds,
            "tokens_per_pass": {name: streams.tokens_per_pass(runs[-1].stamps) for name, runs in self.kept.items()},
            "differing": [name for name in exact if self.kept[name][-1].tokens != reference],
            "by_costs": {n: (p.gained / p.spent, p.drafting / p.passes) for n, p in self.policies.items()},
            "gaps_ms": {name: self.gaps_ms(name) for name in (PLAIN, ks[-1])} if with_gaps else {},
            **others,
        }

    def variants(self) -> dict[str, Callable[[], float]]:
        """Return the variants by name, each with its requests and drafts."""
        point, n = self.point, self.model.config.heads
        share, low = share_right(self.kind.tokens_per_pass, n), share_right(LOW, n)
        equal = self.requests([point.prompt_tokens] * point.batch)
        outputs = streams.plain_outputs(self.model, equal)
        variants: dict[str, Callable[[], float]] = {
            PLAIN: partial(self.decode, PLAIN, _with_heads(equal, 1), exact=False)
        }
        for k in self.kind.ks:
            variants[str(k)] = partial(self.decode, str(k), _with_heads(equal, k), Synthetic(outputs, share))
        for name, right in ((POLICY, share), (POLICY_LOW, low)):
            if self.costs is not None:
                table = acceptance_table(right, n)
                self.policies[name] = CountingPolicy(Tuning(table, table, self.costs))
                variants[name] = partial(self.decode, name, _with_heads(equal, None), Synthetic(outputs, right))
        if point.batch == 16:
            lengths = [point.prompt_tokens * (8 + 16 * i // 15) // 16 for i in range(16)]
            random.Random(0).shuffle(lengths)
            ragged = _with_heads(self.requests(lengths), n)
            own = Synthetic(streams.plain_outputs(self.model, ragged), share)
            same = Synthetic(outputs, share, together=True)
            variants["ragged"] = partial(self.decode, "ragged", ragged, own)
            variants["equal"] = partial(self.decode, "equal", _with_heads(equal, n), same)
        return variants

    def decode(self, name: str, requests: list[Request], drafts: Synthetic | None = None, exact: bool = True) -> float:
        """Decode the requests of variant `name` and return their rate."""
        engine = self.engines.get(name)
        if engine is None:
            engine = streams.engine_for(self.model, requests, exact=exact, policy=self.policies.get(name))
        if self.keep_engines:
            self.engines[name] = engine
        stream = streams.decode(self.model, requests, synthetic=drafts, engine=engine)
        self.kept.setdefault(name, []).append(stream)
        return streams.tokens_per_second(stream.stamps)

    def gaps_ms(self, name: str) -> list[list[float]]:
        """Return p50 and p95 between the passes of a variant, and between its tokens, of all rounds that count."""
        gaps = zip(*(streams.gaps(stream.stamps) for stream in self.kept[name][1:]))
        merged = ([x for run in kind for x in run] for kind in gaps)
        return [[1e3 * streams.percentile(values, percent) for percent in (50, 95)] for values in merged]

    def requests(self, lengths: Sequence[int]) -> list[Request]:
        """Return requests with random prompts of these lengths."""
        generator = random.Random(1)
        return [
            Request(
                tuple(generator.randrange(self.model.config.vocab_size) for _ in range(max(length, 1))),
                self.point.new_tokens,
                Sampling(self.point.temperature, seed=seed),
            )
            for seed, length in enumerate(lengths)
        ]


def _with_heads(requests: list[Request], heads: int | None) -> list[Request]:
    return [replace(request, heads=heads) for request in requests]
