"""Name each request by an id, and write what it came to into the log and the traces."""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headstart.serving.jobs import RECORD, Record
from headstart.serving.traces import Traces

LOG = logging.getLogger(__name__)
PROBES = ("/health", "/ready", "/metrics")
"""Paths that are requested every few seconds: the log has their failures only."""
GONE = 499
"""Status of a request whose client went before the answer began."""


class Observed:
    """Give each request an id, that of its `X-Request-Id` or a new one, and return it in the answer.

    Prompts and outputs are written nowhere.
    """

    def __init__(self, app: ASGIApp, traces: Traces | None) -> None:
        self.app, self.traces = app, traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; called by the server."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        record = Record(given if re.fullmatch(r"[\w.:/+=@-]{1,128}", given, re.ASCII) else secrets.token_hex(16))
        RECORD.set(record)
        began, status = time.perf_counter(), GONE

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = (b"x-request-id", record.request_id.encode())
                message = {**message, "headers": [*message.get("headers", ()), own]}
            await send(message)

        try:
            await self.app(scope, receive, named)
        finally:
            self._report(scope, headers, record, status, began)
            record.jobs.clear()  # the context of a connection that stays open keeps the record

    def _report(self, scope: Scope, headers: dict[str, str], record: Record, status: int, began: float) -> None:
        method, path = scope["method"], scope["path"][:200]
        if path in PROBES and status < 400:
            return
        name, jobs, now = f"{method} {path}", record.jobs, time.perf_counter()
        stats = [job.generation.stats for job in jobs if job.generation is not None]
        counts = {
            "input_tokens": sum(len(job.request.prompt) for job in jobs),
            "output_tokens": sum(each.tokens for each in stats),
            "passes": sum(each.passes for each in stats),
        }
        if LOG.isEnabledFor(logging.INFO):
            longest: dict[str, float] = {}
            for job in jobs:
                for phase, (start, end) in job.phases(now).items():
                    longest[f"{phase}_seconds"] = max(longest.get(f"{phase}_seconds", 0.0), round(end - start, 6))
            client = jobs[0].client if jobs else (scope.get("client") or [""])[0]
            fields: dict[str, Any] = {"method": method, "path": path, "status": status, "client": client}
            fields |= {"seconds": round(now - began, 6), **longest, **(counts if jobs else {})}
            LOG.info("%s %d", name, status, extra={"fields": fields})
        if self.traces is not None:
            attributes = {"http.request.method": method, "url.path": path, "http.response.status_code": status}
            attributes |= {"headstart.request_id": record.request_id, "headstart.passes": counts["passes"]}
            attributes |= {f"gen_ai.usage.{key}": counts[key] for key in ("input_tokens", "output_tokens")}
            self.traces.report(headers, name, attributes, jobs, began)
