"""Send an answer as server-sent events; the tokens of several passes may come in one event."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from headstart.serving.errors import ApiError
from headstart.serving.waiting import GoneError, while_connected

DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # otherwise nginx collects the events
]


def event(content: Any) -> bytes:
    """Return one event of a stream."""
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Send events as they come, and stop when the client has gone, or has not read for `seconds`.

    An ApiError before the first event becomes the response, with its status; a later one becomes the last event.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], seconds: float) -> None:
        super().__init__()
        self._events, self._seconds = events, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; called by the framework."""
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
