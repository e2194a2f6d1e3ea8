"""Clients take turns."""

from __future__ import annotations

import pytest

from headstart.serving.fair_queue import FairQueue


def filled() -> FairQueue[str]:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.put(item[0], item)
    return queue


def taken(queue: FairQueue[str]) -> list[str]:
    return [queue.next() for _ in range(len(queue))]


def test_who_asks_much_does_not_keep_the_others_waiting() -> None:
    assert taken(filled()) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_who_comes_late_is_behind_those_who_have_a_turn() -> None:
    queue = filled()
    assert queue.next() == "a1"
    queue.put("d", "d1")
    assert taken(queue) == ["b1", "c1", "a2", "d1", "b2", "a3"]


def test_those_who_go_are_gone() -> None:
    queue = filled()
    assert queue.remove("a", "a1") and queue.remove("c", "c1")
    assert not queue.remove("a", "a1") and not queue.remove("z", "z1") and not queue.remove("b", "a2")
    assert len(queue) == 4 and taken(queue) == ["a2", "b1", "a3", "b2"]
    with pytest.raises(IndexError):
        queue.next()
