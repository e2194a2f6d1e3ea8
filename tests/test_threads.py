"""Fewer threads next to busy programs, by readings and a clock that are made up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from headstart.threads import LONGEST_PAUSE, PAUSE, Contention, ThreadControl, read_contention


class Machine:
    """A machine whose time passes with the steps; `speed(threads)` is tokens per second, `contention(threads)` what
    the threads wait and what the others use, per second."""

    def __init__(self, threads: int = 2) -> None:
        self.time, self.readings, self.uses = 100.0, Contention(7.0, 9.0), []
        self.speed: Callable[[int], float] = lambda n: 500.0 * n
        self.contention: Callable[[int], tuple[float, float]] = lambda n: (0.0, 0.0)
        self.control = ThreadControl(threads, self.uses.append, lambda: self.readings, lambda: self.time)

    def run(self, seconds: float) -> list[str]:
        """Take steps of 100 tokens for a while, and return the lines that are reported."""
        lines, ends = [], self.time + seconds
        while self.time < ends:
            duration = 100 / self.speed(self.control.threads)
            waited, others = self.contention(self.control.threads)
            self.time += duration
            before = self.readings
            self.readings = Contention(before.waited + waited * duration, before.others + others * duration)
            line = self.control.after_step(100)
            lines += [] if line is None else [line]
        return lines

    def neighbour(self) -> None:
        """Another program keeps one of two processors busy."""
        self.speed = lambda n: {1: 500.0, 2: 100.0}[n]
        self.contention = lambda n: {1: (0.0, 1.0), 2: (0.5, 0.5)}[n]

    def alone(self) -> None:
        self.speed, self.contention = lambda n: 500.0 * n, lambda n: (0.0, 0.0)


def test_an_idle_machine_keeps_all_threads() -> None:
    machine = Machine()
    assert machine.run(60) == [] and machine.uses == []


@pytest.mark.parametrize("seconds_alone", [0, 20])
def test_a_neighbour_costs_threads_until_it_ends(seconds_alone: float) -> None:
    machine = Machine()
    machine.run(seconds_alone)
    machine.neighbour()
    said = machine.run(10)
    assert machine.uses == [1]
    assert said == ["other programs keep 1.0 processors busy: 1 of 2 threads while they do (--threads 2 keeps all)"]
    machine.alone()
    assert machine.run(5) == [] and machine.uses == [1, 2]
    machine.neighbour()
    assert machine.run(5) == [] and machine.uses == [1, 2, 1]  # reported once


def test_more_threads_are_tried_rarely_next_to_a_neighbour() -> None:
    machine = Machine()
    machine.neighbour()
    machine.run(3600)
    tries = machine.uses.count(2)
    assert 3600 / LONGEST_PAUSE <= tries <= 3600 / LONGEST_PAUSE + 5
    assert machine.uses == [1, *[2, 1] * tries]
    machine.contention = lambda n: (0.0, 1.0)  # one that makes way
    machine.speed = lambda n: 500.0 * n
    machine.run(LONGEST_PAUSE + 1)
    assert machine.control.threads == 2


def test_a_neighbour_that_takes_little_speed_is_suffered() -> None:
    machine = Machine()
    machine.run(10)
    machine.neighbour()
    machine.speed = lambda n: {1: 500.0, 2: 800.0}[n]
    assert machine.run(60) == [] and machine.uses == []


def test_fewer_threads_that_are_no_faster_are_given_up_for_a_while() -> None:
    machine = Machine()
    machine.neighbour()
    machine.speed = lambda n: {1: 90.0, 2: 100.0}[n]
    assert machine.run(PAUSE) == [] and machine.uses[:2] == [1, 2] and len(machine.uses) <= 4


def test_threads_that_wait_for_each_other_have_no_neighbour() -> None:
    machine = Machine()
    machine.speed, machine.contention = lambda n: 10.0, lambda n: (1.0, 0.0)
    assert machine.run(60) == [] and machine.uses == []


def test_many_processors_lose_only_the_busy_ones() -> None:
    machine = Machine(16)
    machine.speed = lambda n: 100.0 * n if n <= 12 else 100.0
    machine.contention = lambda n: (0.0, 4.0) if n <= 12 else (0.5 * (n - 12), 4.0 - 0.5 * (n - 12))
    machine.run(20)
    assert 10 <= machine.control.threads <= 14
    machine.alone()
    machine.run(5)
    assert machine.control.threads == 16


def test_without_readings_nothing_changes() -> None:
    uses: list[int] = []
    control = ThreadControl(2, uses.append, lambda: None)
    assert control.after_step(1) is None and uses == []


def test_the_end_brings_all_threads_back() -> None:
    machine = Machine()
    machine.neighbour()
    with machine.control:
        machine.run(5)
        assert machine.control.threads == 1
    assert machine.uses == [1, 2]


def test_readings_notice_another_program() -> None:
    before = read_contention()
    if before is None:
        pytest.skip("no /proc here")
    program = "import time; ends = time.process_time() + 0.3\nwhile time.process_time() < ends: pass"
    subprocess.run([sys.executable, "-c", program], check=True)
    after = read_contention()
    assert after is not None and after.others - before.others > 0.2
