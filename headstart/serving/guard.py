"""What stands before the routes: hosts, keys, and bounds on the body."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import secrets
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headstart.serving.errors import INTERNAL, ApiError, stopping
from headstart.serving.waiting import until

OPEN = ("/", "/health", "/ready")
"""Paths that need no key: the page asks for one, and those who watch the server have none."""
CLIENT = "headstart.client"
"""Where a request's scope names the client, if it shows a key."""
BODY_SECONDS = 30.0
"""A body must be here within this time."""


def is_allowed_host(header: str, names: Sequence[str]) -> bool:
    """Return whether a request with this Host header is answered.

    A web page on a name that its owner lets point to this machine (DNS rebinding) sends that name. Addresses and names
    without a dot are always allowed, since no such page has one for its own.
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
    """Refuses requests without a key, and bodies that are too large or too slow.

    Args:
        app: what it guards.
        keys: those of which one must be shown; none: nobody is asked.
        max_body_bytes: most bytes of a body.
        answered: told the path and the status of every answer.
        hosts: names that requests may be for, see `is_allowed_host`; None: any.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        max_body_bytes: int,
        answered: Callable[[str, int], None],
        hosts: Sequence[str] | None = None,
    ) -> None:
        self.app, self.max_body_bytes, self.answered, self._hosts = app, max_body_bytes, answered, hosts
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.answered(scope["path"], message["status"])
            await send(message)

        if scope["method"] == "HEAD":  # the answer to GET; the protocol leaves the body out
            scope = {**scope, "method": "GET"}
        headers = dict(scope["headers"])
        try:
            self._check_hosts(scope)
            if self._keys and scope["path"] not in OPEN:
                scope = {**scope, CLIENT: self._check(headers.get(b"authorization", b""))}
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > self.max_body_bytes:
                raise self._too_large()
        except ApiError as error:
            await error.response()(scope, receive, counted)
            return
        try:
            await self.app(scope, self._bounded(receive), counted)
        except asyncio.CancelledError:  # the server ends, and has waited long enough for this answer
            if not started:
                await stopping().response()(scope, receive, counted)
        except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise  # an Exception has been answered
        except BaseException:  # a panic of a library in Rust, say
            traceback.print_exc()
            if not started:
                await ApiError(500, INTERNAL, headers={"Connection": "close"}).response()(scope, receive, counted)

    def _check_hosts(self, scope: Scope) -> None:
        if self._hosts is None:
            return
        for name, value in scope["headers"]:
            host = value.decode("latin-1")
            if name == b"host" and not is_allowed_host(host, self._hosts):
                message = f"requests for the host {host[:80]!r} are not answered; --allow-host NAME allows them"
                raise ApiError(403, message, code="host_not_allowed")

    def _check(self, authorization: bytes) -> str:
        """Return a name for the client, that of the key that it shows. Raises ApiError 401 where it shows none."""
        kind, _, shown = authorization.partition(b" ")
        # All are compared, each in the same time whatever it holds.
        found = [secrets.compare_digest(shown.strip(), key) for key in self._keys]
        if kind.lower() != b"bearer" or not any(found):
            message = "no valid key: send the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return f"key {found.index(True)}"

    def _too_large(self) -> ApiError:
        message = f"the body is larger than the {self.max_body_bytes} bytes that this server reads; send less"
        return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})

    def _bounded(self, receive: Receive) -> Receive:
        deadline = asyncio.get_running_loop().time() + BODY_SECONDS
        size, whole = 0, False

        async def bounded() -> Message:
            nonlocal size, whole
            if whole:  # what comes now is the end of the connection
                return await receive()
            try:
                message = await until(deadline, receive())
            except asyncio.TimeoutError:
                late = f"the body was not here within {BODY_SECONDS:g} s"
                raise ApiError(408, late, headers={"Connection": "close"}) from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self.max_body_bytes:
                raise self._too_large()
            return message

        return bounded
