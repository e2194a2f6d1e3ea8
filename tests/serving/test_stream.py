"""Answers end where nobody reads them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from headstart.serving.stream import GoneError, while_connected


def test_a_client_that_does_not_read_is_given_up() -> None:
    ended: list[bool] = []

    async def for_ever() -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def tried() -> None:
        with pytest.raises(GoneError):
            await asyncio.wait_for(while_connected(for_ever(), for_ever, 0.01), 5)

    asyncio.run(tried())
    assert ended == [True, True]  # the answer, and what watched the connection
