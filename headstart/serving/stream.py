"""An answer as server-sent events: a chunk for what each pass commits, so several tokens may come in one."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from headstart.serving.errors import ApiError
from headstart.serving.waiting import GoneError, while_connected


def event(content: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would collect them
]


class EventStream(Response):
    """Sends events as they come, and ends them where the client has gone.

    Args:
        events: the answer. An ApiError before the first event is the answer, with its status; a later one is told in
            an event of its own, and ends the stream.
        seconds: after which a client that does not read is given up.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], seconds: float) -> None:
        super().__init__()
        self._events, self._seconds = events, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(GoneError):
            await while_connected(self._send(scope, receive, send), receive, self._seconds)

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async with aclosing(self._events) as events:
                async for body in events:
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                        started = True
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        except ApiError as error:
            if not started:
                await error.response()(scope, receive, send)
                return
            await send({"type": "http.response.body", "body": event(error.content), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
