"""The part "sweep": heads, batch, lengths and temperature at a synthetic acceptance, laid out as the paper's tables.

Random weights whose drafts are right at the rate of the paper's models, so that what decoding makes of tokens per pass
is measured at sizes nobody here has trained.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from bench import fresh_process, report, streams
from bench.report import Bar, count, measurement
from bench.sizes import SIZES, byte_heads, four_heads
from bench.streams import Stream, Synthetic
from bench.synthetic_acceptance import acceptance_table, share_right
from headstart.decoding.engine import Engine
from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.kernels.pack import pack
from headstart.decoding.policy.calibration import Tuning, cost_of_rows
from headstart.decoding.policy.policy import DraftPolicy
from headstart.decoding.policy.timing import interleave, pass_costs, random_model, ratios
from headstart.decoding.settings import Request, Sampling
from headstart.model.config import ModelConfig

POLICY_BAR = Bar(">=", 0.97)
RAGGED_BAR = Bar(">=", 0.9)
LOW = 1.1
"""Tokens per pass at which drafting loses, for the policy to find out."""
PLAIN, POLICY, POLICY_LOW = "plain", "policy", "policy, low"


class Counted(DraftPolicy):
    """A policy that adds up what its passes cost and bring, by the costs that it knows: a ratio to plain decoding in
    which the neighbours of a busy machine have no part."""

    def __init__(self, tuning: Tuning) -> None:
        super().__init__(tuning)
        self.passes = self.drafting = 0
        self.spent = self.gained = 0.0

    def observe(self, slots: int, live: int, rows: int, drafted: bool, tokens: int, sampled: bool = False) -> None:
        super().observe(slots, live, rows, drafted, tokens, sampled)
        plain, drafting = self.calibration.current.costs.at(slots)
        self.passes, self.drafting = self.passes + 1, self.drafting + drafted
        self.spent += cost_of_rows(drafting, rows) / plain if drafted else 1.0
        self.gained += tokens / live


@dataclass(frozen=True)
class Heads:
    """A kind of heads to sweep, with the paper's figures for it."""

    name: str
    of: Callable[[ModelConfig], ModelConfig]
    ks: tuple[int, ...]
    tokens_per_pass: float
    """Synthetic acceptance with all heads: the paper's."""
    paper: dict[int, tuple[float, float]]
    """k -> (speed-up, tokens per pass)."""
    bar: Bar
    """Speed-up of all heads over their tokens per pass, batch 1, greedy."""


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
    """What is decoded."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    temperature: float = 0.0

    def __str__(self) -> str:
        name = f"batch {self.batch}, {self.prompt_tokens} + {self.new_tokens} tokens"
        return name + (f", temperature {self.temperature}" if self.temperature else "")


def points(batches: Sequence[int], lengths: Sequence[tuple[int, int]], temperatures: Sequence[float]) -> list[Point]:
    """One thing changed at a time, from the first batch size, lengths and temperature."""
    base = Point(batches[0], *lengths[0], temperatures[0])
    more = [replace(base, batch=batch) for batch in batches[1:]]
    more += [replace(base, prompt_tokens=prompt, new_tokens=new) for prompt, new in lengths[1:]]
    more += [replace(base, temperature=temperature) for temperature in temperatures[1:]]
    return [base, *more]


def run(
    sizes: Sequence[str],
    *,
    kinds: Sequence[str] = tuple(KINDS),
    at: Sequence[Point],
    threads: int,
    dtype: str,
    device: str,
    repetitions: int,
    tune_seconds: float,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Measurements, tables and notes."""
    rows: list[dict[str, Any]] = []
    tables: list[dict[str, Any]] = []
    for size in sizes:
        for name in kinds:
            kind = KINDS[name]
            config = kind.of(SIZES[size])
            case = {
                "config": asdict(config),
                "kind": name,
                "points": [asdict(point) for point in at],
                "dtype": dtype,
                "device": device,
                "repetitions": repetitions,
                "tune_seconds": tune_seconds,
            }
            answer = fresh_process.call("bench.sweep:case", case, threads=threads)
            more, table = _tell(f"{size}, {kind.name}", kind, at, answer)
            rows += more
            tables.append(table)
    note = (
        f"sweep: random weights, {dtype}, {count(threads, 'thread')}; drafts made right at the rate of the paper's "
        f"models (synthetic acceptance: {' and '.join(str(k.tokens_per_pass) for k in KINDS.values())} tokens per pass "
        "with all heads), so the output stays that of plain decoding. Tokens/s of all rows together, while all of them "
        "write; prompts are not timed. Plain: K = 1, exact=False. The policy has measured what passes cost here and "
        f"knows how often drafts are right; at the low rate, {LOW} tokens per pass, it can only lose; it is one policy "
        "through all rounds, as in a server. By the costs of its passes: the tokens of all rounds over what "
        "their passes cost, each as it was timed beforehand. Ragged: prompts from half to one and a half times as "
        "long, every row its own acceptance, against equal prompts and acceptance."
    )
    return rows, tables, [note]


def _tell(
    label: str, kind: Heads, at: Sequence[Point], answer: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    columns: list[list[str]] = []
    names = [str(k) for k in kind.ks]
    for point, found in zip(at, answer):
        speeds, where = found["tokens_per_second"], f"{label}, {point}"
        columns.append([])
        for name in [PLAIN, *names, *(n for n in (POLICY, POLICY_LOW) if n in speeds)]:
            per_pass = found["tokens_per_pass"][name]
            shown = f"K = {name}" if name in names else name
            rows.append(measurement("sweep", f"{where}: {shown}", speeds[name], "tokens/s", tokens_per_pass=per_pass))
            gains = ratios(speeds[name], speeds[PLAIN])
            if name != PLAIN:
                bar = POLICY_BAR if name in (POLICY, POLICY_LOW) else None
                rows.append(measurement("sweep", f"{where}: {shown} / plain", gains, bar=bar))
            if name in names:
                columns[-1].append(f"{rows[-1]['median']:.2f} / {per_pass:.2f}")
            if name == names[-1] and point is at[0]:
                kept = [gain / per_pass for gain in gains]
                what = f"{where}: {shown} / plain over its tokens per pass"
                rows.append(measurement("sweep", what, kept, bar=kind.bar))
        for name, (ratio, share) in found["by_costs"].items():
            what = f"{where}: {name} / plain, by the costs of its passes"
            rows.append(measurement("sweep", what, [ratio], bar=POLICY_BAR, passes_that_draft=share))
        differing = found["differing"]
        what = f"{where}: numbers of heads whose output differs from K = 1"
        rows.append(measurement("sweep", what, [len(differing)], bar=Bar("<=", 0), differing=differing))
        for name, (passes, tokens) in found["gaps_ms"].items():
            shown = f"K = {name}" if name in names else name
            for noun, (p50, p95) in (("passes", passes), ("tokens as streamed", tokens)):
                rows.append(measurement("sweep", f"{where}: {shown}, between {noun}, p50", [p50], "ms"))
                rows.append(measurement("sweep", f"{where}: {shown}, between {noun}, p95", [p95], "ms"))
        if "ragged" in found:
            what = f"{where}: ragged / equal rows"
            rows.append(measurement("sweep", what, ratios(found["ragged"], found["equal"]), bar=RAGGED_BAR))
    lines: list[list[object]] = []
    for i, k in enumerate(kind.ks):
        paper = " / ".join(f"{x:.2f}" for x in kind.paper[k])
        lines.append([str(k), *(column[i] for column in columns), paper])
    title = f"{label}: speed-up over plain / tokens per pass"
    return rows, report.table(title, ["k", *map(str, at), "paper, code"], lines)


def case(case: dict[str, Any]) -> list[dict[str, Any]]:
    """All points of one model. Runs in a process of its own."""
    kind, config = KINDS[case["kind"]], ModelConfig(**case["config"])
    model = pack(random_model(config, case["dtype"], case["device"]))
    at = [Point(**point) for point in case["points"]]
    n = config.heads
    share, low = share_right(kind.tokens_per_pass, n), share_right(LOW, n)
    costs = None
    if backend_of(model).row_exact:  # else there is nothing for a policy to choose
        batches = tuple(sorted({point.batch for point in at}))
        costs = pass_costs(model, batches, at[0].prompt_tokens + at[0].new_tokens // 2, case["tune_seconds"])

    engines: dict[str, Engine] = {}

    def decode(
        requests: list[Request],
        kept: dict[str, list[Stream]],
        name: str,
        drafts: Synthetic | None = None,
        exact: bool = True,
        policy: DraftPolicy | None = None,
    ) -> float:
        engine = engines.get(name) or streams.engine_for(model, requests, exact=exact, policy=policy)
        if case["device"] != "cpu":
            # One for all rounds, as in a server: it captures its graphs in the first, which does not count. On a CPU
            # there is nothing to capture, and all their caches at once need not fit.
            engines[name] = engine
        stream = streams.decode(model, requests, synthetic=drafts, engine=engine)
        kept.setdefault(name, []).append(stream)
        return streams.tokens_per_second(stream.stamps)

    found: list[dict[str, Any]] = []
    for point in at:
        engines.clear()
        kept: dict[str, list[Stream]] = {}
        policies: dict[str, Counted] = {}
        equal = _requests(config, point, [point.prompt_tokens] * point.batch)
        texts = streams.plain_texts(model, equal)
        variants = {PLAIN: partial(decode, _with(equal, 1), kept, PLAIN, exact=False)}
        for k in kind.ks:
            variants[str(k)] = partial(decode, _with(equal, k), kept, str(k), Synthetic(texts, share))
        for name, right in ((POLICY, share), (POLICY_LOW, low)):
            if costs is not None:
                table = acceptance_table(right, n)
                policies[name] = policy = Counted(Tuning(table, table, costs))
                drafts = Synthetic(texts, right)
                variants[name] = partial(decode, _with(equal, None), kept, name, drafts, policy=policy)
        if point.batch == 16:
            spread = [point.prompt_tokens * (8 + 16 * i // 15) // 16 for i in range(16)]
            random.Random(0).shuffle(spread)
            ragged = _with(_requests(config, point, spread), n)
            own, same = Synthetic(streams.plain_texts(model, ragged), share), Synthetic(texts, share, together=True)
            variants["ragged"] = partial(decode, ragged, kept, "ragged", own)
            variants["equal"] = partial(decode, _with(equal, n), kept, "equal", same)
        speeds = interleave(variants, case["repetitions"])
        per_pass = {name: streams.tokens_per_pass(runs[-1].stamps) for name, runs in kept.items()}
        exact = [str(k) for k in kind.ks] + [name for name in (POLICY, POLICY_LOW) if name in kept]
        reference = kept["1"][-1].tokens
        result: dict[str, Any] = {
            "tokens_per_second": speeds,
            "tokens_per_pass": per_pass,
            "differing": [name for name in exact if kept[name][-1].tokens != reference],
            "by_costs": {n: (p.gained / p.spent, p.drafting / p.passes) for n, p in policies.items()},
            "gaps_ms": {},
        }
        if point is at[0]:
            for name in (PLAIN, str(kind.ks[-1])):
                gaps = zip(*(streams.gaps(stream.stamps) for stream in kept[name][1:]))
                merged = ([x for run in kind_of for x in run] for kind_of in gaps)
                result["gaps_ms"][name] = [
                    [1e3 * streams.percentile(values, percent) for percent in (50, 95)] for values in merged
                ]
        for name in ("ragged", "equal"):
            if name in speeds:
                result[name] = speeds.pop(name)
        found.append(result)
    return found


def _requests(config: ModelConfig, point: Point, lengths: Sequence[int]) -> list[Request]:
    generator = random.Random(1)
    return [
        Request(
            tuple(generator.randrange(config.vocab_size) for _ in range(max(length, 1))),
            point.new_tokens,
            Sampling(point.temperature, seed=seed),
        )
        for seed, length in enumerate(lengths)
    ]


def _with(requests: list[Request], heads: int | None) -> list[Request]:
    return [replace(request, heads=heads) for request in requests]
