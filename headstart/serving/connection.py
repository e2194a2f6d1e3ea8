"""Limit headers, idle time, pipelined requests and the number of connections, before any key is required."""

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
"""Number of bytes that are parsed at once: a limit is noticed at most this many bytes late."""
MAX_PIPELINED = 100
"""Most requests on one connection that wait for the answer to the first."""
MAX_PIPELINED_BYTES = 1024 * 1024
"""Most bytes of these requests; they are read, or the server would not notice that the client goes."""
MAX_CONNECTIONS = 1000
"""Default limit for a process that may open many files."""
OTHER_FILES = 64
"""Number of file descriptors for everything but connections."""
RESERVE = 16
"""Number of connections above the limit whose requests for `OPEN` paths are answered."""
PROBE_SECONDS = (0.02, 0.5)
"""First and longest interval between probes of a client that has closed its sending side; each is twice the one
before. A probe is an interim response: if the client is gone, its machine refuses one, and the next one fails."""


def connection_limits(max_connections: int | None) -> tuple[int, int]:
    """Return the limit of connections and the backlog of the listening socket.

    Together they stay below the process's limit of file descriptors, for a whole burst is accepted before any
    connection is closed.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        return max_connections or MAX_CONNECTIONS, 1024
    room = max(8, files - OTHER_FILES - RESERVE)
    backlog = max(1, min(1024, room // 4))
    return max_connections or min(MAX_CONNECTIONS, room - backlog), backlog


class Connections:
    """Hold the state that all connections of a server share.

    Above `most` connections, the one that has waited longest for its client is closed.
    """

    def __init__(self, settings: ServeSettings, most: int) -> None:
        self.header_bytes, self.header_seconds = settings.max_header_bytes, settings.header_timeout
        self.most = most
        self.waiting: dict[Connection, None] = {}
        """Connections without a request to answer, the one that has waited longest first."""
        self.answering: set[Connection] = set()
        """Connections with a request to answer."""

    def make(self, **arguments: Any) -> Connection:
        """Return a new connection, for uvicorn."""
        return Connection(self, **arguments)


class Connection(HttpToolsProtocol):
    """Speak HTTP/1.1 as uvicorn does, within the limits of `shared`."""

    def __init__(self, shared: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._shared, self._app = shared, self.app
        self._in_head = self._ended = False
        self._bytes = 0  # size of the head, or of the trailers, so far
        self._answered: RequestResponseCycle | None = None
        """The request that is answered; uvicorn's `cycle` is the last one read, which may wait in `pipeline`."""
        self._waiting_bytes: deque[int] = deque()
        """Sizes of the requests in `pipeline`."""
        self._refusal: ApiError | None = None
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def _answering(self) -> bool:
        return bool(self.pipeline) or (self.cycle is not None and not self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and close the one that has waited longest if there are too many."""
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
        """Drop the waiting requests, and notify the one that is answered."""
        self._shared.waiting.pop(self, None)
        self._shared.answering.discard(self)
        self._cancel_alarm()
        self.pipeline.clear()
        if self._answered is not None:
            self._answered.disconnected = True
            self._answered.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse the data in slices, and check the limits after each."""
        for at in range(0, len(data), SLICE):
            if self.transport.is_closing():
                return
            part = data[at : at + SLICE]
            super().data_received(part)
            if self._in_head:
                self._bytes += len(part)
                if self._bytes > self._shared.header_bytes + SLICE:  # the first slice may start with the end of a body
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
        """Start to count the head."""
        super().on_message_begin()
        self._in_head, self._bytes = True, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; count a trailer."""
        if not self._in_head:  # a trailer
            self._bytes += len(name) + len(value)
            if self._bytes > self._shared.header_bytes:
                self._refusal = self._too_large()
                raise self._refusal
            return
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start to answer the request, or let it wait for those before it."""
        head, self._in_head, self._bytes = self._bytes, False, 0
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refusal = ApiError(400, f"more than {MAX_PIPELINED} requests are pipelined; wait for the answers")
            raise self._refusal
        path = self.url.partition(b"?")[0].decode("latin-1")
        full = len(self._shared.answering) >= self._shared.most and path not in OPEN
        self.app = _refuse_busy if full else self._app
        waits = self._answering
        super().on_headers_complete()
        if waits:
            self._waiting_bytes.append(head)
            self.flow.resume_reading()
        else:
            self._answered = self.cycle

    def on_body(self, body: bytes) -> None:
        """Count the body of a request that waits."""
        super().on_body(body)
        if self.pipeline:  # the body belongs to the last request
            self._waiting_bytes[-1] += len(body)
            self.flow.resume_reading()

    def on_message_complete(self) -> None:
        """Start to count the next head."""
        super().on_message_complete()
        self._bytes = 0

    def on_response_complete(self) -> None:
        """Answer the next request, close the connection, or wait for its client."""
        if self.pipeline:
            self._answered = self.pipeline[-1][0]
            self._waiting_bytes.popleft()
        super().on_response_complete()
        if self.transport.is_closing():  # the connection stays until the client has read everything
            self._close()
        elif not self._answering:
            self._shared.answering.discard(self)
            self._shared.waiting[self] = None
            if self._in_head:
                self._unset_keepalive_if_required()
                self._set_alarm()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection."""
        self._close()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection until its request is answered: the client may only have closed its sending side."""
        cycle = self.cycle
        if cycle is None or cycle.more_body or cycle.response_started or cycle.scope["http_version"] == "1.0":
            return False
        cycle.keep_alive = False
        if not self._ended:
            self._ended = True
            self.loop.call_later(PROBE_SECONDS[0], self._probe, PROBE_SECONDS[0])
        return True

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, in the form of other errors."""
        self._refuse(self._refusal or ApiError(400, "the request is not HTTP/1.1; send it with an HTTP client"))

    def _unsupported_upgrade_warning(self) -> None:
        """Write no log line, for any client could fill the log."""

    def _probe(self, waited: float) -> None:
        if not self.transport.is_closing() and not self.cycle.response_started:
            if self._answered is not None and not self._answered.response_started:
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            wait = min(2 * waited, PROBE_SECONDS[1])
            self.loop.call_later(wait, self._probe, wait)

    def _time_out(self) -> None:
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
            # Otherwise an answer has begun, and no other can be sent. One that has not begun is dropped.
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
            self._alarm = self.loop.call_later(self._shared.header_seconds, self._time_out)

    def _cancel_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None


async def _refuse_busy(scope: Scope, receive: Receive, send: Send) -> None:
    busy = "all connections of this server are in use; try again in 5 s"
    error = ApiError(503, busy, headers={"Retry-After": "5", "Connection": "close"})
    await error.response()(scope, receive, send)
