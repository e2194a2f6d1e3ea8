"""Run the work that requests need before they are decoded in threads: parse, tokenize, render, compile."""

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
"""Most threads of one client that may still run after their requests have ended; further work of the client waits."""


class Task(Generic[Result]):
    """Hold a piece of work and its result."""

    def __init__(self, client: str, work: Callable[[], Result]) -> None:
        self.client, self.work = client, work
        self.result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()


class Preparation:
    """Run work in at most `threads` threads. Clients take turns, and none has more than `share` of them.

    Only the event loop uses it; at most `queue` pieces of work wait. A thread cannot be stopped: one that still runs
    when its request has ended no longer counts, and another one takes its place. Threads are daemons, so they do not
    keep the process alive.
    """

    def __init__(self, threads: int, share: int, queue: int) -> None:
        self.threads, self.share, self.queue = threads, share, queue
        self._waiting: FairQueue[Task[Any]] = FairQueue()
        self._running: set[Task[Any]] = set()
        self._stuck: Counter[str] = Counter()
        self._stopped = False

    @property
    def stuck(self) -> int:
        """Return the number of threads that still run after their requests have ended."""
        return self._stuck.total()

    async def run(self, client: str, work: Callable[[], Result]) -> Result:
        """Return what `work` returns. If this call is cancelled while the work waits, the work never runs.

        Raises ApiError 429 if the queue is full and no other client has more work in it, or when this work is dropped
        for a client with less; ApiError 503 once the server stops; and what `work` raises.
        """
        if self._stopped:
            raise stopping()
        task = Task(client, work)
        dropped = self._waiting.choose_dropped(client, 1, len(self._waiting) + 1 - self.queue)
        if dropped is None:
            raise too_many(len(self._waiting), 1)
        for other in dropped:
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
        """Answer all work that waits or runs with 503, and accept no more."""
        self._stopped = True
        tasks = [*self._running, *(self._waiting.next() for _ in range(len(self._waiting)))]
        for task in tasks:
            if not task.result.done():
                task.result.set_exception(stopping())

    def _start(self) -> None:
        while len(self._running) < self.threads:
            running = Counter(task.client for task in self._running)
            full = {client for client, count in running.items() if count >= self.share}
            full |= {client for client, count in self._stuck.items() if count >= MOST_STUCK}
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
        except BaseException as raised:  # a tokenizer's panic is not an Exception
            error = raised if isinstance(raised, Exception) else RuntimeError(repr(raised))
        with suppress(RuntimeError):  # the loop has ended, and nobody listens
            loop.call_soon_threadsafe(self._end, task, result, error)

    def _end(self, task: Task[Any], result: Any, error: Exception | None) -> None:
        if task in self._running:
            self._running.remove(task)
        else:
            self._stuck[task.client] -= 1
            self._stuck += Counter()  # drop clients that have none
        if not task.result.done():
            if error is None:
                task.result.set_result(result)
            else:
                task.result.set_exception(error)
        if not self._stopped:
            self._start()
