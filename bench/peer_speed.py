"""The part "peers": the same weights in our decoding and in that of others, taking turns, all in one run."""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench import report, streams
from bench.peer_environments import KINDS, PeerError, interpreter
from bench.peer_process import PeerProcess
from bench.peers.with_headstart import PLAIN
from bench.report import Bar, count, measurement
from bench.sizes import SIZES, four_heads
from headstart.console import say
from headstart.decoding.policy.timing import DTYPES, random_model, ratios
from headstart.errors import UsageError
from headstart.formats.gguf import save_gguf
from headstart.formats.huggingface import load_model, save_model

PLAIN_BARS = {
    "transformers": {"12M": 2.0, "105M": 1.8, "235M": 1.5},
    "llama.cpp": {"12M": 0.6, "105M": 0.9, "235M": 0.9},
    "vllm": dict.fromkeys(SIZES, 1.1),
}
"""Least speed of our plain decoding over a peer's, one stream, greedy as the peer does it by default."""
HEADS_BARS = {"llama.cpp": {"105M": 2.0, "235M": 2.0}}
"""The same of our four heads, with the acceptance of `RANDOM_TOKENS_PER_PASS`."""
RANDOM_TOKENS_PER_PASS = 3.5
"""Of four heads with random weights: what the paper's four accept in code (Table S2)."""


@dataclass(frozen=True)
class Subject:
    """A model to decode with."""

    label: str
    directory: Path
    prompts: list[list[int]]
    tokens_per_pass: float | None
    """Synthetic acceptance of all heads; None: that of the model."""
    assistant: Path | None = None


@dataclass
class Runs:
    """What a variant of a peer did, round by round."""

    peer: str
    variant: str
    streams: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None

    @property
    def name(self) -> str:
        return f"{self.peer}, {self.variant}" if self.variant else self.peer

    @property
    def rates(self) -> list[float]:
        return [streams.tokens_per_second(s["stamps"]) for s in self.streams]

    @property
    def tokens_per_pass(self) -> float:
        return statistics.fmean(streams.tokens_per_pass(s["stamps"]) for s in self.streams)

    def milliseconds(self) -> list[str]:
        """p50 / p95 between passes, and between tokens as streamed."""
        passes, tokens = [], []
        for s in self.streams:
            of_passes, of_tokens = streams.gaps(s["stamps"])
            passes += of_passes
            tokens += of_tokens
        return [" / ".join(f"{1e3 * streams.percentile(gaps, p):.3g}" for p in (50, 95)) for gaps in (passes, tokens)]


def random_subject(size: str, folder: Path, dtype: str, prompt_tokens: int, rows: int) -> Subject:
    """A model of `size` with four heads and random weights, and an assistant: a small one of the same vocabulary."""
    config = four_heads(SIZES[size])
    save_model(random_model(config, dtype, "cpu"), folder / size)
    small = replace(config, dim=128, layers=2, attention_heads=2, heads=1)
    save_model(random_model(small, dtype, "cpu"), folder / f"{size}-assistant")
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(config.vocab_size, (rows, prompt_tokens), generator=generator).tolist()
    return Subject(size, folder / size, prompts, RANDOM_TOKENS_PER_PASS, folder / f"{size}-assistant")


def run(
    sizes: Sequence[str],
    trained: tuple[Path, list[list[int]]] | None,
    *,
    peers: Sequence[str],
    install: bool,
    batches: Sequence[int],
    threads: int,
    dtype: str,
    repetitions: int,
    prompt_tokens: int,
    new_tokens: int,
    compiled: bool,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Measurements, tables and notes. `trained`: a model directory with its prompts, beside the random `sizes`."""
    pythons: dict[str, str | PeerError] = {}
    for name in peers:
        try:
            pythons[name] = interpreter(name, install=install)
        except PeerError as error:
            pythons[name] = error
    rows: list[dict[str, Any]] = []
    tables: list[dict[str, Any]] = []
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        subjects = [random_subject(s, Path(folder), dtype, prompt_tokens, max(batches)) for s in sizes]
        if trained is not None:
            subjects.append(Subject(trained[0].name, trained[0], trained[1], None))
        for subject in subjects:
            for batch in batches:
                say(f"peers: {subject.label}, batch {batch}")
                case = {"new_tokens": new_tokens, "dtype": dtype, "compile": compiled}
                found = _rounds(subject, case, batch, pythons, threads, repetitions, Path(folder), versions)
                where = f"{subject.label}, batch {batch}"
                rows += _measurements(found, where, subject.label if batch == 1 else None)
                tables.append(_table(found, f"Peers: {where}, {dtype}, {count(threads, 'thread')}"))
    return rows, tables, _notes(versions, new_tokens)


def _rounds(
    subject: Subject,
    case: dict[str, Any],
    batch: int,
    pythons: dict[str, str | PeerError],
    threads: int,
    repetitions: int,
    folder: Path,
    versions: dict[str, str],
) -> list[Runs]:
    """Every variant of every peer on the same prompts, round by round; the first round is not counted."""
    groups = [subject.prompts[i : i + batch] for i in range(0, len(subject.prompts) - batch + 1, batch)]
    if not groups:
        raise UsageError(f"{subject.label}: a batch of {batch} needs as many prompts, there are {len(subject.prompts)}")
    # transformers takes prompts of one length.
    groups = [[prompt[: min(map(len, group))] for prompt in group] for group in groups]
    gguf = folder / f"{subject.label}.gguf"
    case = {
        **case,
        "model": str(subject.directory),
        "gguf": str(gguf),
        "assistant": None if subject.assistant is None else str(subject.assistant),
        "rows": batch,
        "prompt_tokens": max(len(group[0]) for group in groups),
        "tokens_per_pass": subject.tokens_per_pass,
    }
    found: list[Runs] = []
    with ExitStack() as stack:
        running: list[tuple[PeerProcess, Runs]] = []
        for name, python in {"headstart": sys.executable, **pythons}.items():
            try:
                if isinstance(python, PeerError):
                    raise python
                if name == "llama.cpp" and not gguf.exists():
                    _write_gguf(subject.directory, gguf, case["dtype"])
                script = "with_headstart" if name == "headstart" else KINDS[name].script
                process = PeerProcess(python, script, case, threads=threads, log=folder / f"{name}.log")
            except PeerError as error:
                say(f"{name}: {error}")
                found.append(Runs(name, "", failure=str(error)))
                continue
            stack.enter_context(process)
            versions[name] = process.version
            for variant in process.variants:
                found.append(Runs(name, variant))
                running.append((process, found[-1]))
        for repetition in range(-1, repetitions):
            for process, runs in running:
                if runs.failure is not None:
                    continue
                try:
                    answer = process.decode(runs.variant, groups[repetition % len(groups)])
                except PeerError as error:
                    say(f"{runs.name}: {error}")
                    runs.failure = str(error)
                    continue
                if repetition >= 0:
                    runs.streams.append(answer)
    return found


def _write_gguf(directory: Path, path: Path, dtype: str) -> None:
    try:
        save_gguf(load_model(directory), path, dtype=DTYPES[dtype])
    except UsageError as error:
        raise PeerError(f"no GGUF file: {error}") from error


def _measurements(found: list[Runs], where: str, size: str | None) -> list[dict[str, Any]]:
    """Tokens per second of each variant, and ours over each of the others: plain, and with all heads. `size`: of the
    model, where bars hold."""
    rows = []
    for runs in found:
        if runs.failure is None:
            what, per_pass = f"{where}: {runs.name}", runs.tokens_per_pass
            rows.append(measurement("peers", what, runs.rates, "tokens/s", tokens_per_pass=per_pass))
    ours = [runs for runs in found if runs.peer == "headstart" and runs.failure is None]
    for mine in (runs for runs in ours if runs.variant != "K = 1"):
        for other in (runs for runs in found if runs.peer != "headstart" and runs.failure is None):
            bars = PLAIN_BARS if mine.variant == PLAIN else HEADS_BARS
            by_size = bars.get(other.peer, {}) if other.variant in ("greedy", "greedy, compiled") else {}
            least = by_size.get(size or "")
            bar = None if least is None else Bar(">=", least)
            what = f"{where}: {mine.name} / {other.name}"
            rows.append(measurement("peers", what, ratios(mine.rates, other.rates), bar=bar))
    return rows


def _table(found: list[Runs], title: str) -> dict[str, Any]:
    reference = next(runs for runs in found if runs.peer == "headstart")
    lines: list[list[object]] = []
    for runs in found:
        if runs.failure is not None:
            lines.append([runs.name, runs.failure, "", "", "", "", ""])
            continue
        over = statistics.median(ratios(runs.rates, reference.rates)) if reference.failure is None else None
        same = None
        if reference.failure is None:
            pairs = zip(runs.streams, reference.streams)
            same = min(_same(a, b) for mine, plain in pairs for a, b in zip(mine["tokens"], plain["tokens"]))
        speed = statistics.median(runs.rates)
        lines.append([runs.name, speed, over, f"{runs.tokens_per_pass:.2f}", *runs.milliseconds(), same])
    headers = ["", "tokens/s", "over our plain", "tokens per pass"]
    headers += ["ms between passes, p50 / p95", "ms between tokens, p50 / p95", "first tokens like our plain"]
    return report.table(title, headers, lines)


def _same(a: list[int], b: list[int]) -> int:
    """How many tokens two texts begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _notes(versions: dict[str, str], new_tokens: int) -> list[str]:
    return [
        f"peers: {'; '.join(versions.values())}. The same weights, prompts and threads for all, greedy, {new_tokens} "
        "new tokens, each peer in a process of its own, variants taking turns. Prompts are not timed. 12M, 105M, 235M: "
        "random weights with four heads; their drafts are made right at the rate that the paper's have in code "
        "(synthetic acceptance). What such weights write is no text, so prompt lookup and assistants are not judged by "
        "it. llama.cpp: a GGUF file of the same type, through its C functions. The tokens of one pass are streamed at "
        "once, so most gaps between tokens are 0 where there are several."
    ]
