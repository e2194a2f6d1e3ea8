"""The part "peers" of the serving benchmark: our server and those of others, the same plain weights behind each."""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench import report
from bench.peer_environments import PeerError, interpreter, version
from bench.peer_servers import COMMANDS, PeerServer, Weights
from bench.report import count, measurement
from bench.serve_processes import Answer, ClientProcess, ServerProcess
from bench.sizes import SIZES, Size, byte_heads
from bench.streams import percentile
from headstart import api
from headstart.console import say
from headstart.data.tokenizers import ByteTokenizer
from headstart.decoding.policy.timing import random_model, ratios
from headstart.errors import UsageError
from headstart.formats.gguf import save_gguf
from headstart.formats.huggingface import load_model, save_model
from headstart.model.transformer import Transformer

LEAST_STREAMS = 4
"""Of a round: fewer tell little."""
PROMPT_TOKENS = 200
PRINTABLE = range(0x20, 0x7F)
OURS: dict[str, dict[str, Any]] = {
    "headstart, speculation": {},
    "headstart, plain": {"speculative": {"enabled": False}},
}
"""What is asked of our two servers. Two, for what one has read the other must read too."""
THEIRS: dict[str, dict[str, Any]] = {"llama.cpp": {"repeat_penalty": 1.0}, "vllm": {"ignore_eos": True}}
"""The same of the others; llama-cpp-python's would penalise repetition."""


@dataclass(frozen=True)
class Text:
    prompt: str
    wanted: str
    """What our decoding writes after it offline."""


@dataclass
class Runs:
    """What one server answered, round by round, by how many clients asked."""

    name: str
    port: int = 0
    more: dict[str, Any] = field(default_factory=dict)
    """What it is asked beside the prompt."""
    failure: str | None = None
    rounds: dict[int, list[list[Answer]]] = field(default_factory=dict)
    equal: dict[int, list[bool]] = field(default_factory=dict)
    """Whether each text was what our decoding writes offline."""

    def ask(self, client: ClientProcess, texts: Sequence[Text], clients: int, *, keep: bool) -> None:
        """One round; a server that fails is not asked again."""
        if self.failure is not None:
            return
        asked = {"temperature": 0, "stream": True, **self.more}
        bodies = [{"prompt": text.prompt, "max_tokens": len(text.wanted), **asked} for text in texts]
        answers = client.ask(self.port, bodies, clients, limit=600.0)
        failed = next((a for a in answers if a.status != 200 or not a.text), None)
        if failed is not None:
            self.failure = f"failed: status {failed.status}, {' '.join(failed.body.split())[:160]}"
            say(f"{self.name}: {self.failure}")
        elif keep:
            self.rounds.setdefault(clients, []).append(answers)
            self.equal.setdefault(clients, []).extend(a.text == texts[a.number].wanted for a in answers)

    def rates(self, clients: int) -> list[float]:
        """Tokens per second of all streams of a round together, from the first request to the last piece."""
        return [
            sum(len(a.text) for a in answers) / (max(a.end for a in answers) - min(a.sent for a in answers))
            for answers in self.rounds[clients]
        ]

    def milliseconds(self, clients: int) -> list[str]:
        """p50 / p95 of: until the first token; between tokens, of which those of a piece come at once; between pieces
        of a stream."""
        first: list[float] = []
        tokens: list[float] = []
        pieces: list[float] = []
        for answer in itertools.chain.from_iterable(self.rounds[clients]):
            arrived = [(time, size) for time, size in zip(answer.times, map(_tokens_of, answer.events)) if size]
            first.append(arrived[0][0] - answer.sent)
            for (before, _), (time, size) in pairwise(arrived):
                pieces.append(time - before)
                tokens += [time - before] + [0.0] * (size - 1)
        return [" / ".join(f"{1e3 * percentile(each, p):.3g}" for p in (50, 95)) for each in (first, tokens, pieces)]


def run(
    directory: Path,
    client: ClientProcess,
    prompt: Callable[[int], str],
    *,
    size: Size | None,
    peers: Sequence[str],
    install: bool,
    clients: Sequence[int],
    threads: int,
    new_tokens: int,
    repetitions: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """Measurements, tables and a note. `size`: instead of the model in `directory` one with random weights."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if size is not None:
            directory = folder / size
            save_model(printable_model(size), directory, ByteTokenizer())
        model = api.load(directory)
        if not isinstance(model.tokenizer, ByteTokenizer):
            raise UsageError(f"{directory}: peers count tokens by bytes; take a model of bytes, as the one in the box")
        per_round = {number: max(number, LEAST_STREAMS) for number in clients}
        texts = iter(_texts(model, prompt, (1 + repetitions) * sum(per_round.values()), new_tokens))
        dtype = str(model.transformer.trunk.embedding.weight.dtype).removeprefix("torch.")
        context = min(model.config.context, PROMPT_TOKENS + new_tokens)
        weights = Weights(directory, folder / "model.gguf", context, dtype)
        with ExitStack() as stack:
            flags = ("--slots", str(max(clients)), "--context", str(context))
            found = []
            for name, more in OURS.items():
                found.append(Runs(name, stack.enter_context(ServerProcess(directory, threads, *flags)).port, more))
            versions = []
            for name in peers:
                try:
                    python = interpreter(name, install=install)
                    versions.append(version(name, python))
                    if name == "llama.cpp":
                        _write_gguf(weights)
                    say(f"peers: {name} starts")
                    arguments = COMMANDS[name](weights, max(clients), threads)
                    server = PeerServer(python, arguments, threads=threads, log=folder / f"{name}.log")
                    found.append(Runs(name, stack.enter_context(server).port, THEIRS[name]))
                except PeerError as error:
                    say(f"{name}: {error}")
                    found.append(Runs(name, failure=str(error)))
            for number, streams in per_round.items():
                say(f"peers: {count(number, 'client')}")
                for repetition in range(-1, repetitions):
                    some = list(itertools.islice(texts, streams))
                    for runs in found:
                        runs.ask(client, some, number, keep=repetition >= 0)
    label = directory.name if size is None else f"{size}, random weights"
    rows: list[dict[str, Any]] = []
    tables: list[dict[str, Any]] = []
    for number in clients:
        where = f"{label}, {count(number, 'client')}"
        rows += _measurements(found, number, where)
        tables.append(_table(found, number, f"Peers: {where}, {dtype}, {count(threads, 'thread')}"))
    return rows, tables, _note(versions, new_tokens)


def printable_model(size: Size) -> Transformer:
    """A model of bytes with random weights that writes printable characters alone, so that all servers tell all of it
    and none ends early."""
    config = byte_heads(SIZES[size])
    model = random_model(config, "float32", "cpu")
    others = [token for token in range(config.vocab_size) if token not in PRINTABLE]
    with torch.no_grad():
        for matrix in model.unembedding.weights:
            matrix[others] = 0
    return model


def _texts(model: api.LanguageModel, prompt: Callable[[int], str], wanted: int, new_tokens: int) -> list[Text]:
    """Prompts of which the text is ASCII and does not end before `new_tokens`."""
    found: list[Text] = []
    for start in range(0, 8 * wanted + 64, 16):
        prompts = [p for p in map(prompt, range(start, start + 16)) if p.isascii()]
        outputs = model.generate(prompts, new_tokens) if prompts else []
        assert isinstance(outputs, list)
        found += [Text(p, o.text) for p, o in zip(prompts, outputs) if o.text.isascii() and len(o.text) == new_tokens]
        if len(found) >= wanted:
            return found[:wanted]
    raise UsageError(
        f"too few of its texts are {new_tokens} ASCII characters; take another model or fewer --new-tokens"
    )


def _write_gguf(weights: Weights) -> None:
    try:
        save_gguf(load_model(weights.directory), weights.gguf, ByteTokenizer(), dtype=getattr(torch, weights.dtype))
    except UsageError as error:
        raise PeerError(f"no GGUF file: {error}") from error


def _tokens_of(event: dict[str, Any]) -> int:
    """Of a piece; a character is a token here."""
    return sum(len(choice["text"]) for choice in event["choices"])


def _measurements(found: Sequence[Runs], clients: int, where: str) -> list[dict[str, Any]]:
    """Tokens per second of each, and each of ours over each of the others."""
    done = [runs for runs in found if runs.failure is None]
    rows = [measurement("peers", f"{where}: {runs.name}", runs.rates(clients), "tokens/s") for runs in done]
    for mine in (runs for runs in done if runs.name in OURS):
        for other in (runs for runs in done if runs.name not in OURS):
            values = ratios(mine.rates(clients), other.rates(clients))
            rows.append(measurement("peers", f"{where}: {mine.name} / {other.name}", values))
    return rows


def _table(found: Sequence[Runs], clients: int, title: str) -> dict[str, Any]:
    plain = next(runs for runs in found if runs.name == "headstart, plain")
    lines: list[list[object]] = []
    for runs in found:
        if runs.failure is not None:
            lines.append([runs.name, runs.failure, "", "", "", "", ""])
            continue
        rates, equal = runs.rates(clients), runs.equal[clients]
        over = statistics.median(ratios(rates, plain.rates(clients))) if plain.failure is None else None
        same = f"{sum(equal)} of {len(equal)}"
        lines.append([runs.name, statistics.median(rates), over, *runs.milliseconds(clients), same])
    headers = ["", "tokens/s", "over our plain", "ms to the first token, p50 / p95", "ms between tokens, p50 / p95"]
    return report.table(title, [*headers, "ms between pieces, p50 / p95", "texts as offline"], lines)


def _note(versions: Sequence[str], new_tokens: int) -> str:
    return (
        f"{'; '.join(versions) or 'no peer is here'}. Each server is a process of its own with the same plain weights, "
        f"prompts and threads of decoding, as it comes otherwise; greedy, {new_tokens} new tokens of each stream, "
        "servers taking turns. A client asks for its next stream when the last has ended; the clients run on the same "
        "cores. Tokens/s: from the first request of a round to its last piece, prompts included. llama-cpp-python's "
        "server decodes one request at a time. Tokens of a piece come at once, so most gaps between tokens are 0 where "
        "there are several; our streams get a piece at most every 20 ms."
    )
