"""Wait for work until a deadline, or until the client has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.types import Receive

Result = TypeVar("Result")


class GoneError(Exception):
    """The client has closed the connection, or does not read."""


@dataclass(frozen=True)
class Deadline:
    """A time of the event loop, and the error to raise at that time."""

    time: float
    error: Exception

    @classmethod
    def after(cls, seconds: float, error: Exception) -> Deadline:
        """Return the deadline that is so many seconds from now."""
        return cls(asyncio.get_running_loop().time() + seconds, error)

    async def limit(self, work: Awaitable[Result]) -> Result:
        """Return what `work` returns. At the deadline, cancel it and raise the error.

        Unlike this, asyncio.wait_for ignores a cancellation that comes together with the result, up to Python 3.11.
        """
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait((task,), timeout=self.time - asyncio.get_running_loop().time())
            if not task.done():
                raise self.error
            return task.result()
        finally:
            await _end(task)


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
        await _end(task, gone)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task
