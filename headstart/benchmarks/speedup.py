"""The speed-up of a trained model: tokens per second and per pass by number of heads, as in the paper's Table S3."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from headstart.benchmarks.measure import interleave
from headstart.benchmarks.passes import DTYPES
from headstart.data.shards import TokenShards
from headstart.decoding.engine import Engine, Generation, Request
from headstart.decoding.packing import pack
from headstart.decoding.sampling import Sampling
from headstart.errors import UsageError
from headstart.model.transformer import Transformer
from headstart.storage.model_directory import load_config, load_model, load_model_tokenizer

PAPER = {1: (1.00, 1.00), 2: (1.94, 1.98), 4: (3.67, 3.84), 8: (6.39, 7.04)}
"""Table S3, byte-level code model with n = 8: k -> (relative speed-up, bytes per forward)."""

FASTEST_PLAIN = "plain"
"""The variant K = 1, exact=False: the fastest ordinary decoding there is here, what a speed-up is measured against."""


@dataclass
class Decoded:
    """What one variant decoded."""

    generations: list[Generation]
    seconds: float
    """Of passes alone: prompts are read before."""

    @property
    def tokens_per_second(self) -> float:
        return sum(g.stats.tokens for g in self.generations) / self.seconds

    @property
    def tokens_per_pass(self) -> float:
        return sum(g.stats.tokens for g in self.generations) / sum(g.stats.passes for g in self.generations)

    @property
    def acceptance(self) -> list[float]:
        """Entry k-2: the share of head k's drafts that were accepted."""
        drafted = [sum(column) for column in zip(*(g.stats.drafted for g in self.generations))]
        accepted = [sum(column) for column in zip(*(g.stats.accepted for g in self.generations))]
        return [a / d if d else 0.0 for a, d in zip(accepted, drafted)]

    @property
    def tokens(self) -> list[list[int]]:
        return [g.tokens for g in self.generations]


def decode(model: Transformer, requests: Sequence[Request], batch: int = 1, exact: bool = True) -> Decoded:
    """Decodes `requests`, `batch` at a time. End tokens do not end a text, so that all variants do the same work."""
    done = Decoded([], 0.0)
    context = max(len(r.prompt) + r.max_new_tokens for r in requests)
    for start in range(0, len(requests), batch):
        group = requests[start : start + batch]
        engine = Engine(model, slots=len(group), context=context, exact=exact)
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
    model = pack(load_model(case["model"], dtype=DTYPES[case["dtype"]], device=case["device"]))
    last: dict[str, Decoded] = {}

    def measure(name: str, heads: int, exact: bool) -> float:
        requests = [
            Request(tuple(p), case["new_tokens"], Sampling(case["temperature"], seed=seed), heads)
            for seed, p in enumerate(case["prompts"])
        ]
        last[name] = decode(model, requests, case["batch"], exact)
        return last[name].tokens_per_second

    ks = [k for k in case["heads"] if k <= model.config.heads]
    variants: dict[str, Callable[[], float]] = {FASTEST_PLAIN: partial(measure, FASTEST_PLAIN, 1, False)}
    variants |= {str(k): partial(measure, str(k), k, True) for k in ks}
    speeds = interleave(variants, case["repetitions"])
    reference = last[str(ks[0])].tokens
    return {
        "tokens_per_second": speeds,
        "tokens_per_pass": {name: d.tokens_per_pass for name, d in last.items()},
        "acceptance": {name: d.acceptance for name, d in last.items()},
        # What exact=False gives is only equal up to rounding, so it is reported and not required.
        "first_difference": {name: first_difference(reference, d.tokens) for name, d in last.items()},
    }


def load_prompts(model: Path, *, prompts: Path | None, data: Path | None, count: int, tokens: int) -> list[list[int]]:
    """`count` prompts of at most `tokens` tokens: from a file, or the beginnings of held-out documents.

    The file is text with one prompt a line, or .jsonl with "prompt" or "text". Without a file, documents come from the
    shards folder `data`, or that of the run in which the model lies (RUN/model).
    """
    if prompts is not None:
        found = _from_file(model, prompts, tokens)
    else:
        found = _from_shards(data or _data_of_run(model), count, tokens)
    vocab_size = load_config(model).vocab_size
    largest = max((max(p) for p in found), default=0)
    if largest >= vocab_size:
        raise UsageError(
            f"the prompts hold token {largest}, the vocabulary of {model} has {vocab_size}; give data of that model"
        )
    return found[:count]


def _from_file(model: Path, prompts: Path, tokens: int) -> list[list[int]]:
    tokenizer = load_model_tokenizer(model)
    if tokenizer is None:
        raise UsageError(f"{model}: has no tokenizer to read {prompts} with; give --data, a folder of prepared tokens")
    try:
        lines = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{prompts}: cannot be read ({error}); give a UTF-8 text file, a prompt a line") from error
    texts = lines
    if prompts.suffix == ".jsonl":
        texts = []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                texts.append(str(record["prompt"] if "prompt" in record else record["text"]))
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f'{prompts}, prompt {number}: no JSON object with "prompt" or "text"; mend that line'
                ) from error
    found = [ids for ids in (tokenizer.encode(text)[:tokens] for text in texts) if ids]
    if not found:
        raise UsageError(f"{prompts}: holds no prompt; write one a line")
    return found


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


def _from_shards(folder: Path, count: int, tokens: int) -> list[list[int]]:
    shards = TokenShards.open(folder, "validation")
    documents = [i for i in range(len(shards.documents)) if len(shards.document(i)) > tokens]
    if not documents:
        raise UsageError(f"{folder}: no held-out document has more than {tokens} tokens; lower --prompt-tokens")
    # Spread over the split: neighbouring documents are alike.
    count = min(count, len(documents))
    chosen = [documents[i * len(documents) // count] for i in range(count)]
    return [shards.document(i)[:tokens].tolist() for i in chosen]
