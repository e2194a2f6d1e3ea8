"""A run next to a busy program: fewer threads, one line about it, and all threads again at the end."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headstart import threads
from headstart.threads import Contention, ThreadControl
from headstart.training import loop
from headstart.training.loop import train


@pytest.fixture
def neighbour(monkeypatch):
    """Readings of a machine with a neighbour, and a clock on which a step takes a second, with two threads ten."""
    now, used = [0.0], []

    def read() -> Contention:
        now[0] += 5.0 if torch.get_num_threads() == 2 else 0.5  # it reads at the start and at the end of a window
        return Contention(waited=now[0] / 2, others=now[0])

    def set_threads(number: int) -> None:
        used.append(number)
        torch.set_num_threads(number)

    monkeypatch.setattr(loop, "ThreadControl", lambda most, _: ThreadControl(most, set_threads, read, lambda: now[0]))
    monkeypatch.setattr(threads, "WINDOW", 0.0)
    torch.set_num_threads(2)
    yield used
    torch.set_num_threads(1)


def test_a_run_uses_fewer_threads_and_says_so_once(tiny, neighbour, capsys) -> None:
    train(tiny(steps=6))
    assert neighbour == [1, 2] and torch.get_num_threads() == 2
    assert capsys.readouterr().err.count("1 of 2 threads") == 1


def test_threads_that_the_user_chose_stay(tiny, neighbour, capsys) -> None:
    train(replace(tiny(steps=6), threads=2))
    assert neighbour == [] and "of 2 threads" not in capsys.readouterr().err
