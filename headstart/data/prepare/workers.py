"""Run one function over many items in worker processes.

Processes are spawned, never forked, because the parent may hold torch and its threads. A worker imports only what its
function needs, and dies with its parent, so a killed `prepare` leaves no process behind.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from headstart.errors import UsageError

Item = TypeVar("Item")
Result = TypeVar("Result")
Advance = Callable[[int], None]
"""Called within an item with the amount of work done since the last call."""

POLL_SECONDS = 0.25
STOP_SECONDS = 3.0


def run_all(
    function: Callable[[Item, Advance], Result], items: Iterable[Item], workers: int, advance: Advance
) -> Iterator[Result]:
    """Yield `function(item, advance)` for every item, in the order of completion.

    With one worker, the items are processed here, in order. `function` and the items must be picklable. An exception of
    the function stops all workers and is raised here; the death of a worker raises UsageError.
    """
    if workers == 1:
        for item in items:
            yield function(item, advance)
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _begin, (function, counter))
    waiting = iter(items)
    counted = 0
    running: set[Future[Result]] = set()
    try:
        while True:
            # Two items per worker: no worker waits, and a stop does not have to cancel a long queue.
            running |= {pool.submit(_run, item) for item in islice(waiting, 2 * workers - len(running))}
            if not running:
                break
            done, running = wait(running, POLL_SECONDS, FIRST_COMPLETED)
            now = counter.value
            advance(now - counted)
            counted = now
            for future in done:
                yield future.result()
        advance(counter.value - counted)
        pool.shutdown()
    except BrokenProcessPool as error:
        raise UsageError(
            "a worker process died, perhaps out of memory; run the same command again with fewer --workers: "
            "finished work is kept"
        ) from error
    finally:
        ours = set(multiprocessing.active_children()) - others
        for process in ours:
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in ours:
            process.join(STOP_SECONDS)
            process.kill()  # a library may run long without handling signals


_function: Any = None
_counter: Any = None
_stopping = False


def _begin(function: Any, counter: Any) -> None:
    """Set up a new worker process."""
    global _function, _counter
    _function, _counter = function, counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent stops its workers
    signal.signal(signal.SIGTERM, _stop)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _stop(*_: object) -> None:
    """Abandon the current item, cleaning up, and the waiting ones: the parent wants no more results."""
    global _stopping
    _stopping = True
    raise SystemExit(1)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _advance(amount: int) -> None:
    with _counter.get_lock():
        _counter.value += amount


def _run(item: Any) -> Any:
    if _stopping:
        raise SystemExit(1)
    return _function(item, _advance)
