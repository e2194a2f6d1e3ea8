"""The number of torch's threads on a machine that other programs use too.

The threads of an operator wait for one another. Where another program keeps a processor busy, one of them is
descheduled for a time slice of some milliseconds, and all wait that long in every operator: two threads then take
several times as long as one. The compiled kernels have a pool of threads that does not wait
(decoding/kernels/cpu/pool.c); torch's operators, which training uses, need fewer threads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

WINDOW = 0.5
"""Least seconds of steps that are judged together."""
WAITED = 0.2
"""Seconds per second that threads of this process must wait for a processor before they count as disturbed."""
OTHERS = 0.25
"""Processors that other programs must use before they count as the reason."""
COLLAPSED = 0.7
"""Largest share of the undisturbed speed that counts as a collapse."""
PAUSE, LONGEST_PAUSE = 30.0, 480.0
"""Seconds before more threads are tried although other programs are still busy; doubled after each attempt in vain."""


@dataclass(frozen=True)
class Contention:
    """Readings of the system, in seconds since some moment."""

    waited: float
    """Time that threads of this process were ready to run and did not, plus time that the host took from the
    processors, summed over them."""
    others: float
    """Time that the processors of this process spent on other programs or other guests, summed over them."""


def read_contention() -> Contention | None:
    """Return the readings of now, or None if the system has none (it is not Linux)."""
    try:
        tasks = [path.read_text().split() for path in Path("/proc/self/task").glob("*/schedstat")]
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        own = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        ticks = [[int(word) for word in line[1:]] for line in lines if line and line[0] in own]
        second = os.sysconf("SC_CLK_TCK")
        # user, nice, system, idle, iowait, irq, softirq, steal
        busy = sum(line[i] for line in ticks for i in (0, 1, 2, 5, 6, 7)) / second
        stolen = sum(line[7] for line in ticks) / second
        return Contention(sum(int(task[1]) for task in tasks) / 1e9 + stolen, busy - time.process_time())
    except (OSError, AttributeError, ValueError, IndexError):
        return None


class ThreadControl:
    """Lower the number of threads while other programs slow them down, and raise it when those have ended.

    It acts between steps, by the readings and the speed of windows of `WINDOW` seconds. Fewer threads are kept only if
    steps become faster with them. A context manager: at its end the threads are as many as before.

    Args:
        threads: most threads.
        set_threads: sets the number of threads.
        read: returns the readings.
        clock: returns seconds since some moment.
    """

    def __init__(
        self,
        threads: int,
        set_threads: Callable[[int], None],
        read: Callable[[], Contention | None] = read_contention,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most = self.threads = threads
        self._set_threads, self._read, self._clock = set_threads, read, clock
        self._undisturbed: dict[int, float] = {}
        """Best speed of a window without a disturbance, by number of threads."""
        self._before: float | None = None
        """Speed with more threads, while the first window with fewer of them runs."""
        self._pause, self._next_try, self._no_fewer_until = PAUSE, 0.0, 0.0
        self._tried = self._reported = False
        self._begin()

    def __enter__(self) -> ThreadControl:
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._use(self.most)

    def _begin(self) -> None:
        """Begin a window."""
        self._work, self._began, self._readings = 0.0, self._clock(), self._read()

    def _use(self, threads: int) -> None:
        if threads != self.threads:
            self.threads = threads
            self._set_threads(threads)

    def after_step(self, work: float) -> str | None:
        """Count the work of a step; at the end of a window choose the threads of the next one.

        Args:
            work: what the step has done, in any unit, such as tokens.

        Returns:
            A line that reports the first time that fewer threads are used, or None.
        """
        self._work += work
        seconds = self._clock() - self._began
        if self.most == 1 or self._readings is None or seconds < WINDOW:
            return None
        now = self._read()
        assert now is not None
        waited, others = now.waited - self._readings.waited, now.others - self._readings.others
        line = self._judge(self._work / seconds, max(0.0, waited / seconds), max(0.0, others / seconds))
        self._begin()
        return line

    def _judge(self, speed: float, waited: float, others: float) -> str | None:
        """Choose the number of threads after a window of this speed; `waited` and `others` are per second."""
        now, disturbed = self._clock(), waited >= WAITED and others >= OTHERS
        if not disturbed:
            self._undisturbed[self.threads] = max(speed, self._undisturbed.get(self.threads, 0.0))
        before, self._before = self._before, None
        if before is not None and speed < before:  # fewer threads were no help
            self._no_fewer_until = now + self._pause
            self._use(min(self.most, self.threads + 1))
            return None
        collapsed = disturbed and speed < COLLAPSED * self._undisturbed.get(self.threads, float("inf"))
        if collapsed and self.threads > 1 and now >= self._no_fewer_until:
            self._pause = min(2 * self._pause, LONGEST_PAUSE) if self._tried else PAUSE
            self._tried, self._next_try, self._before = False, now + self._pause, speed
            self._use(max(1, min(self.threads - 1, round(self.most - others))))
            return None
        self._tried = False
        if self.threads == self.most:
            return None
        if others < OTHERS or now >= self._next_try:
            self._tried = others >= OTHERS
            self._use(self.most if others < OTHERS else self.threads + 1)
            return None
        if self._reported:
            return None
        self._reported = True
        return (
            f"other programs keep {others:.1f} processors busy: {self.threads} of {self.most} threads while they do "
            f"(--threads {self.most} keeps all)"
        )
