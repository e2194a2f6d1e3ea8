"""Compare our server with the OpenAI-compatible servers of peers, with the same plain weights behind each."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench import report
from bench.decode_settings import SIZES, Size, byte_heads
from bench.peer_processes import PeerError, find_python, last_line, package_version, peer_environment, write_gguf
from bench.report import Findings, count
from bench.serve_processes import Answer, ClientProcess, ServerProcess
from bench.streams import p50_p95
from headstart import api
from headstart.console import say
from headstart.data.tokenizers import ByteTokenizer
from headstart.decoding.policy.timing import random_model, ratios
from headstart.errors import UsageError
from headstart.formats.huggingface import save_model
from headstart.model.transformer import Transformer

LEAST_STREAMS = 4
"""Streams of a round at least: fewer say little."""
PROMPT_TOKENS = 200
PRINTABLE = range(0x20, 0x7F)
PLAIN = "headstart, plain"
OURS: dict[str, dict[str, Any]] = {
    "headstart, speculation": {},
    PLAIN: {"speculative": {"enabled": False}},
}
"""Fields of requests to our two servers: two, so that neither reuses a prompt that the other has read."""
THEIRS: dict[str, dict[str, Any]] = {"llama.cpp": {"repeat_penalty": 1.0}, "vllm": {"ignore_eos": True}}
"""Fields of requests to peers; llama-cpp-python's server would penalise repetition."""


@dataclass(frozen=True)
class Weights:
    """A plain model in the formats of the peers."""

    directory: Path
    gguf: Path
    context: int
    dtype: str


def _llama_cpp(weights: Weights, slots: int, threads: int) -> list[str]:
    # It decodes one request at a time; by default a new one would even end the one that runs.
    flags = {
        "model": weights.gguf, "n_ctx": weights.context, "n_threads": threads, "n_threads_batch": threads,
        "interrupt_requests": "false", "verbose": "false",
    }  # fmt: skip
    return ["-m", "llama_cpp.server", *(f"--{name}={value}" for name, value in flags.items())]


def _vllm(weights: Weights, slots: int, threads: int) -> list[str]:
    flags = {
        "model": weights.directory, "dtype": weights.dtype, "max-model-len": weights.context, "max-num-seqs": slots,
        "uvicorn-log-level": "warning",
    }  # fmt: skip
    return ["-m", "vllm.entrypoints.openai.api_server", *(f"--{name}={value}" for name, value in flags.items())]


COMMANDS: dict[str, Callable[[Weights, int, int], list[str]]] = {"llama.cpp": _llama_cpp, "vllm": _vllm}
"""Arguments of a peer's Python, without the address, by weights, slots and threads."""
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


class PeerServer:
    """A peer's server on a free port, which answers; use it in a `with`.

    Args:
        arguments: those of `python`, without the address.
        log: file for what it prints.
        timeout: seconds that its start may take.

    Raises:
        PeerError: it ended, or did not answer in time.
    """

    def __init__(self, python: str, arguments: list[str], *, threads: int, log: Path, timeout: float = 600) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        command = [python, *arguments, "--host=127.0.0.1", f"--port={self.port}"]
        with open(log, "wb") as file:
            # A session of its own: vLLM's engine is a process next to its server, and ends with it.
            self._process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=peer_environment(threads) | ENVIRONMENT,
                start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + timeout
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                self.close()
                raise PeerError(f"failed: its server did not start; {last_line(log)}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", "/v1/models")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def close(self) -> None:
        """End the server and its processes: by a signal, or by force after ten seconds."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)

    def __enter__(self) -> PeerServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Example:
    """A prompt with its known output."""

    prompt: str
    output: str
    """Output of our decoding without a server."""


@dataclass
class Runs:
    """Answers of one server, round by round, by the number of clients."""

    name: str
    port: int = 0
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of its requests next to the prompt."""
    failure: str | None = None
    rounds: dict[int, list[list[Answer]]] = field(default_factory=dict)
    equal: dict[int, list[bool]] = field(default_factory=dict)
    """For each answer, True if it is the output of decoding offline."""

    def ask(self, client: ClientProcess, examples: Sequence[Example], clients: int, *, counted: bool) -> None:
        """Run one round. A server that has failed gets no more requests."""
        if self.failure is not None:
            return
        fields = {"temperature": 0, "stream": True, **self.fields}
        bodies = [{"prompt": each.prompt, "max_tokens": len(each.output), **fields} for each in examples]
        answers = client.ask(self.port, bodies, clients, timeout=600.0)
        failed = next((a for a in answers if a.status != 200 or not a.text), None)
        if failed is not None:
            self.failure = f"failed: status {failed.status}, {' '.join(failed.body.split())[:160]}"
            say(f"{self.name}: {self.failure}")
        elif counted:
            self.rounds.setdefault(clients, []).append(answers)
            self.equal.setdefault(clients, []).extend(a.text == examples[a.number].output for a in answers)

    def rates(self, clients: int) -> list[float]:
        """Return the tokens per second of each round's streams together, from the first request to the last piece."""
        return [
            sum(len(a.text) for a in answers) / (max(a.end for a in answers) - min(a.sent for a in answers))
            for answers in self.rounds[clients]
        ]

    def delays(self, clients: int) -> list[str]:
        """Return p50 / p95 in ms: to the first token, between tokens, and between the pieces of a stream.

        The tokens of a piece arrive together.
        """
        first: list[float] = []
        tokens: list[float] = []
        pieces: list[float] = []
        for answer in itertools.chain.from_iterable(self.rounds[clients]):
            arrived = [(at, size) for at, size in zip(answer.times, map(_event_tokens, answer.events)) if size]
            first.append(arrived[0][0] - answer.sent)
            for (before, _), (at, size) in pairwise(arrived):
                pieces.append(at - before)
                tokens += [at - before] + [0.0] * (size - 1)
        return list(map(p50_p95, (first, tokens, pieces)))


@dataclass(frozen=True)
class PeerPlan:
    """Settings of the comparison."""

    peers: Sequence[str]
    install: bool
    clients: Sequence[int]
    threads: int
    new_tokens: int
    repetitions: int
    size: Size | None = None
    """Model with random weights instead of that of a directory."""


@dataclass
class PeerContest:
    """Our servers and those of peers, which take turns."""

    plan: PeerPlan
    client: ClientProcess
    prompt: Callable[[int], str]
    """Function that gives the prompt with a number."""
    start_ours: Callable[..., contextlib.AbstractContextManager[Any]] = ServerProcess
    """Starts one of our servers, of a directory, threads and flags."""
    least_streams: int = LEAST_STREAMS
    versions: list[str] = field(default_factory=list)
    """Versions of the peers that were found."""

    def measure(self, directory: Path) -> Findings:
        """Run all rounds and compare the rates."""
        plan = self.plan
        with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
            folder = Path(temporary)
            if plan.size is not None:
                directory = folder / plan.size
                save_model(printable_model(plan.size), directory, ByteTokenizer())
            model = api.load(directory)
            if not isinstance(model.tokenizer, ByteTokenizer):
                raise UsageError(f"{directory}: is no byte model, and peers count bytes; take the model in the box")
            per_round = {number: max(number, self.least_streams) for number in plan.clients}
            needed = (1 + plan.repetitions) * sum(per_round.values())
            examples = iter(find_examples(model, self.prompt, needed, plan.new_tokens))
            dtype = str(model.transformer.trunk.embedding.weight.dtype).removeprefix("torch.")
            context = min(model.config.context, PROMPT_TOKENS + plan.new_tokens)
            weights = Weights(directory, folder / "model.gguf", context, dtype)
            found = [*self._start_ours(stack, weights), *self._start_peers(stack, weights, folder)]
            for number, streams in per_round.items():
                say(f"peers: {count(number, 'client')}")
                for repetition in range(-1, plan.repetitions):
                    some = list(itertools.islice(examples, streams))
                    for runs in found:
                        runs.ask(self.client, some, number, counted=repetition >= 0)
        label = directory.name if plan.size is None else f"{plan.size}, random weights"
        findings = Findings("peers")
        findings.note(self._note())
        for number in plan.clients:
            where = f"{label}, {count(number, 'client')}"
            _compare(findings, found, number, where)
            title = f"Peers: {where}, {dtype}, {count(plan.threads, 'thread')}"
            findings.tables.append(_table(found, number, title))
        return findings

    def _start_ours(self, stack: ExitStack, weights: Weights) -> list[Runs]:
        flags = ("--slots", str(max(self.plan.clients)), "--context", str(weights.context))
        servers = (self.start_ours(weights.directory, self.plan.threads, *flags) for _ in OURS)
        return [Runs(name, stack.enter_context(next(servers)).port, fields) for name, fields in OURS.items()]

    def _start_peers(self, stack: ExitStack, weights: Weights, folder: Path) -> list[Runs]:
        plan, found = self.plan, []
        for name in plan.peers:
            try:
                python = find_python(name, install=plan.install)
                self.versions.append(package_version(name, python))
                if name == "llama.cpp":
                    write_gguf(weights.directory, weights.gguf, weights.dtype, ByteTokenizer())
                say(f"peers: {name} starts")
                arguments = COMMANDS[name](weights, max(plan.clients), plan.threads)
                server = PeerServer(python, arguments, threads=plan.threads, log=folder / f"{name}.log")
                found.append(Runs(name, stack.enter_context(server).port, THEIRS[name]))
            except PeerError as error:
                say(f"{name}: {error}")
                found.append(Runs(name, failure=str(error)))
        return found

    def _note(self) -> str:
        return (
            f"{'; '.join(self.versions) or 'no peer is here'}. Each server is a process of its own with the "
            "same plain weights, prompts and decoding threads, and else its defaults; greedy, "
            f"{self.plan.new_tokens} new tokens of each stream, servers taking turns. A client sends its next request "
            "when the last stream has ended; the clients run on the same cores. Tokens/s: from the first request of a "
            "round to its last piece, prompts included. llama-cpp-python's server decodes one request at a time. "
            "Tokens of a piece arrive together, so most gaps between tokens are 0 if a pass has several; our streams "
            "get a piece at most every 20 ms."
        )


def printable_model(size: Size) -> Transformer:
    """Return a byte model with random weights whose output is printable, so that servers send all of it."""
    config = byte_heads(SIZES[size])
    model = random_model(config, "float32", "cpu")
    others = [token for token in range(config.vocab_size) if token not in PRINTABLE]
    with torch.no_grad():
        for matrix in model.unembedding.weights:
            matrix[others] = 0
    return model


def find_examples(
    model: api.LanguageModel, prompt: Callable[[int], str], needed: int, new_tokens: int
) -> list[Example]:
    """Return prompts whose output is ASCII and does not end before `new_tokens`."""
    found: list[Example] = []
    for start in range(0, 8 * needed + 64, 16):
        prompts = [p for p in map(prompt, range(start, start + 16)) if p.isascii()]
        outputs = model.generate(prompts, max_new_tokens=new_tokens) if prompts else []
        assert isinstance(outputs, list)
        found += [
            Example(p, o.text) for p, o in zip(prompts, outputs) if o.text.isascii() and len(o.text) == new_tokens
        ]
        if len(found) >= needed:
            return found[:needed]
    raise UsageError(f"too few outputs are {new_tokens} ASCII characters; take another model or fewer --new-tokens")


def _event_tokens(event: dict[str, Any]) -> int:
    """Return the tokens of a piece; a character is a token here."""
    return sum(len(choice["text"]) for choice in event["choices"])


def _compare(findings: Findings, found: Sequence[Runs], clients: int, where: str) -> None:
    """Add the rate of each server, and each of ours over each peer's."""
    done = [runs for runs in found if runs.failure is None]
    for runs in done:
        findings.measure(f"{where}: {runs.name}", runs.rates(clients), "tokens/s")
    for mine in (runs for runs in done if runs.name in OURS):
        for other in (runs for runs in done if runs.name not in OURS):
            findings.ratio(f"{where}: {mine.name} / {other.name}", mine.rates(clients), other.rates(clients))


def _table(found: Sequence[Runs], clients: int, title: str) -> dict[str, Any]:
    plain = next(runs for runs in found if runs.name == PLAIN)
    lines: list[list[object]] = []
    for runs in found:
        if runs.failure is not None:
            lines.append([runs.name, runs.failure, "", "", "", "", ""])
            continue
        rates, equal = runs.rates(clients), runs.equal[clients]
        over = statistics.median(ratios(rates, plain.rates(clients))) if plain.failure is None else None
        same = f"{sum(equal)} of {len(equal)}"
        lines.append([runs.name, statistics.median(rates), over, *runs.delays(clients), same])
    headers = ["", "tokens/s", "over our plain", "ms to the first token, p50 / p95", "ms between tokens, p50 / p95"]
    return report.table(title, [*headers, "ms between pieces, p50 / p95", "outputs as offline"], lines)
