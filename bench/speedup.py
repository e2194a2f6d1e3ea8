"""The speed-up of a trained model: tokens per second and per pass by number of heads, as in the paper's Table S3."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.measure import interleave
from bench.passes import DTYPES
from headstart.data.shards import TokenShards
from headstart.decoding.engine import Engine
from headstart.decoding.kernels.pack import is_row_exact, pack
from headstart.decoding.policy.calibration import Tuning
from headstart.decoding.policy.policy import DraftPolicy
from headstart.decoding.policy.tuning_file import read_tuning
from headstart.decoding.request import Generation, Request, Stats
from headstart.decoding.sampling import Sampling
from headstart.errors import UsageError
from headstart.evaluation.repetition import repeated
from headstart.evaluation.texts import PROMPTS_FILE, FilePrompts, LongPrompts, cut_prompts, fitting_prompts
from headstart.formats.huggingface import load_config, load_model, load_model_tokenizer
from headstart.model.transformer import Transformer

PAPER = {1: (1.00, 1.00), 2: (1.94, 1.98), 4: (3.67, 3.84), 8: (6.39, 7.04)}
"""Table S3, byte-level code model with n = 8: k -> (relative speed-up, bytes per forward)."""

POLICY = "policy"
"""The variant whose rows are chosen pass by pass, where `headstart tune` has measured this model on this machine."""
FASTEST_PLAIN = "plain"
"""The variant K = 1, exact=False: the fastest ordinary decoding there is here, what a speed-up is measured against."""


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


def case(case: dict[str, Any]) -> dict[str, Any]:
    """All variants of one temperature, taking turns. Runs in a process of its own."""
    dtype = "float32" if case["quantize"] else case["dtype"]
    model = load_model(case["model"], dtype=DTYPES[dtype], device=case["device"])
    pack(model, quantize=case["quantize"])
    tuning = read_tuning(case["model"], model)
    last: dict[str, Decoded] = {}

    def measure(name: str, heads: int | None, exact: bool) -> float:
        requests = [
            Request(tuple(p), case["new_tokens"], Sampling(case["temperature"], seed=seed), heads)
            for seed, p in enumerate(case["prompts"])
        ]
        last[name] = decode(model, requests, case["batch"], exact, tuning if heads is None else None)
        return last[name].tokens_per_second

    ks = [k for k in case["heads"] if k <= model.config.heads]
    variants: dict[str, Callable[[], float]] = {FASTEST_PLAIN: partial(measure, FASTEST_PLAIN, 1, False)}
    variants |= {str(k): partial(measure, str(k), k, True) for k in ks}
    if tuning is not None and is_row_exact(model):
        variants[POLICY] = partial(measure, POLICY, None, True)
    speeds = interleave(variants, case["repetitions"])
    reference = last[str(ks[0])].tokens
    return {
        "tokens_per_second": speeds,
        "tokens_per_pass": {name: d.stats.tokens_per_pass for name, d in last.items()},
        "rows_per_pass": {name: d.stats.rows_per_pass for name, d in last.items()},
        "acceptance": {name: d.stats.acceptance for name, d in last.items()},
        "repeated_8_grams": repeated(reference),
        # What exact=False gives is only equal up to rounding, so it is reported and not required.
        "first_difference": {name: first_difference(reference, d.tokens) for name, d in last.items()},
    }


def load_prompts(
    model: Path, *, prompts: Path | None, data: Path | None, count: int, tokens: int, room: int
) -> list[tuple[int, ...]]:
    """`count` prompts of `tokens` tokens, as `find_prompts`; texts of a file are cut to their start."""
    return find_prompts(model, prompts, data, count, tokens, room, (tokens, "start")).prompts


def find_prompts(
    model: Path,
    prompts: Path | None,
    data: Path | None,
    count: int,
    tokens: int,
    room: int,
    limit: tuple[int, LongPrompts],
) -> FilePrompts:
    """At most `count` prompts: of a file or the model directory's own (`fitting_prompts` with
    `limit`), or pieces of `tokens` tokens of held-out documents that go on for `room` tokens more.

    Documents come from the shards folder `data`, or that of the run in which the model lies (RUN/model).
    """
    tokenizer = load_model_tokenizer(model)
    if prompts is None and data is None and (model / PROMPTS_FILE).is_file():
        prompts = model / PROMPTS_FILE
    if prompts is not None:
        if tokenizer is None:
            raise UsageError(f"{model}: has no tokenizer to read {prompts} with; give --data, prepared tokens")
        given = fitting_prompts(prompts, tokenizer, *limit)
    else:
        shards = TokenShards.open(data or _data_of_run(model), "validation")
        documents = [shards.document(i) for i in range(len(shards.documents))]
        given = FilePrompts(cut_prompts(documents, count, tokens, room))
    vocab_size = load_config(model).vocab_size
    largest = max((max(p) for p in given.prompts), default=0)
    if largest >= vocab_size:
        raise UsageError(
            f"the prompts hold token {largest}, the vocabulary of {model} has {vocab_size}; give data of that model"
        )
    return replace(given, prompts=given.prompts[:count], ends=given.ends[:count])


def _data_of_run(model: Path) -> Path:
    run = model.resolve().parent
    if (run / "data" / "manifest.json").is_file():
        return run / "data"
    if (run / "config.yaml").is_file():
        from headstart.training.config import load_config as load_run_config

        path = load_run_config(run / "config.yaml").data.path
        if path is not None:
            return path
    raise UsageError(f"{model}: lies in no run with data; give --prompts FILE, or --data FOLDER of prepared tokens")
