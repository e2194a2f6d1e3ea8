"""Check that clients do not see, starve or stop each other: prefixes, the queue, and bounds before any work."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from serving.conftest import HTTP, Gate, metric, opened, raw, running, until

from headstart.decoding import constraints, engine
from headstart.decoding.kernels.cpu import kernels
from headstart.serving import service as service_module
from headstart.serving.errors import ApiError
from headstart.serving.jobs import Inbox, Job
from headstart.serving.metrics import Metrics
from headstart.serving.server import Server
from headstart.serving.settings import ServeSettings
from headstart.serving.worker import Worker

SECRET = "# internal: the master password is tr0ub4dor&3 do not share\n"


@pytest.fixture(scope="module")
def locked() -> Iterator[Server]:
    """Run a server with two slots, a queue of four, and eleven keys."""
    keys = ("alpha", "beta", *(f"key-{number}" for number in range(2, 11)))
    with running(ServeSettings(port=0, slots=2, queue=4, api_key=keys)) as started:
        yield started


def asked(server: Server, key: str = "alpha", **body: Any) -> tuple[int, Any]:
    content = json.dumps({"max_tokens": 1, "temperature": 0, **body}).encode()
    return raw(server, content, Authorization=f"Bearer {key}")


def cached(server: Server, prompt: str, key: str = "alpha", **body: Any) -> int:
    status, answer = asked(server, key, prompt=prompt, **body)
    assert status == 200, answer
    found: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


# Prefixes


def test_a_prompt_is_reused_within_its_key_and_salt_only(locked: Server) -> None:
    assert cached(locked, SECRET) == 0
    # Where bits depend on the shape of a chunk, a prompt of another length reuses no part of a chunk.
    guess, hit = (SECRET[:40] + "~", 40) if kernels(torch.float32) else (SECRET, len(SECRET) - 1)
    assert cached(locked, guess, "beta") == 0 and cached(locked, guess) == hit
    assert cached(locked, guess, cache_salt="mine") == 0 == cached(locked, guess, "beta", cache_salt="mine")
    assert cached(locked, guess, cache_salt="mine") == hit == cached(locked, guess, "beta", cache_salt="mine")
    assert asked(locked, prompt="x", cache_salt="")[0] == 400


def test_keys_share_prompts_only_if_the_operator_says_so() -> None:
    with running(ServeSettings(port=0, slots=1, api_key=("alpha", "beta"), share_prefixes=True)) as server:
        assert cached(server, SECRET) == 0 and cached(server, SECRET, "beta") == len(SECRET) - 1
        assert cached(server, SECRET, "beta", cache_salt="mine") == 0


def test_no_salt_of_one_key_is_another_key(locked: Server) -> None:
    prompt = "# a prompt of the last of eleven keys\n"
    assert cached(locked, prompt, "key-10") == 0
    assert cached(locked, prompt, "beta", cache_salt="0") == 0  # beta is number 1
    assert cached(locked, prompt, "key-10") == len(prompt) - 1


def test_a_salt_separates_prompts_without_keys(server: Server) -> None:
    assert cached(server, SECRET) == 0 and cached(server, SECRET, "whatever") == len(SECRET) - 1
    assert cached(server, SECRET, cache_salt="mine") == 0
    assert cached(server, SECRET, cache_salt="mine") == len(SECRET) - 1


def test_cached_tokens_of_choices_are_those_of_the_first(server: Server) -> None:
    prompt = "a prompt that nobody has sent before, of some length"
    assert cached(server, prompt, n=3) == 0
    assert cached(server, prompt, n=3) == len(prompt) - 1
    both = [prompt, "x" * 20 + prompt]
    assert cached(server, both, n=2) == len(prompt) - 1  # type: ignore[arg-type]


# Who a client is


def test_a_client_is_the_key_that_matched(locked: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    clients: list[str] = []
    submit = locked.service.worker.submit

    def watched(jobs: Any) -> None:
        clients.extend(job.client for job in jobs)
        submit(jobs)

    monkeypatch.setattr(locked.service.worker, "submit", watched)
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    for header in ("Bearer alpha", "bEARER   alpha", "Bearer beta"):
        assert raw(locked, body, **{"Authorization": header, "X-Forwarded-For": header})[0] == 200
    assert clients[0] == clients[1] != clients[2] and "alpha" not in clients[0]


@pytest.mark.parametrize("proxies", [(), ("127.0.0.1",)])
def test_a_client_without_key_is_its_trusted_address(proxies: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    clients: list[str] = []
    with running(ServeSettings(port=0, slots=1, trusted_proxies=proxies)) as server:
        submit = server.service.worker.submit
        monkeypatch.setattr(
            server.service.worker, "submit", lambda jobs: clients.append(jobs[0].client) or submit(jobs)
        )  # type: ignore[func-returns-value]
        for header in ({}, {"Authorization": "Bearer x"}, {"X-Forwarded-For": "203.0.113.9"}):
            assert raw(server, b'{"prompt": "x", "max_tokens": 1}', **header)[0] == 200
    assert clients == ["127.0.0.1", "127.0.0.1", "203.0.113.9" if proxies else "127.0.0.1"]


# The queue


class Fake:
    """Stand for the request of a job that waits."""

    prompt = (1,)


def jobs_of(client: str, count: int) -> list[Job]:
    inbox = Inbox()
    return [Job(Fake(), client, i, inbox, streams=False, origins=False) for i in range(count)]  # type: ignore[arg-type]


def idle_worker(slots: int = 2, queue: int = 4) -> Worker:
    """Return a worker without a thread, in which all jobs wait."""
    return Worker(lambda: None, None, slots, queue, Metrics("m"))  # type: ignore[arg-type, return-value]


def test_the_longest_queue_makes_room_for_other_clients() -> None:
    async def play() -> None:
        worker = idle_worker()
        many = [jobs_of("a", 1)[0] for _ in range(6)]
        for job in many:
            worker.submit([job])
        with pytest.raises(ApiError) as refused:
            worker.submit(jobs_of("a", 1))
        assert refused.value.status_code == 429
        few = jobs_of("b", 2)
        worker.submit(few)
        for job in many[4:]:  # its newest
            with pytest.raises(ApiError) as thrown_out:
                await job.inbox.take()
            assert thrown_out.value.status_code == 429 and thrown_out.value.headers
        assert all(job.inbox.error is None for job in (*many[:4], *few))
        with pytest.raises(ApiError):
            worker.submit(jobs_of("b", 2))  # it would have as many as the other
        more = [jobs_of("b", 1)[0], *jobs_of("c", 2)]
        worker.submit(more[:1])
        worker.submit(more[1:])
        await asyncio.sleep(0)
        left = Counter(job.client for job in (*many, *few, *more) if job.inbox.error is None)
        assert left == {"a": 2, "b": 2, "c": 2}

    asyncio.run(play())


def test_refused_jobs_are_not_kept() -> None:
    """An idle engine would not empty a list of cancelled jobs."""

    async def play() -> None:
        worker = idle_worker()
        worker.submit(jobs_of("a", 6))
        refused = jobs_of("a", 6)
        with pytest.raises(ApiError):
            worker.submit(refused)
        worker.cancel(refused)
        gone = [weakref.ref(job) for job in refused]
        del refused
        gc.collect()
        assert not any(job() for job in gone)

    asyncio.run(play())


def test_finished_jobs_are_not_kept(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's thread does not keep them either while it waits."""
    kept: list[weakref.ref[Job]] = []
    submit = server.service.worker.submit

    def watched(jobs: Any) -> None:
        kept.extend(map(weakref.ref, jobs))
        submit(jobs)

    with monkeypatch.context() as patch:
        patch.setattr(server.service.worker, "submit", watched)
        assert raw(server, b'{"prompt": "x", "max_tokens": 3, "n": 2}')[0] == 200
    until(lambda: server.service.worker.idle)
    until(lambda: gc.collect() >= 0 and not any(job() for job in kept))
    assert len(kept) == 2


def test_a_full_queue_of_one_key_does_not_block_others(locked: Server, gate: Gate) -> None:
    gate.open.clear()
    with ThreadPoolExecutor(12) as pool:
        greedy = [pool.submit(asked, locked, "alpha", prompt="x", max_tokens=2) for _ in range(10)]
        until(lambda: sum(future.done() for future in greedy) == 4)
        honest = [pool.submit(asked, locked, "beta", prompt="x", max_tokens=2) for _ in range(2)]
        until(lambda: sum(future.done() for future in greedy) == 6)
        gate.open.set()
        assert [future.result()[0] for future in honest] == [200, 200]
        assert sorted(future.result()[0] for future in greedy) == [200] * 4 + [429] * 6


# Bounds


def test_too_many_outputs_are_refused_before_any_work(locked: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any, **__: Any) -> Any:
        raise AssertionError("made")

    for name in ("prompt_ids", "Job"):
        monkeypatch.setattr(service_module, name, nothing)
    for body, param in (
        ({"prompt": [[1]] * 10_000, "n": 128}, "n"),
        ({"prompt": ["x"] * 7}, "prompt"),
        ({"prompt": "x", "n": 7, "guided_regex": "a"}, "n"),
    ):
        status, answer = asked(locked, **body)
        assert status == 400 and answer["error"]["param"] == param, answer
        assert "takes 6 at once" in answer["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"guided_choice": [f"v{i}" for i in range(5000)]},
        {"guided_choice": ["x" * 70_000]},
        {"guided_regex": "x" * 70_000},
        {"guided_grammar": "start: " + "x " * 40_000},
        {"guided_json": {"enum": ["x" * 70_000]}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": "x" * 70_000}}}},
        {"stop": "x" * 2000},
        {"stop": ["x", "x" * 2000]},
        {"cache_salt": "x" * 2000},
    ],
    ids=lambda body: "-".join(body),
)
def test_large_constraints_are_refused_before_compiling(
    body: dict[str, Any], locked: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "compiled", None)
    assert asked(locked, prompt="x", **body)[0] == 400


# Constraints and time


def test_a_constraint_is_compiled_once_outside_the_engine(locked: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "compiled", None)
    monkeypatch.setattr(constraints, "KEPT_GRAMMARS", 0)  # forgotten at once
    status, answer = asked(locked, prompt="x", guided_regex="ab{3}c", max_tokens=20, n=3)
    assert status == 200 and [choice["text"] for choice in answer["choices"]] == ["abbbc"] * 3


def test_the_deadline_holds_while_a_request_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """All threads of a client are stuck; other requests are answered, and the server stops."""
    free = threading.Event()
    compiled, read = service_module.compiled, service_module.prompt_ids

    def slow_compiled(constraint: constraints.Constraint, *rest: Any) -> Any:
        assert constraint.text != "stuck" or free.wait(60)
        return compiled(constraint, *rest)

    def slow_read(tokenizer: Any, text: str) -> list[int]:
        assert not text.startswith("stuck") or free.wait(60)
        return read(tokenizer, text)

    monkeypatch.setattr(service_module, "compiled", slow_compiled)
    monkeypatch.setattr(service_module, "prompt_ids", slow_read)
    monkeypatch.setattr(service_module, "SHORT", 10)
    with running(ServeSettings(port=0, slots=1, request_timeout=0.3)) as server:
        bodies = [{"prompt": "x", "guided_regex": "stuck"}, {"prompt": "stuck" * 3}] * 2
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda body: asked(server, **body), bodies))
        assert [status for status, _ in answers] == [504] * 4
        assert {answer["error"]["code"] for _, answer in answers} == {"timeout"}
        assert server.service.stuck and server.service.idle
        assert asked(server, prompt="x", guided_regex="a")[0] == 200 == asked(server, prompt="x" * 20)[0]
    free.set()


def test_a_stop_waits_for_requests_in_preparation(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    free, begun = threading.Event(), threading.Event()
    compiled = service_module.compiled

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert free.wait(60)
        return compiled(*arguments)

    monkeypatch.setattr(service_module, "compiled", slow)
    body = {"prompt": "x", "max_tokens": 2, "guided_regex": "ab"}
    for drain_seconds, status in ((60.0, b"200"), (0.05, b"503")):
        free.clear(), begun.clear()
        with running(ServeSettings(port=0, slots=1, drain_seconds=drain_seconds)) as server:
            connection = opened(server, body)
            assert begun.wait(20)
            server.drain()
            until(lambda: HTTP.get(f"{server.url}/ready").status_code == 503)
            if status == b"200":
                assert not server.should_exit
                free.set()
            said = b""
            while piece := connection.recv(65536):
                said += piece
            assert said.startswith(b"HTTP/1.1 " + status), said
            assert json.loads(said.split(b"\r\n\r\n")[1])
    free.set()
    assert "Traceback" not in capfd.readouterr().err


def test_preparation_ends_when_the_client_goes(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    before = metric(server, "headstart_texts_total", outcome="cancelled")
    compiled = service_module.compiled
    monkeypatch.setattr(service_module, "compiled", lambda *some: free.wait(60) and compiled(*some))
    for _ in range(2):  # the second one waits for a thread
        connection = opened(server, {"prompt": "x", "guided_regex": "a", "stream": True})
        until(lambda: not server.service.idle)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # noticed at once
        connection.close()
        until(lambda: server.service.idle)
    free.set()
    until(lambda: server.service.stuck == 0)
    assert metric(server, "headstart_texts_total", outcome="cancelled") == before
