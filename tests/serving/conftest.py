"""Run real servers on free ports for tests, one per module, with the bundled model: it writes real text, and some
of its drafts are right."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import headstart
from headstart.decoding.engine import Engine
from headstart.decoding.policy import timing
from headstart.formats.bundled import boxed_model
from headstart.serving.server import Server, make_service
from headstart.serving.settings import ServeSettings

HTTP = httpx.Client(verify=False, timeout=60)
"""One client without certificates, for a client that verifies reads all of them."""


def load(server: Server) -> tuple[float, float]:
    """Return how many outputs are decoded, and how many wait."""
    return metric(server, "headstart_live_slots"), metric(server, "headstart_queue_length")


@contextmanager
def running(settings: ServeSettings, model: Path | None = None) -> Iterator[Server]:
    """Run a server in a thread of this process."""
    server = Server(make_service(model or boxed_model(), settings))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.drain()
        thread.join(20)
        assert not thread.is_alive()


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for a condition, and fail after a time that is long enough for a slow machine."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition does not hold"
        time.sleep(0.005)


def metric(server: Server, name: str, **labels: str) -> float:
    """Return a number of /metrics; 0 before it is first set."""
    named = {"model_name": server.service.name, **labels}
    return server.service.worker.metrics.registry.get_sample_value(name, named) or 0.0


def raw(server: Server, body: bytes, path: str = "/v1/completions", **headers: str) -> tuple[int, Any]:
    """Send a body as it is, and return the status and the JSON of the answer."""
    answer = HTTP.post(server.url + path, content=body, headers={"Content-Type": "application/json", **headers})
    return answer.status_code, json.loads(answer.content)


def opened(server: Server, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
    """Send a request, and return the connection without reading from it."""
    host, port = server.socket.getsockname()[:2]
    connection = socket.create_connection((host, port))
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


@pytest.fixture(scope="module", autouse=True)
def timed_in_haste() -> Iterator[None]:
    """Shorten the timing of passes when a server starts; it does not change any output."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "QUICK_SECONDS", 0.01)
        yield


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(ServeSettings(port=0, slots=4, queue=64, stream_interval=0)) as started:
        yield started


@pytest.fixture(scope="session")
def model() -> headstart.api.LanguageModel:
    """Load the same model, for offline outputs."""
    return headstart.load()


class Gate:
    """Hold the engine's steps while it is closed, and let them run one by one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.open.set()
        self.steps = 0
        self.waiting = False
        """True while a step is held."""
        self._one = threading.Semaphore(0)
        step = Engine.step

        def gated(engine: Engine) -> Any:
            if not self.open.is_set():
                self.waiting = True
                while not (self._one.acquire(timeout=0.01) or self.open.is_set()):
                    pass
                self.waiting = False
            self.steps += 1
            return step(engine)

        monkeypatch.setattr(Engine, "step", gated)

    def let(self, steps: int, wait: bool = True) -> None:
        wanted = self.steps + steps
        self._one.release(steps)
        if wait:
            until(lambda: self.steps >= wanted)


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that makes each step of every engine take so many seconds longer."""

    def slow_down(seconds: float) -> None:
        step = Engine.step

        def slow(engine: Engine) -> Any:
            time.sleep(seconds)
            return step(engine)

        monkeypatch.setattr(Engine, "step", slow)

    return slow_down


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch):
    made = Gate(monkeypatch)
    yield made
    made.open.set()
