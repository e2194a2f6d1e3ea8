"""Check the limits on headers, idle time and connections, over an application that answers at once."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from headstart.serving import connection
from headstart.serving.connection import Connections, connection_limits
from headstart.serving.settings import ServeSettings

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
SLOW = GET.replace(b"/health", b"/slow")
Open = Callable[..., Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


class Running:
    """Hold a listening server and its connections."""

    def __init__(self, shared: Connections, port: int) -> None:
        self.shared, self.port = shared, port
        self.release = asyncio.Event()
        """Event that lets the answers of /slow end."""
        self.begun = 0
        """Number of requests for /slow that have started."""
        self.gone = 0
        """Number of clients of /slow that went before their answer."""

    async def open(self, *sent: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for data in sent:
            writer.write(data)
        return reader, writer

    async def all(self, *sent: bytes, half: bool = False) -> bytes:
        """Return everything that the server sends until it closes the connection."""
        reader, writer = await self.open(*sent)
        if half:
            writer.write_eof()
        answer = b""
        with suppress(ConnectionError):  # what was not read resets the connection
            while data := await asyncio.wait_for(reader.read(65536), 20):
                answer += data
        writer.close()
        return answer


@asynccontextmanager
async def listening(most: int = 10, **settings: Any) -> AsyncIterator[Running]:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/slow":
            running.begun += 1
            waiting = asyncio.ensure_future(running.release.wait())
            while not waiting.done():
                event = asyncio.ensure_future(receive())
                await asyncio.wait((waiting, event), return_when=asyncio.FIRST_COMPLETED)
                if event.done() and event.result()["type"] == "http.disconnect":
                    running.gone += 1
                    waiting.cancel()
                    return
                event.cancel()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    given = ServeSettings(**{"header_timeout": 20.0, **settings})
    shared, state = Connections(given, most), ServerState()
    config = uvicorn.Config(app, ws="none", log_level="critical", timeout_keep_alive=given.idle_timeout)  # type: ignore
    config.load()
    server = await asyncio.get_running_loop().create_server(
        lambda: shared.make(config=config, server_state=state, app_state={}), "127.0.0.1", 0
    )
    running = Running(shared, server.sockets[0].getsockname()[1])
    try:
        yield running
    finally:
        running.release.set()
        for each in (*shared.waiting, *shared.answering):
            each.transport.abort()
        server.close()
        await asyncio.sleep(0)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))  # type: ignore[arg-type]


def status_and_error(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "endless",
    [
        [b"GET /health HTTP/1.1\r\nX: ", b"a" * 100_000],
        [b"GET /", b"a" * 100_000],
        [b"GET /health HTTP/1.1\r\n", b"".join(b"X-%d: a\r\n" % i for i in range(10_000))],
    ],
    ids=["value", "path", "many"],
)
def test_a_head_is_read_up_to_its_limit(endless: list[bytes]) -> None:
    async def test() -> None:
        async with listening(max_header_bytes=8192) as server:
            status, message = status_and_error(await server.all(*endless))
            assert status == 431 and "8192 bytes" in message
            fits = GET[:-2] + b"X: " + b"a" * 8000 + b"\r\nConnection: close\r\n\r\n"
            assert (await server.all(fits)).startswith(b"HTTP/1.1 200")

    run(test)


def test_trailers_are_counted_and_not_passed_on() -> None:
    async def test() -> None:
        async with listening(max_header_bytes=8192) as server:
            chunked = b"POST /slow HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
            many = b"".join(b"X-%d: a\r\n" % i for i in range(2_000))
            assert status_and_error(await server.all(chunked, many))[0] == 431
            assert status_and_error(await server.all(chunked[:-3], b"zz\r\n"))[0] == 400
            while server.gone < 2:  # who was to answer knows
                await asyncio.sleep(0.001)
            fits = chunked.replace(b"/slow", b"/health").replace(b"Tr", b"Connection: close\r\nTr") + b"X: a\r\n\r\n"
            assert (await server.all(fits)).endswith(b"ok")

    run(test)


@pytest.mark.parametrize("begun", [b"", b"\r\n", b"GET /health HTTP/1.1\r\nHo"])
def test_a_head_has_a_time_limit(begun: bytes) -> None:
    async def test() -> None:
        async with listening(header_timeout=0.05) as server:
            answer = await server.all(begun)
            assert status_and_error(answer)[0] == 408 if begun.startswith(b"GET") else not answer
            assert not server.shared.waiting

    run(test)


def test_the_time_of_a_second_head_and_between_requests() -> None:
    async def test() -> None:
        async with listening(header_timeout=0.05) as server:
            assert status_and_error((await server.all(GET, b"GET")).split(b"ok", 1)[1])[0] == 408
        async with listening(idle_timeout=0.05) as server:
            assert (await server.all(GET)).endswith(b"ok")

    run(test)


def test_the_time_limit_of_a_head_does_not_limit_the_answer() -> None:
    async def test() -> None:
        async with listening(header_timeout=0.02, idle_timeout=0.02) as server:
            asking = asyncio.ensure_future(server.all(SLOW))
            await asyncio.sleep(0.1)
            server.release.set()
            assert (await asking).endswith(b"ok")

    run(test)


def test_above_the_limit_the_longest_idle_connection_is_closed() -> None:
    async def test() -> None:
        async with listening(most=4) as server:
            idle = [await server.open() for _ in range(12)]
            reader, writer = await server.open(GET)
            assert (await reader.readexactly(15)) == b"HTTP/1.1 200 OK"
            ended = [asyncio.ensure_future(reader.read()) for reader, _ in idle[:8]]
            await asyncio.gather(*ended, return_exceptions=True)
            assert len(server.shared.waiting) == 4
            for _, each in (*idle, (reader, writer)):
                each.close()

    run(test)


def test_while_all_connections_are_answered_health_is_too() -> None:
    async def test() -> None:
        async with listening(most=3) as server:
            slow = [await server.open(SLOW) for _ in range(3)]
            while len(server.shared.answering) < 3:
                await asyncio.sleep(0.001)
            status, message = status_and_error(await server.all(SLOW))
            assert status == 503 and "try again" in message
            reader, writer = await server.open(GET)
            assert (await reader.readexactly(15)) == b"HTTP/1.1 200 OK"
            server.release.set()
            for each, _ in slow:
                assert (await each.readexactly(15)) == b"HTTP/1.1 200 OK"
            for _, each in (*slow, (reader, writer)):
                each.close()

    run(test)


def test_the_number_of_pipelined_requests_is_bounded() -> None:
    async def test() -> None:
        async with listening() as server:
            last = GET.replace(b"Host", b"Connection: close\r\nHost")
            assert (await server.all(GET * 50 + last)).count(b"HTTP/1.1 200") == 51
            assert (await server.all(SLOW + GET * 5000)) == b""

    run(test)


def test_a_half_closed_connection_gets_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PROBE_SECONDS", (0.01, 0.01))

    async def test() -> None:
        async with listening() as server:
            assert (await server.all(GET, half=True)).startswith(b"HTTP/1.1 200")
            asking = asyncio.ensure_future(server.all(SLOW, half=True))
            await asyncio.sleep(0.05)
            server.release.set()
            interim, _, final = (await asking).rpartition(b"Continue\r\n\r\n")
            assert interim.startswith(b"HTTP/1.1 100 ") and final.startswith(b"HTTP/1.1 200") and not server.gone
            assert await server.all(b"GET /he", half=True) == b""

    run(test)


def test_a_client_that_closes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PROBE_SECONDS", (0.01, 1e9))  # two early probes are enough

    async def test() -> None:
        async with listening() as server:
            _, writer = await server.open(SLOW)
            while not server.shared.answering:
                await asyncio.sleep(0.001)
            writer.close()
            while not server.gone:
                await asyncio.sleep(0.001)
            assert not server.shared.answering

    run(test)


@pytest.mark.parametrize("begun", [1, 2])
@pytest.mark.parametrize("how", ["close", "reset", "body"])
def test_a_client_that_pipelines_and_goes_is_noticed(how: str, begun: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request that is answered ends, and those that wait for it never start."""
    monkeypatch.setattr(connection, "PROBE_SECONDS", (0.01, 0.01))

    async def test() -> None:
        async with listening() as server:
            _, writer = await server.open(*[GET] * (begun - 1), SLOW, *[SLOW] * 20)
            if how == "body":
                writer.write(b"POST /slow HTTP/1.1\r\nContent-Length: 900000\r\n\r\n" + b"x" * 800_000)
            while server.begun < 1:
                await asyncio.sleep(0.001)
            (each,) = server.shared.answering
            while len(each.pipeline) < 20 + (how == "body"):
                await asyncio.sleep(0.001)
            if how == "reset":
                writer.transport.abort()
            writer.close()
            while not server.gone:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)
            assert server.begun == server.gone == 1 and not server.shared.answering and not each.pipeline

    run(test)


def test_the_bytes_of_pipelined_requests_are_bounded() -> None:
    async def test() -> None:
        async with listening() as server:
            post = b"POST /health HTTP/1.1\r\nContent-Length: 300000\r\n\r\n" + b"x" * 300_000
            reader, writer = await server.open(SLOW, post * 4)
            while not server.gone:  # what waits is too much: the connection is closed
                await asyncio.sleep(0.001)
            writer.close()
            reader, writer = await server.open(SLOW, post * 3)
            while server.begun < 2:
                await asyncio.sleep(0.001)
            server.release.set()
            for _ in range(4):
                assert (await reader.readuntil(b"ok")).count(b"HTTP/1.1 200") == 1
            writer.close()

    run(test)


def test_other_protocols_are_refused_with_a_json_error() -> None:
    async def test() -> None:
        async with listening() as server:
            for data in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n", b"GET " + b"/" * 70_000 + b"\r\n"):
                status, message = status_and_error(await server.all(data))
                assert status in (400, 431) and "\n" not in message

    run(test)


@pytest.mark.parametrize("files", [96, 256, 1024, 2**20])
def test_connections_leave_descriptors_to_the_rest(files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    most, backlog = connection_limits(None)
    assert 0 < most <= 1000 and backlog > 0 and most + backlog + connection.RESERVE <= files - connection.OTHER_FILES
    assert connection_limits(7) == (7, backlog)
