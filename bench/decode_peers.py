"""Measure the same weights in our decoding and in that of peers, which take turns in one run."""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench import report, streams
from bench.decode_settings import SIZES, DecodeSettings, four_heads
from bench.peer_processes import PACKAGES, PeerError, PeerProcess, find_python, write_gguf
from bench.peers.with_headstart import PLAIN
from bench.report import Bar, Findings, count
from bench.streams import common_prefix, p50_p95
from headstart.console import say
from headstart.decoding.policy.timing import random_model, ratios
from headstart.errors import UsageError
from headstart.formats.huggingface import save_model
from headstart.model.config import ModelConfig

OURS = "headstart"
TRANSFORMERS_BAR = Bar(">=", 1.5)
"""Bar of the part plain."""
PLAIN_BARS = {
    "transformers": {"12M": 2.0, "105M": 1.8, "235M": 1.5},
    "llama.cpp": {"12M": 0.6, "105M": 0.9, "235M": 0.9},
    "vllm": dict.fromkeys(SIZES, 1.1),
}
"""Least speed of our plain decoding over a peer's default, one stream, greedy."""
HEADS_BARS = {"llama.cpp": {"105M": 2.0, "235M": 2.0}}
"""Least speed of our four heads over a peer's default, with the acceptance of `RANDOM_TOKENS_PER_PASS`."""
RANDOM_TOKENS_PER_PASS = 3.5
"""Tokens per pass of four heads with random weights: those of the paper's four in code (Table S2)."""


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
    """Streams of one variant of a peer, round by round."""

    peer: str
    variant: str = ""
    streams: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None

    @property
    def name(self) -> str:
        """Name in the table."""
        return f"{self.peer}, {self.variant}" if self.variant else self.peer

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each round."""
        return [streams.tokens_per_second(s["stamps"]) for s in self.streams]

    @property
    def tokens_per_pass(self) -> float:
        """Mean tokens per pass of all rounds."""
        return statistics.fmean(streams.tokens_per_pass(s["stamps"]) for s in self.streams)

    def gaps(self) -> list[str]:
        """Return p50 / p95 between passes, and between tokens as streamed, in ms."""
        of_passes, of_tokens = zip(*(streams.gaps(s["stamps"]) for s in self.streams))
        return [p50_p95([gap for gaps in each for gap in gaps]) for each in (of_passes, of_tokens)]


@dataclass
class PeerRounds:
    """Peers with their Pythons, and the rounds in which they take turns with us."""

    settings: DecodeSettings
    threads: int
    folder: Path
    pythons: dict[str, str | PeerError]
    """Python of each peer, or the reason why it has none."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the peers that ran."""

    def measure(self, subject: Subject, batch: int, variants: Collection[str] | None = None) -> list[Runs]:
        """Decode the subject's prompts with every variant (None: all) of every peer; the first round is not counted."""
        prompts = subject.prompts
        groups = [prompts[i : i + batch] for i in range(0, len(prompts) - batch + 1, batch)]
        if not groups:
            raise UsageError(f"{subject.label}: {len(prompts)} prompts are too few for a batch of {batch}")
        # transformers takes prompts of one length.
        groups = [[prompt[: min(map(len, group))] for prompt in group] for group in groups]
        case = self._case(subject, batch, max(len(group[0]) for group in groups))
        found: list[Runs] = []
        with ExitStack() as stack:
            running: list[tuple[PeerProcess, Runs]] = []
            for name, python in {OURS: sys.executable, **self.pythons}.items():
                try:
                    process = self._start(name, python, case)
                except PeerError as error:
                    say(f"{name}: {error}")
                    found.append(Runs(name, failure=str(error)))
                    continue
                stack.enter_context(process)
                self.versions[name] = process.version
                chosen = [Runs(name, v) for v in process.variants if variants is None or v in variants]
                found += chosen
                running += [(process, runs) for runs in chosen]
            for repetition in range(-1, self.settings.repetitions):
                for process, runs in running:
                    _take_turn(process, runs, groups[repetition % len(groups)], counted=repetition >= 0)
        return found

    def _case(self, subject: Subject, batch: int, prompt_tokens: int) -> dict[str, Any]:
        return {
            "model": str(subject.directory),
            "gguf": str(self.folder / f"{subject.label}.gguf"),
            "assistant": None if subject.assistant is None else str(subject.assistant),
            "rows": batch,
            "prompt_tokens": prompt_tokens,
            "new_tokens": self.settings.new_tokens,
            "dtype": self.settings.dtype,
            "device": self.settings.device,
            "compile": self.settings.compile_peers,
            "tokens_per_pass": subject.tokens_per_pass,
        }

    def _start(self, name: str, python: str | PeerError, case: dict[str, Any]) -> PeerProcess:
        if isinstance(python, PeerError):
            raise python
        if name == "llama.cpp" and not Path(case["gguf"]).exists():
            write_gguf(Path(case["model"]), Path(case["gguf"]), case["dtype"])
        script = "with_headstart" if name == OURS else PACKAGES[name].script
        return PeerProcess(python, script, case, threads=self.threads, log=self.folder / f"{name}.log")


def _take_turn(process: PeerProcess, runs: Runs, prompts: list[list[int]], *, counted: bool) -> None:
    if runs.failure is not None:
        return
    try:
        answer = process.decode(runs.variant, prompts)
    except PeerError as error:
        say(f"{runs.name}: {error}")
        runs.failure = str(error)
        return
    if counted:
        runs.streams.append(answer)


def _pythons(peers: Sequence[str], *, install: bool) -> dict[str, str | PeerError]:
    found: dict[str, str | PeerError] = {}
    for name in peers:
        try:
            found[name] = find_python(name, install=install)
        except PeerError as error:
            found[name] = error
    return found


def random_subject(label: str, config: ModelConfig, settings: DecodeSettings, folder: Path, rows: int) -> Subject:
    """Return a model with random weights, with prompts for a batch of `rows`.

    If it has several heads, it gets an assistant for transformers: a small model of the same vocabulary.
    """
    save_model(random_model(config, settings.dtype, "cpu"), folder / label)
    generator = torch.Generator().manual_seed(1)
    shape = rows, settings.prompt_tokens
    prompts = torch.randint(config.vocab_size, shape, generator=generator).tolist()
    if config.heads == 1:
        return Subject(label, folder / label, prompts, None)
    small = replace(config, dim=128, layers=2, attention_heads=2, heads=1)
    assistant = folder / f"{label}-assistant"
    save_model(random_model(small, settings.dtype, "cpu"), assistant)
    return Subject(label, folder / label, prompts, RANDOM_TOKENS_PER_PASS, assistant)


def plain(settings: DecodeSettings) -> Findings:
    """Measure our plain decoding against that of transformers, one stream of the same directory."""
    found, agreement = Findings("plain"), []
    config = replace(settings.sizes, heads=1)
    pythons = _pythons(["transformers"], install=settings.install_peers)
    with tempfile.TemporaryDirectory() as folder:
        subject = random_subject("model", config, settings, Path(folder), rows=1)
        for threads, label in settings.thread_labels():
            rounds = PeerRounds(replace(settings, compile_peers=False), threads, Path(folder), pythons)
            runs = rounds.measure(subject, 1, (PLAIN, "greedy"))
            for each in runs:
                if each.failure is not None:
                    raise UsageError(f"the part plain needs {each.peer}: {each.failure}")
                found.measure(f"{each.peer}, {label}", each.rates, "tokens/s")
            ours, theirs = runs
            agreement.append(common_prefix(ours.streams[-1]["tokens"][0], theirs.streams[-1]["tokens"][0]))
            found.ratio(f"headstart / transformers, {label}", ours.rates, theirs.rates, TRANSFORMERS_BAR)
    found.note(
        f"one stream, batch 1, greedy, {config.parameters()['total']:,} parameters with random weights, n = 1, "
        f"the same model directory for both; {settings.prompt_tokens} prompt and {settings.new_tokens} new tokens, "
        "timed from the first new token to the last (the prompt is not counted). transformers: "
        "LlamaForCausalLM.generate, use_cache, its default attention, in a process of its own. The first "
        f"{' and '.join(map(str, agreement))} tokens were the same (random weights have near ties, which rounding "
        "decides)."
    )
    return found


def peers(settings: DecodeSettings) -> Findings:
    """Measure every peer with random weights of each size, and with the trained model if one is given."""
    found = Findings("peers")
    threads, batches = settings.threads[-1], settings.peer_batches
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pythons = _pythons(settings.peers, install=settings.install_peers)
        rounds = PeerRounds(settings, threads, folder, pythons)
        sizes = {size: four_heads(SIZES[size]) for size in settings.model_sizes}
        subjects = [random_subject(size, config, settings, folder, max(batches)) for size, config in sizes.items()]
        if settings.model is not None:
            subjects.append(Subject(settings.model.name, settings.model, settings.load_prompts(), None))
        for subject in subjects:
            for batch in batches:
                where = f"{subject.label}, batch {batch}"
                say(f"peers: {where}")
                runs = rounds.measure(subject, batch)
                _compare(found, runs, where, subject.label if batch == 1 else "")
                title = f"Peers: {where}, {settings.dtype}, {count(threads, 'thread')}"
                found.tables.append(_table(runs, title))
    found.note(
        f"{'; '.join(rounds.versions.values())}. The same weights, prompts and threads for all, greedy, "
        f"{settings.new_tokens} new tokens, each peer in a process of its own, variants taking turns. Prompts are not "
        "timed. 12M, 105M, 235M: random weights with four heads; their drafts are made right at the rate that the "
        "paper's have in code (synthetic acceptance). The output of such weights is no text, so it does not judge "
        "prompt lookup and assistants. llama.cpp: a GGUF file of the same type, through its C functions. The tokens "
        "of one pass are streamed at once, so most gaps between tokens are 0 if a pass has several."
    )
    return found


def _compare(found: Findings, runs: list[Runs], where: str, size: str) -> None:
    """Add the rate of each variant, and ours over each of the peers'. `size` selects the bars."""
    done = [each for each in runs if each.failure is None]
    for each in done:
        found.measure(f"{where}: {each.name}", each.rates, "tokens/s", tokens_per_pass=each.tokens_per_pass)
    for mine in (each for each in done if each.peer == OURS and each.variant != "K = 1"):
        for other in (each for each in done if each.peer != OURS):
            bars = PLAIN_BARS if mine.variant == PLAIN else HEADS_BARS
            by_size = bars.get(other.peer, {}) if other.variant in ("greedy", "greedy, compiled") else {}
            bar = Bar(">=", by_size[size]) if size in by_size else None
            found.ratio(f"{where}: {mine.name} / {other.name}", mine.rates, other.rates, bar)


def _table(found: list[Runs], title: str) -> dict[str, Any]:
    reference = next(runs for runs in found if runs.peer == OURS)
    lines: list[list[object]] = []
    for runs in found:
        if runs.failure is not None:
            lines.append([runs.name, runs.failure, "", "", "", "", ""])
            continue
        over = same = None
        if reference.failure is None:
            over = statistics.median(ratios(runs.rates, reference.rates))
            pairs = zip(runs.streams, reference.streams)
            same = min(common_prefix(a, b) for mine, plain in pairs for a, b in zip(mine["tokens"], plain["tokens"]))
        speed = statistics.median(runs.rates)
        lines.append([runs.name, speed, over, f"{runs.tokens_per_pass:.2f}", *runs.gaps(), same])
    headers = ["", "tokens/s", "over our plain", "tokens per pass"]
    headers += ["ms between passes, p50 / p95", "ms between tokens, p50 / p95", "first tokens like our plain"]
    return report.table(title, headers, lines)
