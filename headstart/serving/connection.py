"""Connections: limits on headers, on idle time and on how many there are, before any key is asked for."""

from __future__ import annotations

import asyncio
import resource
from collections import deque
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from headstart.serving.errors import ApiError
from headstart.serving.guard import OPEN
from headstart.serving.settings import ServeSettings

SLICE = 4096
"""Bytes that are parsed at once, so that a limit is noticed at most this many bytes late."""
MAX_PIPELINED = 100
"""Requests that a client may send on one connection before the first is answered."""
MAX_PIPELINED_BYTES = 1024 * 1024
"""Most bytes of these requests: they are read, so that it is noticed when the client goes."""
MAX_CONNECTIONS = 1000
"""Default limit where the process may open many files."""
OTHER_FILES = 64
"""File descriptors that are left to everything but connections."""
RESERVE = 16
"""Connections above the limit that may still ask for `OPEN` paths while all others are being answered."""
PROBE_SECONDS = (0.02, 0.5)
"""First and longest interval of the interim answers to a client that has closed its sending side; each is twice the one
before. Where the client is gone, the first one that it refuses makes the next one fail."""


def connection_limits(max_connections: int | None) -> tuple[int, int]:
    """Return the most connections and the backlog of the listening socket.

    Both together stay below the process's limit of file descriptors: one accepts a burst before it closes anything.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        return max_connections or MAX_CONNECTIONS, 1024
    room = max(8, files - OTHER_FILES - RESERVE)
    backlog = max(1, min(1024, room // 4))
    return max_connections or min(MAX_CONNECTIONS, room - backlog), backlog


class Connections:
    """The state that all connections of a server share.

    Args:
        settings: the limits.
        most: the most connections; above it the one that has waited longest for its client is closed.
    """

    def __init__(self, settings: ServeSettings, most: int) -> None:
        self.header_bytes, self.header_seconds = settings.max_header_bytes, settings.header_timeout
        self.most = most
        self.waiting: dict[Connection, None] = {}
        """Connections without a request to answer, the longest such first."""
        self.answering: set[Connection] = set()

    def make(self, **arguments: Any) -> Connection:
        """Return a new connection; uvicorn calls this for each."""
        return Connection(self, **arguments)


class Connection(HttpToolsProtocol):
    """HTTP/1.1 of uvicorn, with the limits of `shared`."""

    def __init__(self, shared: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._shared, self._app = shared, self.app
        self._in_head = self._ended = False
        self._bytes = 0  # of the head, or of the trailers
        self._answered: RequestResponseCycle | None = None
        """The request that is being answered; `cycle` is the one that is being read, which may wait for it."""
        self._waiting_bytes: deque[int] = deque()
        """Bytes of each request of `pipeline`."""
        self._refusal: ApiError | None = None
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def _answering(self) -> bool:
        return bool(self.pipeline) or (self.cycle is not None and not self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        waiting = self._shared.waiting
        waiting[self] = None
        self._set_alarm()
        count = len(waiting) + len(self._shared.answering)
        if count > self._shared.most:
            longest = next(iter(waiting))
            if longest is not self or count > self._shared.most + RESERVE:
                longest.transport.abort()
                waiting.pop(longest)

    def connection_lost(self, exc: Exception | None) -> None:
        self._shared.waiting.pop(self, None)
        self._shared.answering.discard(self)
        self._cancel_alarm()
        self.pipeline.clear()
        if self._answered is not None:
            self._answered.disconnected = True
            self._answered.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        for at in range(0, len(data), SLICE):
            if self.transport.is_closing():
                return
            part = data[at : at + SLICE]
            super().data_received(part)
            if self._in_head:
                self._bytes += len(part)
                if self._bytes > self._shared.header_bytes + SLICE:  # the first slice may begin with a body's end
                    self._refuse(self._too_large())
                    return
            if sum(self._waiting_bytes) > MAX_PIPELINED_BYTES:
                self._refuse(ApiError(400, f"more than {MAX_PIPELINED_BYTES} bytes of requests are pipelined"))
                return
        if self._answering:
            self._cancel_alarm()
            self._shared.waiting.pop(self, None)
            self._shared.answering.add(self)
        else:
            self._set_alarm()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._bytes = True, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # a trailer
            self._bytes += len(name) + len(value)
            if self._bytes > self._shared.header_bytes:
                self._refusal = self._too_large()
                raise self._refusal
            return
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        head, self._in_head, self._bytes = self._bytes, False, 0
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refusal = ApiError(400, f"more than {MAX_PIPELINED} requests are pipelined; wait for the answers")
            raise self._refusal
        path = self.url.partition(b"?")[0].decode("latin-1")
        full = len(self._shared.answering) >= self._shared.most and path not in OPEN
        self.app = _all_taken if full else self._app
        waits = self._answering
        super().on_headers_complete()
        if waits:
            self._waiting_bytes.append(head)
            self.flow.resume_reading()
        else:
            self._answered = self.cycle

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        if self.pipeline:  # the body is of the last one
            self._waiting_bytes[-1] += len(body)
            self.flow.resume_reading()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._bytes = 0

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._answered = self.pipeline[-1][0]
            self._waiting_bytes.popleft()
        super().on_response_complete()
        if self.transport.is_closing():  # it stays until the client has read everything
            self._close()
        elif not self._answering:
            self._shared.answering.discard(self)
            self._shared.waiting[self] = None
            if self._in_head:
                self._unset_keepalive_if_required()
                self._set_alarm()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection until a complete request is answered: the client may only have stopped sending."""
        cycle = self.cycle
        if cycle is None or cycle.more_body or cycle.response_started or cycle.scope["http_version"] == "1.0":
            return False
        cycle.keep_alive = False
        if not self._ended:
            self._ended = True
            self.loop.call_later(PROBE_SECONDS[0], self._probe, PROBE_SECONDS[0])
        return True

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or ApiError(400, "the request is not HTTP/1.1; send it with an HTTP client"))

    def _unsupported_upgrade_warning(self) -> None:
        """Stay silent: a log line for each would be written by whoever likes."""

    def _probe(self, waited: float) -> None:
        if not self.transport.is_closing() and not self.cycle.response_started:
            if self._answered is not None and not self._answered.response_started:
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            wait = min(2 * waited, PROBE_SECONDS[1])
            self.loop.call_later(wait, self._probe, wait)

    def _late(self) -> None:
        self._alarm = None
        if self._bytes and not self.transport.is_closing():
            seconds = self._shared.header_seconds
            self._refuse(ApiError(408, f"the headers were not complete within {seconds:g} s; send them sooner"))
        else:
            self._close()

    def _too_large(self) -> ApiError:
        most = self._shared.header_bytes
        return ApiError(431, f"the headers are larger than the {most} bytes that this server reads; send less")

    def _refuse(self, error: ApiError) -> None:
        cycle = self.cycle
        if not self.pipeline and (cycle is None or cycle.response_complete or not cycle.response_started):
            # Else an answer is on its way, and nothing else can be said. One that has not begun is not wanted any more.
            body = error.response().body
            head = f"HTTP/1.1 {error.status_code} Refused\r\ncontent-type: application/json\r\nconnection: close\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + bytes(body))
            if cycle is not None:
                cycle.disconnected = True
                cycle.message_event.set()
        self._close()

    def _close(self) -> None:
        """Close the connection once what was written has been read, or after `header_seconds`."""
        self._unset_keepalive_if_required()
        self._cancel_alarm()
        self.transport.close()
        self._alarm = self.loop.call_later(self._shared.header_seconds, self.transport.abort)

    def _set_alarm(self) -> None:
        if self._alarm is None:
            self._alarm = self.loop.call_later(self._shared.header_seconds, self._late)

    def _cancel_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None


async def _all_taken(scope: Scope, receive: Receive, send: Send) -> None:
    busy = "all connections of this server are taken; try again in 5 s"
    error = ApiError(503, busy, headers={"Retry-After": "5", "Connection": "close"})
    await error.response()(scope, receive, send)
