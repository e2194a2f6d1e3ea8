"""Measure serving: the cost of HTTP, the gain of speculation behind it, and many clients at once."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from bench import malformed
from bench.decode_settings import Size
from bench.report import NONE, RESULTS, Bar, BenchSettings, Findings, count, run_parts
from bench.serve_peers import PeerContest, PeerPlan
from bench.serve_processes import TIMED_OUT, Answer, ClientProcess, ServerProcess
from headstart import api
from headstart.console import say
from headstart.data.tokenizers import prompt_ids
from headstart.decoding.engine import Engine, generate_all
from headstart.decoding.policy.timing import interleave, ratios
from headstart.decoding.settings import Request
from headstart.evaluation.inputs import read_prompts
from headstart.formats.bundled import model_path

OVERHEAD_BAR = Bar("<=", 1.05)
FIRST_TOKEN_BAR = Bar("<=", 1.2)
ONE_STREAM_BAR = Bar(">=", 0.85)
"""Bar of speculation at one stream: its gain over its tokens per pass."""
MANY_STREAMS_BAR = Bar(">=", 0.97)
"""Bar of speculation at many streams: its gain."""
MANY_STREAMS = 16
GROWTH_BAR = Bar("<=", 1.02)

Part = Literal["overhead", "first", "speculation", "soak", "malformed", "peers"]
Peer = Literal["llama.cpp", "vllm"]


@dataclass(frozen=True)
class ServeSettings(BenchSettings):
    """Server and clients are processes of their own on this machine; the engine alone runs in this one, in turns."""

    parts: tuple[Part, ...] = ("overhead", "first", "speculation", "soak", "malformed", "peers")
    """overhead: tokens/s of the engine over those through HTTP; first: time to the first token; speculation: on over
    off at 1 and 16 streams; soak: many clients, every output compared; malformed: wrong requests; peers: against the
    servers of llama-cpp-python and vLLM."""
    model: Path | None = None
    """Model directory (None: the model in the box)."""
    threads: int = 1
    """CPU threads of the decoding, in the server and in the engine alone."""
    streams: int = 8
    """Streams of the part overhead."""
    new_tokens: int = 200
    """Tokens of each stream."""
    repetitions: int = 7
    """Rounds of the parts overhead, first, speculation and peers."""
    clients: int = 64
    """Clients of the part soak."""
    soak_seconds: float = 300.0
    """Seconds that the part soak lasts."""
    requests: int = 10_000
    """Requests of the part malformed."""
    peers: tuple[Peer, ...] = ("llama.cpp", "vllm")
    """Peers to compare with. The table reports one that is not installed."""
    install_peers: bool = False
    """Make environments in the user's cache folder for peers that are not installed here: llama.cpp is compiled, vLLM
    takes 2.5 GB."""
    peer_clients: tuple[int, ...] = (1, 4, 16)
    """Numbers of clients at once of the part peers."""
    peer_size: Size | None = None
    """Model with random weights that the part peers takes instead of --model."""
    out: Path = RESULTS / "serve"
    """Folder of the report."""


@dataclass(frozen=True)
class Bench:
    """The model, the client and the prompts of all parts."""

    settings: ServeSettings
    directory: Path
    model: api.LanguageModel
    client: ClientProcess
    prompts: list[str]
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def server(self, *flags: str) -> ServerProcess:
        """Start the server."""
        return ServerProcess(self.directory, self.settings.threads, *flags)

    def prompt(self, number: int) -> str:
        """Return the prompt with that number; none begins like another, so no slot holds a part of it."""
        return f"# {number}\n{self.prompts[number % len(self.prompts)]}"[:200]

    def new_prompts(self, streams: int) -> list[str]:
        """Return prompts that were not used before."""
        return [self.prompt(next(self.numbers)) for _ in range(streams)]

    def offline(self, body: dict[str, Any]) -> str:
        """Return the output of decoding without a server for the body of a request."""
        output = self.model.generate(
            body["prompt"],
            max_new_tokens=body["max_tokens"],
            temperature=body.get("temperature", 0.0),
            seed=body.get("seed", 0),
        )
        assert isinstance(output, api.Output)
        return output.text

    def request(self, prompt: str, new_tokens: int, heads: int | None = None) -> Request:
        """Return a prompt as the engine takes it."""
        return Request(tuple(prompt_ids(self.model.tokenizer, prompt)), new_tokens, heads=heads)

    def engine_rate(self, engine: Engine, streams: int, heads: int | None) -> float:
        """Return the tokens per second of the engine without a server, with new prompts."""
        new_tokens = self.settings.new_tokens
        requests = [self.request(prompt, new_tokens, heads) for prompt in self.new_prompts(streams)]
        began = time.monotonic()
        generations = generate_all(engine, requests)
        return sum(len(g.tokens) for g in generations) / (time.monotonic() - began)

    def served(self, server: ServerProcess, streams: int, speculative: dict[str, Any] | None) -> list[Answer]:
        """Return the answers of the server to new prompts."""
        fields = {} if speculative is None else {"speculative": speculative}
        bodies = [_body(prompt, self.settings.new_tokens, **fields) for prompt in self.new_prompts(streams)]
        return self.client.ask(server.port, bodies, streams)


def run(settings: ServeSettings) -> dict[str, Any]:
    """Run the chosen parts and return their results, see `report.result`."""
    torch.set_num_threads(settings.threads)
    directory = model_path(settings.model)
    parts: dict[Part, Callable[[Bench], Findings]] = {
        "overhead": _overhead,
        "first": _first,
        "speculation": _speculation,
        "soak": _soak,
        "malformed": _malformed,
        "peers": _peers,
    }
    with ClientProcess() as client:
        model = api.load(directory)
        file = directory / "prompts.jsonl"
        prompts = [model.tokenizer.decode(ids) for ids in read_prompts(file, model.tokenizer)] if file.is_file() else []
        bench = Bench(settings, directory, model, client, prompts or ["def f("])
        chosen: dict[str, Callable[[ServeSettings], Findings]] = {
            name: _bind(part, bench) for name, part in parts.items() if name in settings.parts
        }
        return run_parts("serve", settings, chosen)


def _bind(part: Callable[[Bench], Findings], bench: Bench) -> Callable[[ServeSettings], Findings]:
    return lambda _: part(bench)


def _body(prompt: str, new_tokens: int, **fields: Any) -> dict[str, Any]:
    usage = {"include_usage": True}
    body = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True, "stream_options": usage}
    return {**body, **fields}


def _rate(answers: Sequence[Answer]) -> float:
    """Return the tokens per second of all streams together, from the first request to the last piece."""
    tokens = sum(answer.usage["completion_tokens"] for answer in answers)
    return float(tokens / (max(a.end for a in answers) - min(a.sent for a in answers)))


def _overhead(bench: Bench) -> Findings:
    """Measure the engine with all heads, alone and behind HTTP."""
    settings, heads = bench.settings, bench.model.config.heads
    streams = settings.streams
    engine = bench.model.engine(slots=streams)
    with bench.server("--slots", str(streams)) as server:
        variants = {
            "engine": lambda: bench.engine_rate(engine, streams, heads),
            "HTTP": lambda: _rate(bench.served(server, streams, {"heads": heads})),
        }
        rates = interleave(variants, settings.repetitions)
    found, where = Findings("overhead"), f"{streams} streams, {count(settings.threads, 'thread')}"
    for name, values in rates.items():
        found.measure(f"{name}, {where}", values, "tokens/s")
    found.ratio(f"engine / HTTP, {where}", rates["engine"], rates["HTTP"], OVERHEAD_BAR)
    found.note(
        f"greedy, all {heads} heads, {settings.new_tokens} new tokens of each stream after a prompt of at most 200, "
        "from the first request to the last piece, prompts included; the client runs on the same cores."
    )
    return found


def _first(bench: Bench) -> Findings:
    """Measure the time to the first token, of the engine alone and behind HTTP."""
    engine = bench.model.engine(slots=1)

    def alone() -> float:
        request = bench.request(bench.new_prompts(1)[0], 4)
        began = time.monotonic()
        generation = engine.submit(request)
        while not generation.tokens:
            engine.step()
        seconds = time.monotonic() - began
        for _ in engine.run():
            pass
        return 1e3 * seconds

    with bench.server("--slots", "1") as server:

        def served() -> float:
            (answer,) = bench.client.ask(server.port, [_body(bench.new_prompts(1)[0], 4)], 1)
            return 1e3 * (answer.first - answer.sent)

        repetitions = max(8, 3 * bench.settings.repetitions)
        times = interleave({"engine": alone, "HTTP": served}, repetitions, warmup=3)
    found = Findings("first")
    for name, values in times.items():
        found.measure(f"first token, {name}", values, "ms")
    found.ratio("HTTP / engine", times["HTTP"], times["engine"], FIRST_TOKEN_BAR, block=4)
    found.note("one stream, a new prompt of at most 200 tokens and a new connection each time.")
    return found


def _speculation(bench: Bench) -> Findings:
    """Measure speculation on over off, in the server and in the engine alone."""
    found = Findings("speculation")
    for streams in (1, MANY_STREAMS):
        rates, per_pass = _speculation_rates(bench, streams)
        where = count(streams, "stream")
        for name, values in rates.items():
            found.measure(f"{name}, {where}", values, "tokens/s")
        found.ratio(f"engine alone, on / off, {where}", rates["engine alone, on"], rates["engine alone, off"])
        found.measure(f"tokens per pass, {where}", per_pass)
        bar = None if streams == 1 else MANY_STREAMS_BAR
        found.ratio(f"on / off, {where}", rates["on"], rates["off"], bar)
        if streams == 1:
            shares = [gain / tokens for gain, tokens in zip(ratios(rates["on"], rates["off"]), per_pass)]
            found.measure("on / off / tokens per pass, 1 stream", shares, bar=ONE_STREAM_BAR)
    found.note(
        "on: the request does not name heads, so as many draft as pay; off: plain decoding in the same server. Engine "
        "alone: the same without a server, in turns with it."
    )
    return found


def _speculation_rates(bench: Bench, streams: int) -> tuple[dict[str, list[float]], list[float]]:
    """Return the tokens per second of each variant, and the tokens per pass of the server, by round."""
    per_pass: list[float] = []
    engine = bench.model.engine(slots=streams)
    if engine.policy is not None:
        engine.policy.prepare(streams)
    with bench.server("--slots", str(streams)) as server:

        def on() -> float:
            answers = bench.served(server, streams, None)
            per_pass.append(statistics.fmean(a.usage["speculative"]["tokens_per_pass"] for a in answers))
            return _rate(answers)

        variants = {
            "on": on,
            "off": lambda: _rate(bench.served(server, streams, {"enabled": False})),
            "engine alone, on": lambda: bench.engine_rate(engine, streams, None),
            "engine alone, off": lambda: bench.engine_rate(engine, streams, 1),
        }
        rates = interleave(variants, bench.settings.repetitions, warmup=2)
    return rates, per_pass[-bench.settings.repetitions :]


def _soak(bench: Bench) -> Findings:
    """Compare every output of a crowded server with decoding without a server, and its memory with itself."""
    settings = bench.settings
    dice = random.Random(0)
    kinds: list[dict[str, Any]] = []
    for i in range(96):
        fields = {"temperature": dice.choice((0, 0.7, 1.0)), "seed": dice.randrange(2**31)}
        fields["stream"] = dice.random() < 0.5
        kinds.append({"prompt": bench.prompt(i), "max_tokens": dice.randrange(1, 80), **fields})
    expected = [bench.offline(kind) for kind in kinds]
    with bench.server("--slots", "8", "--queue", "32") as server:
        bench.client.ask(server.port, kinds, settings.clients, seconds=min(20.0, settings.soak_seconds / 3))
        before = server.resident_bytes
        answers = bench.client.ask(server.port, kinds, settings.clients, seconds=settings.soak_seconds, timeout=600.0)
        after = server.resident_bytes
    done = [a for a in answers if a.status == 200]
    wrong = [a for a in done if a.text != expected[a.number]]
    errors = [a for a in answers if a.status not in (200, 429)]
    for answer in errors[:3]:
        say(f"soak: {answer.status} {answer.body[:200]}")
    found = Findings("soak")
    found.measure("outputs", [len(done)])
    found.measure("answers 429", [sum(a.status == 429 for a in answers)])
    found.measure("other errors", [len(errors)], bar=NONE)
    found.measure("outputs other than offline", [len(wrong)], bar=NONE)
    found.measure("resident memory", [after / 2**20], "MiB")
    found.measure("resident memory, end / begin", [after / before], bar=GROWTH_BAR)
    found.note(
        f"{settings.clients} clients for {settings.soak_seconds:g} s at 8 slots and a queue of 32, streaming and not, "
        "greedy and sampled, 1 to 79 tokens; every output is compared with that of decoding offline with its seed. "
        "Memory is read after a first third (at most 20 s) and at the end."
    )
    return found


def _malformed(bench: Bench) -> Findings:
    """Send wrong requests, and count answers that are no refusal."""
    pairs = malformed.bodies(random.Random(1), bench.settings.requests)
    bodies = [{"path": path, "text": body.decode("latin-1")} for path, body in pairs]
    with bench.server("--slots", "4") as server:
        answers = bench.client.ask(server.port, bodies, 4, timeout=60.0)
        (after,) = bench.client.ask(server.port, [_body("def f(", 8)], 1)
    failed = [a for a in answers if a.status >= 500 or a.status < 0]
    for answer in failed[:3]:
        say(f"malformed: {answer.status} {answer.body[:200]} for {bodies[answer.number]['text'][:300]}")
    expected = bench.offline({"prompt": "def f(", "max_tokens": 8})
    found = Findings("malformed")
    found.measure("requests", [len(answers)])
    found.measure("refused (4xx)", [sum(400 <= a.status < 500 for a in answers)])
    found.measure("5xx or broken", [len(failed)], bar=NONE)
    found.measure("no answer in time", [sum(a.status == TIMED_OUT for a in answers)], bar=NONE)
    found.measure("wrong afterwards", [int(after.text != expected)], bar=NONE)
    found.note("hand-made: fields set to odd values, nested, removed; JSON cut, doubled, stirred.")
    return found


def _peers(bench: Bench) -> Findings:
    """Compare our server with those of peers."""
    settings = bench.settings
    plan = PeerPlan(
        settings.peers,
        settings.install_peers,
        settings.peer_clients,
        settings.threads,
        settings.new_tokens,
        settings.repetitions,
        settings.peer_size,
    )
    return PeerContest(plan, bench.client, bench.prompt).measure(bench.directory)
