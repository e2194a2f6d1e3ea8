"""Work that a request needs before it can be decoded, in threads: prompts are tokenized, constraints compiled."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

from headstart.serving.errors import stopping, too_many
from headstart.serving.fair_queue import FairQueue

Result = TypeVar("Result")

MOST_STUCK = 4
"""Threads of one client that may still run after their requests have ended; further work of the client waits."""


class Task(Generic[Result]):
    """One piece of work and its result."""

    def __init__(self, client: str, work: Callable[[], Result]) -> None:
        self.client, self.work = client, work
        self.result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()


class Preparation:
    """Runs work in threads. Clients take turns, and one client never has all threads.

    The event loop alone touches it. A thread cannot be ended: one that is still running when its request has ended no
    longer counts, and another one takes its place. Threads are daemons, so they do not keep the process from ending.

    Args:
        threads: most pieces of work that run at once.
        share: most of these for one client.
        queue: most pieces of work that wait for a thread.
    """

    def __init__(self, threads: int, share: int, queue: int) -> None:
        self.threads, self.share, self.queue = threads, share, queue
        self._waiting: FairQueue[Task[Any]] = FairQueue()
        self._running: set[Task[Any]] = set()
        self._stuck: Counter[str] = Counter()
        self._stopped = False

    @property
    def stuck(self) -> int:
        """How many threads still run after their requests have ended."""
        return self._stuck.total()

    async def run(self, client: str, work: Callable[[], Result]) -> Result:
        """Return what `work` returns. Cancelled while it waits, it leaves the queue at once.

        Raises ApiError 429 where the queue is full and no other client has more in it, or when it is thrown out for a
        client with less; 503 once the server is stopping; and what `work` raises."""
        if self._stopped:
            raise stopping()
        task = Task(client, work)
        thrown_out = self._waiting.newest_of_longest(client, 1, len(self._waiting) + 1 - self.queue)
        if thrown_out is None:
            raise too_many(len(self._waiting), 1)
        for other in thrown_out:
            self._waiting.remove(other.client, other)
            other.result.set_exception(too_many(len(self._waiting), 1))
        self._waiting.put(client, task)
        self._start()
        try:
            return await task.result
        finally:
            self._waiting.remove(client, task)
            if task in self._running:
                self._running.remove(task)
                self._stuck[client] += 1
                self._start()

    def stop(self) -> None:
        """Answer everything that waits or runs with 503, and take nothing more."""
        self._stopped = True
        tasks = [*self._running, *(self._waiting.next() for _ in range(len(self._waiting)))]
        for task in tasks:
            if not task.result.done():
                task.result.set_exception(stopping())

    def _start(self) -> None:
        while len(self._running) < self.threads:
            running = Counter(task.client for task in self._running)
            full = {c for c, count in running.items() if count >= self.share}
            full |= {c for c, count in self._stuck.items() if count >= MOST_STUCK}
            try:
                task = self._waiting.next(full)
            except IndexError:
                return
            self._running.add(task)
            loop = asyncio.get_running_loop()
            threading.Thread(target=self._work, args=(task, loop), name="preparation", daemon=True).start()

    def _work(self, task: Task[Any], loop: asyncio.AbstractEventLoop) -> None:
        result, error = None, None
        try:
            result = task.work()
        except BaseException as raised:  # a tokenizer's panic is no Exception
            error = raised if isinstance(raised, Exception) else RuntimeError(repr(raised))
        with suppress(RuntimeError):  # the loop has ended, and nobody listens
            loop.call_soon_threadsafe(self._ended, task, result, error)

    def _ended(self, task: Task[Any], result: Any, error: Exception | None) -> None:
        if task in self._running:
            self._running.remove(task)
        else:
            self._stuck[task.client] -= 1
            self._stuck += Counter()  # without those that have none
        if not task.result.done():
            if error is None:
                task.result.set_result(result)
            else:
                task.result.set_exception(error)
        if not self._stopped:
            self._start()
