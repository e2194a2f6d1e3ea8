"""Serving: what HTTP costs over the engine, what speculation brings behind it, and whether it stands a crowd."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bench import malformed, report, serve_peers
from bench.report import Bar, count, measurement
from bench.serve_processes import Answer, ClientProcess, ServerProcess
from bench.sizes import Size
from headstart import api
from headstart.console import say
from headstart.data.tokenizers import prompt_ids
from headstart.decoding.engine import Engine, generate_all
from headstart.decoding.policy.timing import interleave, ratios
from headstart.decoding.settings import Request
from headstart.evaluation.texts import read_prompts
from headstart.formats.bundled import model_directory

OVERHEAD_BAR = Bar("<=", 1.05)
FIRST_TOKEN_BAR = Bar("<=", 1.2)
SPECULATION_BARS = {1: Bar(">=", 0.85), 16: Bar(">=", 0.97)}
"""At one stream of the tokens per pass, at many of plain decoding."""
GROWTH_BAR = Bar("<=", 1.02)
NONE = Bar("<=", 0)

Part = Literal["overhead", "first", "speculation", "soak", "malformed", "peers"]
Peer = Literal["llama.cpp", "vllm"]


@dataclass(frozen=True)
class ServeSettings:
    """Server and clients are processes of their own on this machine; the engine alone runs in this one, in turns."""

    parts: tuple[Part, ...] = ("overhead", "first", "speculation", "soak", "malformed", "peers")
    """overhead: tokens/s of the engine over those through HTTP; first: until the first token; speculation: on over off
    at 1 and 16 streams; soak: many clients, every text compared; malformed: requests that are wrong; peers: beside the
    servers of llama-cpp-python and vLLM."""
    model: Path | None = None
    """Model directory (None: the model in the box)."""
    threads: int = 1
    """CPU threads of the decoding, in the server and in the engine alone."""
    streams: int = 8
    """Of the part "overhead"."""
    new_tokens: int = 200
    """Of each stream."""
    repetitions: int = 7
    """Rounds of the parts overhead, first, speculation and peers."""
    clients: int = 64
    """Of the part "soak"."""
    soak_seconds: float = 300.0
    """How long it lasts."""
    requests: int = 10_000
    """Of the part "malformed"."""
    peers: tuple[Peer, ...] = ("llama.cpp", "vllm")
    """Whom to compare with. One that is not installed is told in the table."""
    install_peers: bool = False
    """Make environments for peers that are not installed here, in the user's cache folder: llama.cpp is compiled, vLLM
    takes 2.5 GB."""
    peer_clients: tuple[int, ...] = (1, 4, 16)
    """Clients at once of the part "peers"."""
    peer_size: Size | None = None
    """Its model: one with random weights instead of --model."""
    out: Path = report.RESULTS / "serve"
    """Folder of the report."""
    date: str | None = None
    """Date of the report (None: today)."""


@dataclass(frozen=True)
class Bench:
    """What all parts use."""

    settings: ServeSettings
    directory: Path
    model: api.LanguageModel
    client: ClientProcess
    prompts: list[str]
    tables: list[dict[str, Any]]
    """That parts add to the report."""

    def server(self, *flags: str) -> ServerProcess:
        return ServerProcess(self.directory, self.settings.threads, *flags)

    def prompt(self, number: int) -> str:
        """A new one each time: nothing of it lies in a slot."""
        return f"# {number}\n{self.prompts[number % len(self.prompts)]}"[:200]

    def offline(self, asked: dict[str, Any]) -> str:
        """What is written for a request."""
        output = self.model.generate(
            asked["prompt"], asked["max_tokens"], temperature=asked.get("temperature", 0.0), seed=asked.get("seed", 0)
        )
        assert isinstance(output, api.Output)
        return output.text

    def request(self, prompt: str, new_tokens: int, **more: Any) -> Request:
        return Request(tuple(prompt_ids(self.model.tokenizer, prompt)), new_tokens, **more)


def run(settings: ServeSettings) -> dict[str, Any]:
    """Runs the parts asked for; see `report.result` for the shape of what comes back."""
    torch.set_num_threads(settings.threads)
    directory = model_directory(settings.model)
    parts: dict[str, Callable[[Bench], tuple[list[dict[str, Any]], str]]] = {
        "overhead": _overhead,
        "first": _first,
        "speculation": _speculation,
        "soak": _soak,
        "malformed": _malformed,
        "peers": _peers,
    }
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    tables: list[dict[str, Any]] = []
    with ClientProcess() as client:
        model = api.load(directory)
        file = directory / "prompts.jsonl"
        prompts = [model.tokenizer.decode(ids) for ids in read_prompts(file, model.tokenizer)] if file.is_file() else []
        bench = Bench(settings, directory, model, client, prompts or ["def f("], tables)
        for name, part in parts.items():
            if name in settings.parts:
                found, note = part(bench)
                for row in found:
                    say(f"{name}: {row['what']}: {row['median']:.4g} {row['unit']}".rstrip())
                rows += found
                notes.append(f"{name}: {note}")
    return report.result("serve", settings, rows, notes, tables)


def _body(prompt: str, new_tokens: int, **more: Any) -> dict[str, Any]:
    usage = {"include_usage": True}
    asked = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True, "stream_options": usage}
    return {**asked, **more}


def _rate(answers: Sequence[Answer]) -> float:
    """Tokens per second of all streams together, from the first request to the last piece."""
    tokens = sum(answer.usage["completion_tokens"] for answer in answers)
    return float(tokens / (max(a.end for a in answers) - min(a.sent for a in answers)))


def _alone(bench: Bench, engine: Engine, numbers: Iterator[int], streams: int, heads: int | None) -> float:
    """Tokens per second of the engine without a server, of new prompts."""
    prompts = [bench.prompt(next(numbers)) for _ in range(streams)]
    requests = [bench.request(prompt, bench.settings.new_tokens, heads=heads) for prompt in prompts]
    began = time.monotonic()
    generations = generate_all(engine, requests)
    return sum(len(g.tokens) for g in generations) / (time.monotonic() - began)


def _overhead(bench: Bench) -> tuple[list[dict[str, Any]], str]:
    settings = bench.settings
    heads = bench.model.config.heads
    engine = bench.model.engine(slots=settings.streams)
    numbers = itertools.count()

    def alone() -> float:
        return _alone(bench, engine, numbers, settings.streams, heads)

    with bench.server("--slots", str(settings.streams)) as server:

        def served() -> float:
            asked = {"speculative": {"heads": heads}}
            prompts = [bench.prompt(next(numbers)) for _ in range(settings.streams)]
            bodies = [_body(prompt, settings.new_tokens, **asked) for prompt in prompts]
            return _rate(bench.client.ask(server.port, bodies, settings.streams))

        rates = interleave({"engine": alone, "HTTP": served}, settings.repetitions)
    where = f"{settings.streams} streams, {count(settings.threads, 'thread')}"
    rows = [measurement("overhead", f"{name}, {where}", values, "tokens/s") for name, values in rates.items()]
    values = ratios(rates["engine"], rates["HTTP"])
    rows.append(measurement("overhead", f"engine / HTTP, {where}", values, bar=OVERHEAD_BAR))
    return rows, (
        f"greedy, all {heads} heads, {settings.new_tokens} new tokens of each stream after 200 or fewer of prompt, "
        "from the first request to the last piece, prompts included; the client runs on the same cores."
    )


def _first(bench: Bench) -> tuple[list[dict[str, Any]], str]:
    engine: Engine = bench.model.engine(slots=1)
    numbers = itertools.count()

    def alone() -> float:
        request = bench.request(bench.prompt(next(numbers)), 4)
        began = time.monotonic()
        generation = engine.submit(request)
        while not generation.tokens:
            engine.step()
        took = time.monotonic() - began
        for _ in engine.run():
            pass
        return 1e3 * took

    with bench.server("--slots", "1") as server:

        def served() -> float:
            answer = bench.client.ask(server.port, [_body(bench.prompt(next(numbers)), 4)], 1)[0]
            return 1e3 * (answer.first - answer.sent)

        repetitions = max(8, 3 * bench.settings.repetitions)
        times = interleave({"engine": alone, "HTTP": served}, repetitions, warmup=3)
    rows = [measurement("first", f"first token, {name}", values, "ms") for name, values in times.items()]
    rows.append(measurement("first", "HTTP / engine", ratios(times["HTTP"], times["engine"], 4), bar=FIRST_TOKEN_BAR))
    return rows, "one stream, a new prompt of 200 tokens or fewer each time, a new connection each time."


def _speculation(bench: Bench) -> tuple[list[dict[str, Any]], str]:
    settings = bench.settings
    numbers = itertools.count()
    rows = []
    for streams, bar in SPECULATION_BARS.items():
        per_pass: list[float] = []
        engine = bench.model.engine(slots=streams)
        if engine.policy is not None:
            engine.policy.prepare(streams)
        with bench.server("--slots", str(streams)) as server:

            def asked(
                enabled: bool, port: int = server.port, streams: int = streams, kept: list[float] = per_pass
            ) -> float:
                more = {} if enabled else {"speculative": {"enabled": False}}
                bodies = [_body(bench.prompt(next(numbers)), settings.new_tokens, **more) for _ in range(streams)]
                answers = bench.client.ask(port, bodies, streams)
                if enabled:
                    kept.append(statistics.fmean(a.usage["speculative"]["tokens_per_pass"] for a in answers))
                return _rate(answers)

            def alone(heads: int | None, engine: Engine = engine, streams: int = streams) -> float:
                return _alone(bench, engine, numbers, streams, heads)

            variants = {
                "on": lambda: asked(True),
                "off": lambda: asked(False),
                "engine alone, on": lambda: alone(None),
                "engine alone, off": lambda: alone(1),
            }
            rates = interleave(variants, settings.repetitions, warmup=2)
        where = "1 stream" if streams == 1 else f"{streams} streams"
        rows += [measurement("speculation", f"{name}, {where}", v, "tokens/s") for name, v in rates.items()]
        gains = ratios(rates["on"], rates["off"])
        engines = ratios(rates["engine alone, on"], rates["engine alone, off"])
        rows.append(measurement("speculation", f"engine alone, on / off, {where}", engines))
        tokens = per_pass[-settings.repetitions :]
        rows.append(measurement("speculation", f"tokens per pass, {where}", tokens))
        if streams == 1:
            rows.append(measurement("speculation", f"on / off, {where}", gains))
            shares = [gain / each for gain, each in zip(gains, tokens)]
            rows.append(measurement("speculation", "on / off / tokens per pass, 1 stream", shares, bar=bar))
        else:
            rows.append(measurement("speculation", f"on / off, {where}", gains, bar=bar))
    return (
        rows,
        "on: nothing is said of heads, so as many draft as are worth it; off: plain decoding in the same server. "
        "Engine alone: the same without a server, in turns with it.",
    )


def _soak(bench: Bench) -> tuple[list[dict[str, Any]], str]:
    settings = bench.settings
    dice = random.Random(0)
    kinds: list[dict[str, Any]] = []
    for i in range(96):
        more = {"temperature": dice.choice((0, 0.7, 1.0)), "seed": dice.randrange(2**31), "stream": dice.random() < 0.5}
        kinds.append({"prompt": bench.prompt(i), "max_tokens": dice.randrange(1, 80), **more})
    wanted = [bench.offline(kind) for kind in kinds]
    with bench.server("--slots", "8", "--queue", "32") as server:
        bench.client.ask(server.port, kinds, settings.clients, seconds=min(20.0, settings.soak_seconds / 3))
        before = server.resident_bytes
        answers = bench.client.ask(server.port, kinds, settings.clients, seconds=settings.soak_seconds, limit=600.0)
        after = server.resident_bytes
    done = [a for a in answers if a.status == 200]
    wrong = [a for a in done if a.text != wanted[a.number]]
    errors = [a for a in answers if a.status not in (200, 429)]
    for answer in errors[:3]:
        say(f"soak: {answer.status} {answer.body[:200]}")
    rows = [
        measurement("soak", "texts", [len(done)]),
        measurement("soak", "answers 429", [sum(a.status == 429 for a in answers)]),
        measurement("soak", "other errors", [len(errors)], bar=NONE),
        measurement("soak", "texts other than offline", [len(wrong)], bar=NONE),
        measurement("soak", "resident memory", [after / 2**20], "MiB"),
        measurement("soak", "resident memory, end / begin", [after / before], bar=GROWTH_BAR),
    ]
    return rows, (
        f"{settings.clients} clients for {settings.soak_seconds:g} s at 8 slots and a queue of 32, streaming and not, "
        "greedy and sampled, 1 to 79 tokens; every text is compared with what decoding writes offline for its seed. "
        "Memory is read after a first third (at most 20 s) and at the end."
    )


def _malformed(bench: Bench) -> tuple[list[dict[str, Any]], str]:
    pairs = malformed.bodies(random.Random(1), bench.settings.requests)
    bodies = [{"path": path, "text": body.decode("latin-1")} for path, body in pairs]
    with bench.server("--slots", "4") as server:
        answers = bench.client.ask(server.port, bodies, 4, limit=60.0)
        after = bench.client.ask(server.port, [_body("def f(", 8)], 1)[0]
    failed = [a for a in answers if a.status >= 500 or a.status < 0]
    for answer in failed[:3]:
        say(f"malformed: {answer.status} {answer.body[:200]} for {bodies[answer.number]['text'][:300]}")
    good = bench.offline({"prompt": "def f(", "max_tokens": 8})
    rows = [
        measurement("malformed", "requests", [len(answers)]),
        measurement("malformed", "refused (4xx)", [sum(400 <= a.status < 500 for a in answers)]),
        measurement("malformed", "5xx or broken", [len(failed)], bar=NONE),
        measurement("malformed", "hangs", [sum(a.status == 0 for a in answers)], bar=NONE),
        measurement("malformed", "wrong afterwards", [int(after.text != good)], bar=NONE),
    ]
    return (
        rows,
        "hand-made: fields set to odd values, nested, taken out; JSON cut, doubled, stirred.",
    )


def _peers(bench: Bench) -> tuple[list[dict[str, Any]], str]:
    settings = bench.settings
    rows, tables, note = serve_peers.run(
        bench.directory,
        bench.client,
        bench.prompt,
        size=settings.peer_size,
        peers=settings.peers,
        install=settings.install_peers,
        clients=settings.peer_clients,
        threads=settings.threads,
        new_tokens=settings.new_tokens,
        repetitions=settings.repetitions,
    )
    bench.tables.extend(tables)
    return rows, note
