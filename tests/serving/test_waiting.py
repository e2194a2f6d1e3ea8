"""Check that work ends at its deadline, and when its client goes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from headstart.serving.waiting import Deadline, GoneError, while_connected


class LateError(Exception):
    """The error of a deadline."""


class Endless:
    """Work that ends only when it is cancelled."""

    def __init__(self) -> None:
        self.ended = 0

    async def __call__(self) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            self.ended += 1


def test_a_client_that_does_not_read_is_given_up() -> None:
    endless = Endless()

    async def test() -> None:
        with pytest.raises(GoneError):
            await asyncio.wait_for(while_connected(endless(), endless, 0.01), 5)

    asyncio.run(test())
    assert endless.ended == 2  # the answer, and what watched the connection


def test_work_is_cancelled_at_its_deadline() -> None:
    endless = Endless()

    async def test() -> None:
        assert await Deadline.after(5, LateError()).limit(asyncio.sleep(0, "done")) == "done"
        with pytest.raises(LateError):
            await Deadline.after(0.01, LateError()).limit(endless())
        await asyncio.sleep(0)
        assert endless.ended == 1

    asyncio.run(test())


@pytest.mark.parametrize("turns", range(9))
def test_a_client_that_goes_at_the_moment_of_a_result_ends_the_work_that_follows(turns: int) -> None:
    endless = Endless()

    async def turn(count: int) -> None:
        """Let the event loop run everything else `count` times."""
        for _ in range(count):
            await asyncio.sleep(0)

    async def test() -> None:
        async def answer() -> None:
            await Deadline.after(20, LateError()).limit(turn(4))
            await endless()

        async def receive() -> dict[str, str]:
            await turn(turns)
            return {"type": "http.disconnect"}

        answering = asyncio.ensure_future(while_connected(answer(), receive, 20))
        await asyncio.wait((answering,), timeout=5)
        assert isinstance(answering.exception(), GoneError)

    asyncio.run(test())
