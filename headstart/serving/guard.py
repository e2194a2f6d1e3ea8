"""Check the host, the key and the size of each request before its route is called."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headstart.serving.errors import ApiError, internal_error, stopping
from headstart.serving.waiting import Deadline

LOG = logging.getLogger(__name__)
OPEN = ("/", "/health", "/ready")
"""Paths that need no key: the page asks for the key, and health checks have none."""
CLIENT = "headstart.client"
"""Name in a request's scope of the client's name, for requests with a key."""
BODY_SECONDS = 30.0
"""Seconds in which a body must arrive."""


def is_allowed_host(header: str, names: Sequence[str]) -> bool:
    """Return whether a request with this Host header is allowed.

    A web page can let its own name point to this machine (DNS rebinding); its requests then carry that name. Addresses
    and names without a dot are always allowed, for no web page owns one.
    """
    parts = re.fullmatch(r"(?:\[([^]]+)\]|([^:\[\]]*?)\.?)(?::\d*)?", header.strip().lower())
    if parts is None:
        return False
    host = parts[1] or parts[2]
    with suppress(ValueError):
        ipaddress.ip_address(host)
        return True
    if parts[1]:
        return False
    return "." not in host or host.endswith(".localhost") or host in (name.lower() for name in names)


class Guard:
    """Refuse requests without a key of `keys` (empty: none is required), and bodies that are too large or too slow.

    `on_response` is called with the path and the status of every response. `hosts` are the allowed names, see
    `is_allowed_host`; None: any. With `open_metrics`, /metrics needs no key.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        max_body_bytes: int,
        on_response: Callable[[str, int], None],
        hosts: Sequence[str] | None = None,
        open_metrics: bool = False,
    ) -> None:
        self.app, self.max_body_bytes, self.on_response, self._hosts = app, max_body_bytes, on_response, hosts
        self._open = (*OPEN, "/metrics") if open_metrics else OPEN
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; called by the server."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.on_response(scope["path"], message["status"])
            await send(message)

        if scope["method"] == "HEAD":  # answer as to GET; the protocol leaves the body out
            scope = {**scope, "method": "GET"}
        headers = dict(scope["headers"])
        try:
            self._check_hosts(scope)
            if self._keys and scope["path"] not in self._open:
                scope = {**scope, CLIENT: self._check_key(headers.get(b"authorization", b""))}
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > self.max_body_bytes:
                raise self._too_large()
        except ApiError as error:
            await error.response()(scope, receive, counted)
            return
        try:
            await self.app(scope, self._limit_body(receive), counted)
        except asyncio.CancelledError:  # the server stops, and has waited long enough for this answer
            if not started:
                await stopping().response()(scope, receive, counted)
        except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise  # the application has answered an Exception
        except BaseException:  # for example a panic of a library in Rust
            LOG.exception("a request has failed")
            if not started:
                await internal_error().response()(scope, receive, counted)

    def _check_hosts(self, scope: Scope) -> None:
        if self._hosts is None:
            return
        for name, value in scope["headers"]:
            host = value.decode("latin-1")
            if name == b"host" and not is_allowed_host(host, self._hosts):
                message = f"requests for the host {host[:80]!r} are not allowed; --allow-host NAME allows them"
                raise ApiError(403, message, code="host_not_allowed")

    def _check_key(self, authorization: bytes) -> str:
        """Return a name of the client, by its key. Raises ApiError 401 for a request without a valid key."""
        kind, _, shown = authorization.partition(b" ")
        # Every key is compared, in a time that does not depend on what it holds.
        found = [secrets.compare_digest(shown.strip(), key) for key in self._keys]
        if kind.lower() != b"bearer" or not any(found):
            message = "no valid key: send the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return f"key {found.index(True)}"

    def _too_large(self) -> ApiError:
        message = f"the body is larger than the {self.max_body_bytes} bytes that this server reads; send less"
        return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})

    def _limit_body(self, receive: Receive) -> Receive:
        late = f"the body was not complete within {BODY_SECONDS:g} s; send it sooner"
        deadline = Deadline.after(BODY_SECONDS, ApiError(408, late, headers={"Connection": "close"}))
        size, whole = 0, False

        async def receive_limited() -> Message:
            nonlocal size, whole
            if whole:  # the next message is the end of the connection
                return await receive()
            message = await deadline.limit(receive())
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self.max_body_bytes:
                raise self._too_large()
            return message

        return receive_limited
