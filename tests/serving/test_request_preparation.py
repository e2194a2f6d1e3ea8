"""Check the threads that prepare requests: clients take turns, and endless work does not block others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from headstart.serving.errors import ApiError
from headstart.serving.preparation import MOST_STUCK, Preparation


class Works:
    """Make pieces of work that end when `ends` is set."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ends = threading.Event()

    def named(self, name: str) -> Callable[[], str]:
        def work() -> str:
            self.begun.append(name)
            assert self.ends.wait(20)
            return name

        return work

    async def until_begun(self, count: int) -> None:
        for _ in range(20_000):
            if len(self.begun) >= count:
                return
            await asyncio.sleep(0.001)
        raise AssertionError("it has not begun")


def played(play: Callable[[Works], Coroutine[Any, Any, None]]) -> None:
    works = Works()

    async def whole() -> None:
        try:
            await play(works)
        finally:
            works.ends.set()

    asyncio.run(whole())


def submitted(pool: Preparation, works: Works, *names: str) -> list[asyncio.Task[str]]:
    """Run work for the clients that names begin with."""
    return [asyncio.create_task(pool.run(name[0], works.named(name))) for name in names]


async def failed(task: asyncio.Task[str]) -> int:
    with pytest.raises(ApiError) as caught:
        await task
    return caught.value.status_code


def test_a_client_has_its_share_of_the_threads_and_no_more() -> None:
    async def play(works: Works) -> None:
        pool = Preparation(threads=2, share=1, queue=10)
        tasks = submitted(pool, works, "a1", "a2", "a3", "b1", "c1")
        await works.until_begun(2)
        assert sorted(works.begun) == ["a1", "b1"]  # c's waits for a thread, a's others for their turn
        works.ends.set()
        assert await asyncio.gather(*tasks) == ["a1", "a2", "a3", "b1", "c1"]
        assert works.begun.index("c1") < works.begun.index("a3")

    played(play)


def test_failing_work_raises_and_frees_its_thread() -> None:
    async def play(works: Works) -> None:
        pool = Preparation(threads=1, share=1, queue=1)
        for error in (ValueError, KeyboardInterrupt):  # the panic of a library is no Exception either

            def broken(error: type[BaseException] = error) -> None:
                raise error("no")

            with pytest.raises(Exception, match="no"):
                await pool.run("a", broken)
        assert await pool.run("a", lambda: 3) == 3

    played(play)


def test_endless_work_does_not_block_others() -> None:
    async def play(works: Works) -> None:
        pool = Preparation(threads=1, share=1, queue=10)
        for count in range(MOST_STUCK):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(pool.run("a", works.named(f"a{count}")), 0.01)
        assert pool.stuck == MOST_STUCK and await pool.run("b", lambda: "done") == "done"
        with pytest.raises(asyncio.TimeoutError):  # one client does not get threads without end
            await asyncio.wait_for(pool.run("a", lambda: "never begun"), 0.01)
        works.ends.set()
        assert await asyncio.wait_for(pool.run("a", lambda: "again"), 20) == "again" and pool.stuck < MOST_STUCK

    played(play)


def test_cancelled_work_never_starts() -> None:
    async def play(works: Works) -> None:
        pool = Preparation(threads=1, share=1, queue=10)
        first, second = submitted(pool, works, "a1", "a2")
        await works.until_begun(1)
        second.cancel()
        await asyncio.wait([second])
        works.ends.set()
        assert await first == "a1" and works.begun == ["a1"] and pool.stuck == 0

    played(play)


def test_a_full_queue_accepts_clients_with_less_work() -> None:
    async def play(works: Works) -> None:
        pool = Preparation(threads=1, share=1, queue=2)
        tasks = submitted(pool, works, "x1", "a1", "a2", "a3")
        await works.until_begun(1)
        assert await failed(tasks[3]) == 429  # its own queue is the longest
        (b1,) = submitted(pool, works, "b1")
        assert await failed(tasks[2]) == 429
        (c1,) = submitted(pool, works, "c1")
        assert await failed(c1) == 429  # everybody who waits has one
        works.ends.set()
        assert await asyncio.gather(tasks[0], tasks[1], b1) == ["x1", "a1", "b1"]

    played(play)


def test_a_stop_answers_all_work_with_503() -> None:
    async def play(works: Works) -> None:
        pool = Preparation(threads=1, share=1, queue=10)
        tasks = submitted(pool, works, "a1", "a2", "b1")
        await works.until_begun(1)
        pool.stop()
        assert [await failed(task) for task in tasks] == [503] * 3
        assert await failed(*submitted(pool, works, "c1")) == 503 and works.begun == ["a1"]

    played(play)
