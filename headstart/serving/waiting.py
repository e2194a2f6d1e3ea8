"""Wait for work until a deadline, or until the client has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any, TypeVar

from starlette.types import Receive

Result = TypeVar("Result")


class GoneError(Exception):
    """The client has closed the connection, or does not read."""


async def until(deadline: float, work: Awaitable[Result]) -> Result:
    """Return what `work` returns. Raise asyncio.TimeoutError at `deadline`, a time of the event loop, and cancel the
    work.

    asyncio.wait_for ignores a cancellation that comes together with the result, up to Python 3.11.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task,), timeout=deadline - asyncio.get_running_loop().time())
        if not task.done():
            raise asyncio.TimeoutError
        return task.result()
    finally:
        task.cancel()


async def while_connected(work: Awaitable[Result], receive: Receive, seconds: float) -> Result:
    """Return what `work` returns. Cancel it and raise GoneError when the client goes, or after `seconds`.

    The body of the request must have been read.
    """
    task: asyncio.Future[Any] = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait((task, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GoneError
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
