"""Check a server with many requests, clients that go, deadlines and failing engines."""

from __future__ import annotations

import gc
import json
import logging
import signal
import socket
import struct
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving.conftest import HTTP, Gate, load, metric, opened, raw, running, until

from headstart.api import LanguageModel
from headstart.decoding.engine import Engine
from headstart.serving.server import Server
from headstart.serving.settings import ServeSettings

LONG = {"prompt": "def f(", "max_tokens": 500, "temperature": 0, "speculative": {"enabled": False}}
SHORT = json.dumps({"prompt": "x", "max_tokens": 2, "temperature": 0}).encode()


@pytest.fixture(scope="module")
def small():
    """Run a server with two slots and a queue of two."""
    with running(ServeSettings(port=0, slots=2, queue=2)) as started:
        yield started


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_slot_within_a_step(
    stream: bool, small: Server, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled: list[int] = []
    cancel = small.service.worker.cancel

    def watched(jobs: Any, outcome: str) -> None:
        cancel(jobs, outcome)
        cancelled.append(len(jobs))

    monkeypatch.setattr(small.service.worker, "cancel", watched)
    before = metric(small, "headstart_texts_total", outcome="cancelled")
    gate.open.clear()
    connection = opened(small, {**LONG, "stream": stream, "n": 2})
    gate.let(4)
    assert load(small) == (2, 0)
    if stream:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    steps = gate.steps
    until(lambda: gate.waiting)  # the next step has begun
    connection.close()
    until(lambda: cancelled == [2])
    gate.let(1, wait=False)
    until(lambda: load(small) == (0, 0))
    assert gate.steps <= steps + 1
    assert metric(small, "headstart_texts_total", outcome="cancelled") == before + 2
    gate.open.set()
    assert raw(small, SHORT)[0] == 200


def test_a_client_that_resets_its_connection_at_once_is_given_up(small: Server, gate: Gate) -> None:
    def given_up() -> float:
        return metric(small, "headstart_requests_total", endpoint="/v1/completions", status="499")

    before = given_up()
    gate.open.clear()
    connection = opened(small, LONG)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    until(lambda: given_up() == before + 1)
    gate.open.set()
    until(lambda: small.service.idle)


def test_a_client_that_goes_within_its_body_leaves_no_traceback(
    small: Server, capfd: pytest.CaptureFixture[str]
) -> None:
    def given_up() -> float:
        return metric(small, "headstart_requests_total", endpoint="/v1/completions", status="499")

    before = given_up()
    with socket.create_connection(small.socket.getsockname()[:2]) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    until(lambda: given_up() == before + 1)
    assert "Traceback" not in capfd.readouterr().err


def test_requests_beyond_the_queue_are_answered_429(small: Server, gate: Gate, model) -> None:
    gate.open.clear()
    body = json.dumps({"prompt": "def f(", "max_tokens": 8, "temperature": 0}).encode()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(raw, small, body) for _ in range(4)]
        until(lambda: sum(load(small)) == 4)
        answer = HTTP.post(f"{small.url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 429 and 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["type"] == "rate_limit_error"
        status, refused = raw(small, json.dumps({**LONG, "n": 5}).encode())
        assert status == 400 and refused["error"]["param"] == "n"  # trying again would not help
        gate.open.set()
        wanted = model.generate("def f(", max_new_tokens=8).text
        assert [(s, a["choices"][0]["text"]) for s, a in (f.result() for f in waiting)] == [(200, wanted)] * 4
    assert metric(small, "headstart_requests_total", endpoint="/v1/completions", status="429") >= 1


def test_a_waiting_client_that_goes_leaves_the_queue(small: Server, gate: Gate) -> None:
    before = metric(small, "headstart_texts_total", outcome="cancelled")
    gate.open.clear()
    first = opened(small, {**LONG, "n": 2})
    until(lambda: load(small) == (2, 0))
    second = opened(small, LONG)
    until(lambda: load(small) == (2, 1))
    second.close()
    until(lambda: load(small) == (2, 0))
    first.close()
    gate.open.set()
    until(lambda: small.service.worker.idle)
    assert metric(small, "headstart_texts_total", outcome="cancelled") == before + 3


def test_a_failed_engine_ends_its_requests_and_is_replaced(
    small: Server, gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate.open.clear()
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(raw, small, json.dumps(LONG).encode())
        stream = opened(small, {**LONG, "stream": True})
        until(lambda: sum(load(small)) == 2)
        gate.let(3)
        step = Engine.step
        monkeypatch.setattr(Engine, "step", lambda engine: 1 / 0)
        gate.let(1, wait=False)
        until(lambda: small.service.worker.failures == 1)
        monkeypatch.setattr(Engine, "step", step)
        gate.open.set()
        status, answer = waiting.result()
    assert status == 500 and answer["error"]["type"] == "server_error" and "division" not in str(answer)
    said = b""
    while piece := stream.recv(65536):
        said += piece
        if b"server_error" in said:
            break
    assert b"HTTP/1.1 200" in said and b"server_error" in said and b"[DONE]" not in said
    assert "ZeroDivisionError" in caplog.text
    assert HTTP.get(f"{small.url}/health").json() == {"status": "ok", "engine_failures": 1}
    assert metric(small, "headstart_engine_failures_total") == 1
    assert raw(small, SHORT)[0] == 200


def test_a_second_signal_ends_requests(gate: Gate) -> None:
    with running(ServeSettings(port=0, slots=1)) as server:
        gate.open.clear()
        connection = opened(server, LONG)
        until(lambda: load(server) == (1, 0))
        server.handle_exit(signal.SIGINT, None)
        assert HTTP.get(f"{server.url}/ready").status_code == 503 and not server.should_exit
        server.handle_exit(signal.SIGINT, None)
        gate.open.set()
        assert connection.recv(100).startswith(b"HTTP/1.1 503")


def test_a_drain_has_a_time_limit(gate: Gate) -> None:
    with running(ServeSettings(port=0, slots=1, drain_seconds=0.05)) as server:
        gate.open.clear()
        connection = opened(server, LONG)
        until(lambda: load(server) == (1, 0))
        server.drain()
        assert connection.recv(100).startswith(b"HTTP/1.1 503")
        gate.open.set()


def test_a_request_ends_at_its_deadline(gate: Gate, model) -> None:
    with running(ServeSettings(port=0, slots=1, request_timeout=0.3)) as server:
        gate.open.clear()
        status, answer = raw(server, json.dumps(LONG).encode())
        assert status == 504 and answer["error"]["code"] == "timeout"
        gate.open.set()
        until(lambda: server.service.worker.idle)
        assert metric(server, "headstart_texts_total", outcome="deadline") == 1
        status, answer = raw(server, SHORT)
        assert status == 200 and answer["choices"][0]["text"] == model.generate("x", max_new_tokens=2).text


def test_an_engine_that_cannot_be_replaced_makes_the_server_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise MemoryError

    with running(ServeSettings(port=0, slots=1)) as server:
        monkeypatch.setattr(LanguageModel, "engine", fail)
        monkeypatch.setattr(Engine, "step", fail)
        assert raw(server, SHORT)[0] == 500
        until(lambda: server.service.worker.dead)
        assert HTTP.get(f"{server.url}/health").status_code == 503
        assert HTTP.get(f"{server.url}/ready").status_code == 503
        assert raw(server, SHORT)[0] == 503


def test_a_failed_engine_leaves_memory_before_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[weakref.ref[Engine]] = []
    alive: list[int] = []
    make, step = LanguageModel.engine, Engine.step

    def watched(*settings: Any) -> Engine:
        alive.append(sum(engine() is not None for engine in engines))
        engine = make(*settings)
        engines.append(weakref.ref(engine))
        return engine

    monkeypatch.setattr(LanguageModel, "engine", watched)
    with running(ServeSettings(port=0, slots=1)) as server:
        # pytest keeps what is logged, and with it the frames of the failed step.
        monkeypatch.setattr(logging.getLogger("headstart.serving.worker"), "disabled", True)
        gc.disable()
        try:
            monkeypatch.setattr(Engine, "step", lambda engine: 1 / 0)
            assert raw(server, SHORT)[0] == 500
            until(lambda: len(engines) == 2)
        finally:
            gc.enable()
        monkeypatch.setattr(Engine, "step", step)
        assert raw(server, SHORT)[0] == 200 and alive == [0, 0]


def test_fast_passes_share_an_event(model) -> None:
    with running(ServeSettings(port=0, slots=1, stream_interval=10)) as server:
        asked = {"prompt": "def f(", "max_tokens": 60, "temperature": 0, "stream": True}
        events = HTTP.post(f"{server.url}/v1/completions", json={**asked, "speculative": {"origins": True}}).text
    choices = [json.loads(line[6:])["choices"][0] for line in events.splitlines() if line.startswith("data: {")]
    wanted = model.generate("def f(", max_new_tokens=60).text
    assert len(choices) == 2 and "".join(choice["text"] for choice in choices) == wanted
    assert "".join(t["text"] for choice in choices for t in choice["speculative"]["tokens"]) == wanted


def test_an_unexpected_error_is_a_500_without_details(
    small: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("/home/somebody/secret")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "generation", broken)
        status, answer = raw(small, SHORT)
    assert status == 500 and answer["error"]["type"] == "server_error" and "somebody" not in str(answer)
    assert raw(small, SHORT)[0] == 200
    assert "somebody" in caplog.text


class Panic(BaseException):
    """Stand for a panic in Rust, which pyo3 raises as a BaseException."""


@pytest.mark.parametrize("place", ["generation", "step"])
def test_a_panic_in_rust_leaves_the_engine_running(
    small: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    def panic(*_: Any) -> Any:
        raise Panic("/home/somebody/secret")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, place, panic)
        status, answer = raw(small, SHORT)
    assert status == 500 and answer["error"]["type"] == "server_error" and "somebody" not in str(answer)
    assert raw(small, SHORT)[0] == 200
    assert "somebody" in caplog.text


def test_a_failing_route_is_a_500_without_details(small: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(small.service, "whole", lambda *_: 1 / 0)
        status, answer = raw(small, SHORT)
    assert status == 500 and "division" not in str(answer)
    assert raw(small, SHORT)[0] == 200
