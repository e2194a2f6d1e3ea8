"""Decode the same weights with every peer in turns, each in a process and a Python of its own."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from bench import streams
from bench.peers.with_headstart import PLAIN
from bench.processes import JsonProcess, ProcessError
from bench.report import Bar, Findings
from bench.streams import p50_p95
from headstart.console import say
from headstart.errors import UsageError
from headstart.formats.gguf import save_gguf
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_model

PeerName = Literal["transformers", "llama-cpp", "vllm", "openvino"]
PEERS: tuple[PeerName, ...] = ("transformers", "llama-cpp", "vllm", "openvino")
READ_GGUF = ("llama-cpp", "openvino")
"""The peers that read a GGUF file themselves."""
OURS = "headstart"
PACKAGES = {
    "transformers": "transformers",
    "llama-cpp": "llama_cpp",
    "vllm": "vllm",
    "openvino": "openvino_genai",
}
"""Package of each peer, as it is imported. Its class is `Peer` in the file with_NAME.py."""
ANSWER_SECONDS = 900.0
"""Seconds that an answer of a peer may take: it loads its model in the first one."""
PLAIN_BARS: dict[str, dict[str, float]] = {
    "transformers": {"12M": 2.0, "105M": 1.8, "235M": 1.5},
    "llama-cpp": {"12M": 0.6, "105M": 0.9, "235M": 0.9},
    "vllm": {"12M": 1.1, "105M": 1.1, "235M": 1.1},
}
"""Least speed of our plain decoding over a peer's default, one stream, greedy."""
HEADS_BARS: dict[str, dict[str, float]] = {"llama-cpp": {"105M": 2.0, "235M": 2.0}}
"""Least speed of our four heads over a peer's default, at the synthetic acceptance."""
GGUF_BARS: dict[str, tuple[float, float | None]] = {"4 bits": (1.7, 3.0), "8 bits": (1.3, None)}
"""Least speed of our plain decoding and of our four heads over llama.cpp with the same file, by its bits a weight."""


@dataclass(frozen=True)
class Subject:
    """A model to decode with."""

    label: str
    model: Path
    """Model directory, or GGUF file that Headstart and llama.cpp both read."""
    prompts: list[list[int]]
    tokens_per_pass: float | None
    """Synthetic acceptance of all heads; None: that of the model."""
    heads: Path | None = None
    """Directory of heads for the model, on our side."""
    bars: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)
    """Least speed of our plain decoding and of our heads over a peer's default, for a model without a size."""


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
    def prompt_rates(self) -> list[float]:
        """Prompt tokens per second of each round, the pass that gives the first new tokens included."""
        return [s["prompt_tokens"] / s["prompt_seconds"] for s in self.streams]

    def details(self, plain: Runs) -> dict[str, Any]:
        """Return what the report holds next to the rate; `plain` is our plain decoding."""
        pairs = [
            pair for mine, ours in zip(self.streams, plain.streams) for pair in zip(mine["tokens"], ours["tokens"])
        ]
        return {
            "tokens_per_pass": statistics.fmean(streams.tokens_per_pass(s["stamps"]) for s in self.streams),
            "prompt_tokens_per_second": statistics.median(self.prompt_rates),
            "ms_between_passes_p50_p95": p50_p95([gap for s in self.streams for gap in streams.gaps(s["stamps"])]),
            "first_tokens_like_our_plain": min((streams.common_prefix(*pair) for pair in pairs), default=0),
        }

    def take_turn(self, process: JsonProcess, prompts: list[list[int]], *, counted: bool) -> None:
        """Decode the prompts once. A variant that has failed gets no further turns."""
        if self.failure is not None:
            return
        try:
            answer = process.ask({"variant": self.variant, "prompts": prompts})
        except ProcessError as error:
            say(f"{self.name}: {error}")
            self.failure = str(error)
            return
        if counted:
            self.streams.append(answer)


@dataclass
class Contest:
    """Our decoding and that of peers, on the same weights, prompts and threads."""

    peers: Sequence[str]
    pythons: Mapping[str, str]
    """Interpreters of peers that this one does not have."""
    threads: int
    dtype: str
    quantize: str | None
    """Quantized weights on our side."""
    new_tokens: int
    repetitions: int
    compile: bool
    folder: Path
    """Folder for logs and converted models."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the peers that ran."""

    def compare(self, found: Findings, subject: Subject, batch: int) -> None:
        """Add the rate of each variant, and ours over each of the peers'."""
        runs = self.measure(subject, batch)
        where = f"{subject.label}, batch {batch}"
        done = [each for each in runs if each.failure is None]
        for each in done:
            found.measure(f"{where}: {each.name}", each.rates, "tokens/s", **each.details(runs[0]))
        for each in runs:
            if each.failure is not None:
                found.note(f"{where}: {each.name}: {each.failure}")
        for mine in (each for each in done if each.peer == OURS and each.variant != "K = 1"):
            for other in (each for each in done if each.peer != OURS):
                value = _least_speed(subject, other.peer, plain=mine.variant == PLAIN)
                judged = batch == 1 and other.variant in ("greedy", "greedy, compiled")
                bar = Bar(">=", value) if judged and value is not None else None
                found.ratio(f"{where}: {mine.name} / {other.name}", mine.rates, other.rates, bar)
                if mine.variant == PLAIN:
                    what = f"{where}: reading prompts, {OURS} / {other.name}"
                    found.ratio(what, mine.prompt_rates, other.prompt_rates)

    def measure(self, subject: Subject, batch: int) -> list[Runs]:
        """Decode the subject's prompts with every variant of every peer; the first round is not counted."""
        prompts = subject.prompts
        groups = [prompts[i : i + batch] for i in range(0, len(prompts) - batch + 1, batch)]
        if not groups:
            raise UsageError(f"{subject.label}: {len(prompts)} prompts are too few for a batch of {batch}")
        # transformers takes prompts of one length.
        groups = [[prompt[: min(map(len, group))] for prompt in group] for group in groups]
        case = {
            "model": str(subject.model),
            "heads": None if subject.heads is None else str(subject.heads),
            "gguf": str(subject.model if subject.model.is_file() else self.folder / f"{subject.label}.gguf"),
            "rows": batch,
            "prompt_tokens": max(len(group[0]) for group in groups),
            "new_tokens": self.new_tokens,
            "dtype": self.dtype,
            "quantize": self.quantize,
            "threads": self.threads,
            "compile": self.compile,
            "tokens_per_pass": subject.tokens_per_pass,
        }
        found: list[Runs] = []
        with ExitStack() as stack:
            running: list[tuple[JsonProcess, Runs]] = []
            for name in (OURS, *self.peers):
                try:
                    process, variants = self.start(name, case, stack)
                except (ProcessError, UsageError) as error:
                    say(f"{name}: {error}")
                    found.append(Runs(name, failure=str(error)))
                    continue
                chosen = [Runs(name, variant) for variant in variants]
                found += chosen
                running += [(process, runs) for runs in chosen]
            for repetition in range(-1, self.repetitions):
                for process, runs in running:
                    runs.take_turn(process, groups[repetition % len(groups)], counted=repetition >= 0)
        return found

    def start(self, name: str, case: dict[str, Any], stack: ExitStack) -> tuple[JsonProcess, list[str]]:
        """Return the process of a peer that has loaded the model, and its variants.

        Raises:
            ProcessError: the peer is not installed, does not read the model, or failed.
        """
        ours = name == OURS
        if not ours and name not in READ_GGUF and Path(case["model"]).is_file():
            case = case | {"model": str(self.directory_of(Path(case["model"])))}
        python = sys.executable if ours else find_python(name, self.pythons)
        if name == "llama-cpp" and not Path(case["gguf"]).exists():
            save_gguf(load_model(case["model"]), Path(case["gguf"]), None, getattr(torch, self.dtype))
        target = "bench.peers.with_headstart:Peer" if ours else f"with_{name.replace('-', '_')}:Peer"
        log = self.folder / f"{name}.log"
        process = stack.enter_context(
            JsonProcess(python, target, threads=self.threads, source=ours, log=log, timeout=ANSWER_SECONDS)
        )
        about = process.ask(case)
        self.versions[name] = about["version"]
        return process, about["variants"]

    def directory_of(self, file: Path) -> Path:
        """Return the model of a GGUF file as a directory, dequantized."""
        directory = self.folder / f"{file.stem}-directory"
        if not directory.exists():
            save_model(load_model(file, getattr(torch, self.dtype)), directory)
        return directory

    def note(self) -> str:
        """Return the sentences that explain the comparison."""
        return (
            f"{'; '.join(self.versions.values())}. The same weights, prompts and threads for all, greedy, "
            f"{self.new_tokens} new tokens, each peer in a process of its own, variants taking turns. The first pass, "
            "which reads the prompts, is timed apart. Drafts are made right at a given rate (synthetic acceptance): "
            "those of four heads of random weights at the rate that the paper's have in code, those of a GGUF file, "
            "whose heads are copies of its last block, at --tokens-per-pass. Random weights and random prompts give no "
            "text, so they do not judge prompt lookup. llama.cpp reads the same GGUF file, or one of the same type as "
            "the weights, through its C functions; peers without a reader of GGUF take its weights dequantized."
        )


def _least_speed(subject: Subject, peer: str, plain: bool) -> float | None:
    if peer in subject.bars:
        return subject.bars[peer][0 if plain else 1]
    return (PLAIN_BARS if plain else HEADS_BARS).get(peer, {}).get(subject.label)


def find_python(name: str, pythons: Mapping[str, str]) -> str:
    """Return the interpreter that has peer `name`: the one named for it, or this one.

    Raises:
        ProcessError: none has it.
    """
    if name in pythons:
        return pythons[name]
    if importlib.util.find_spec(PACKAGES[name]) is None:
        raise ProcessError(f"not installed: name a Python that has it, --peer-python {name}=PATH")
    return sys.executable
