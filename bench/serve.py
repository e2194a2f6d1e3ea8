"""Measure serving under load: the engine alone, our server with and without speculation, and other servers."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from bench.clients import send, served
from bench.report import RESULTS, Bar, BenchSettings, Findings, count, run_parts
from bench.streams import p50_p95
from headstart import api
from headstart.data.tokenizers import prompt_ids
from headstart.decoding.engine import Engine, generate_all
from headstart.decoding.policy.timing import ratios
from headstart.decoding.settings import Request
from headstart.errors import UsageError
from headstart.evaluation.inputs import read_prompts
from headstart.evaluation.server_client import Stream, model_at
from headstart.formats.bundled import find_model

HTTP_BAR, SPECULATION_BAR, EFFICIENCY_BAR = Bar("<=", 1.05), Bar(">=", 0.97), Bar(">=", 0.85)
"""Bars of the engine's rate over the server's, of speculation over plain decoding, and of that over the tokens per pass
(one client)."""
LEAST_STREAMS = 4
"""Streams of a round at least: fewer say little."""
ENGINE, OURS, PLAIN = "engine alone", "headstart", "headstart, plain"
CODE = tuple(f"def function_{i}(x):\n    return" for i in range(7))
"""Prompts for a model that has none of its own."""


@dataclass(frozen=True)
class Settings(BenchSettings):
    """Servers under load, which take turns. The clients run on this machine."""

    model: Path | None = None
    """Model directory or file that our server serves (None: the model in the box)."""
    url: tuple[str, ...] = ()
    """Servers with OpenAI's API that run already, like http://127.0.0.1:8000 (/v1 is added to an address without a
    path), measured alone without --model. OPENAI_API_KEY is sent to them."""
    clients: tuple[int, ...] = (1, 4, 16)
    """Numbers of clients at once."""
    new_tokens: int = 200
    """Tokens of each stream at most."""
    repetitions: int = 7
    """Rounds."""
    threads: int = 1
    """CPU threads of the decoding, in our server and in the engine alone."""
    out: Path = RESULTS / "serve"
    """Folder of the report."""


@dataclass
class Prompts:
    """Prompts that begin differently, so that no server reuses a part of one that it has read."""

    pieces: Sequence[str]
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def take(self, count: int) -> list[str]:
        """Return prompts that were not used before, of at most 200 characters."""
        numbers = itertools.islice(self.numbers, count)
        return [f"# {number}\n{self.pieces[number % len(self.pieces)]}"[:200] for number in numbers]


def run(settings: Settings) -> dict[str, Any]:
    """Load the servers and return the results, see `report.result`."""
    if min(settings.repetitions, settings.new_tokens, settings.threads, *settings.clients, len(settings.clients)) < 1:
        raise UsageError("--clients, --repetitions, --new-tokens and --threads must be at least 1; give such numbers")
    return run_parts("serve", settings, {"load": load})


def load(settings: Settings) -> Findings:
    """Measure the engine alone, our server, and those of --url, for each number of clients."""
    found, model, prompts = Findings("load"), None, Prompts(CODE)
    with ExitStack() as stack:
        servers: dict[str, tuple[str, dict[str, Any]]] = {}
        if settings.model is not None or not settings.url:
            torch.set_num_threads(settings.threads)
            directory, _ = find_model(settings.model)
            model, file = api.load(directory), directory / "prompts.jsonl"
            if file.is_file():
                prompts = Prompts([model.tokenizer.decode(ids) for ids in read_prompts(file, model.tokenizer)])
            # Two servers of ours, so that neither reuses a prompt that the other has read.
            for name, fields in ((OURS, {}), (PLAIN, {"speculative": {"enabled": False}})):
                flags = ("--slots", str(max(settings.clients)))
                servers[name] = stack.enter_context(served(directory, settings.threads, *flags)), dict(fields)
        for url in settings.url:
            at = url.rstrip("/") + ("" if urlsplit(url).path.strip("/") else "/v1")
            servers[url] = at, {"model": model_at(at)}
        for clients in settings.clients:
            engine = None if model is None else model.engine(slots=clients)
            answers: dict[str, list[list[Stream]]] = {name: [] for name in servers}
            rates: dict[str, list[float]] = {name: [] for name in ([] if model is None else [ENGINE]) + [*servers]}
            for repetition in range(-1, settings.repetitions):
                chosen = prompts.take(max(clients, LEAST_STREAMS))
                if model is not None and engine is not None:
                    speed = _engine_rate(model, engine, chosen, settings.new_tokens)
                    rates[ENGINE] += [speed] if repetition >= 0 else []
                for name, (url, fields) in servers.items():
                    streams = send(url, bodies(chosen, settings.new_tokens, **fields), clients)
                    if repetition >= 0:
                        answers[name].append(streams)
                        rates[name].append(rate(streams))
            _report(found, clients, answers, rates)
    found.note(
        f"greedy, {settings.new_tokens} new tokens at most, prompts of at most 200 characters, the same for all, "
        f"{count(settings.threads, 'thread')} of ours. A client sends its next request when its stream has ended. "
        "Tokens/s: from the first request of a round to its last piece, prompts included; tokens as the server reports "
        "them, or else its pieces. The tokens of one piece arrive together. Engine alone: without a server."
    )
    return found


def bodies(prompts: Sequence[str], new_tokens: int, **fields: Any) -> list[dict[str, Any]]:
    """Return the bodies of streamed, greedy requests."""
    common = {"max_tokens": new_tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    return [{"prompt": prompt, **common, **fields} for prompt in prompts]


def rate(answers: Sequence[Stream]) -> float:
    """Return the tokens per second of all streams together, from the first request to the last piece."""
    return sum(answer.tokens for answer in answers) / (max(a.end for a in answers) - min(a.sent for a in answers))


def _engine_rate(model: api.LanguageModel, engine: Engine, chosen: Sequence[str], new_tokens: int) -> float:
    requests = [Request(tuple(prompt_ids(model.tokenizer, text)), new_tokens) for text in chosen]
    began = time.monotonic()
    generations = generate_all(engine, requests)
    return sum(len(each.tokens) for each in generations) / (time.monotonic() - began)


def _report(
    found: Findings, clients: int, answers: dict[str, list[list[Stream]]], rates: dict[str, list[float]]
) -> None:
    """Add the rates of every server, with the delays, and our ratios."""
    where = count(clients, "client")
    for name, speeds in rates.items():
        streams = list(itertools.chain.from_iterable(answers.get(name, [])))
        firsts = [answer.pieces[0] - answer.sent for answer in streams]
        gaps = [after - before for answer in streams for before, after in pairwise(answer.pieces)]
        details: dict[str, Any] = {}
        if streams:
            details = {"ms_to_first_piece_p50_p95": p50_p95(firsts), "ms_between_pieces_p50_p95": p50_p95(gaps)}
        found.measure(f"{where}: {name}", speeds, "tokens/s", **details)
    if OURS not in rates:
        return
    found.ratio(f"{where}: {ENGINE} / {OURS}", rates[ENGINE], rates[OURS], HTTP_BAR)
    found.ratio(f"{where}: speculation / plain", rates[OURS], rates[PLAIN], SPECULATION_BAR)
    per_pass = [statistics.fmean(a.usage["speculative"]["tokens_per_pass"] for a in each) for each in answers[OURS]]
    shares = [gain / tokens for gain, tokens in zip(ratios(rates[OURS], rates[PLAIN]), per_pass)]
    bar = EFFICIENCY_BAR if clients == 1 else None
    found.measure(f"{where}: tokens per pass", per_pass)
    found.measure(f"{where}: speculation / plain / tokens per pass", shares, bar=bar)
    for ours in (OURS, PLAIN):
        for other in answers.keys() - {OURS, PLAIN}:
            found.ratio(f"{where}: {ours} / {other}", rates[ours], rates[other])
