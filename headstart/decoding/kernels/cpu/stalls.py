"""The one line that reports that the pool of the compiled kernels uses fewer threads, next to busy programs."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from headstart.decoding.kernels import cpu

WINDOW = 5.0
"""Seconds that are judged together: longer than the pool does without a thread after one stall."""
LIMITED = 0.8
"""Share of a window's passes with fewer threads from which they are reported."""


def pool_limit() -> int:
    """Return the most threads that the pool uses now; 0: as many as are asked for."""
    pool = cpu.thread_pool()
    return 0 if pool is None else int(pool.thread_limit())


class StallReport:
    """Watches the limit of the pool from pass to pass, and reports it once if it lasts.

    Args:
        limit: returns `pool_limit`.
        clock: returns seconds since some moment.
    """

    def __init__(self, limit: Callable[[], int] = pool_limit, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = limit, clock
        self._reported = False
        self._begin()

    def _begin(self) -> None:
        self._began, self._passes, self._limited = self._clock(), 0, 0

    def after_pass(self, threads: int | None = None) -> str | None:
        """Count a pass that asked for `threads` (None: torch's number), and return the line if it is time for it."""
        if self._reported:
            return None
        limit, asked = self._limit(), threads or torch.get_num_threads()
        self._passes += 1
        self._limited += 0 < limit < asked
        if self._clock() - self._began < WINDOW:
            return None
        if self._limited < LIMITED * self._passes:
            self._begin()
            return None
        self._reported = True
        return f"other programs keep processors busy: decoding takes fewer than {asked} threads while they do"


REPORT = StallReport()
"""The report of this process."""
