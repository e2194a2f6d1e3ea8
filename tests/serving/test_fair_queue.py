"""Check the order of a queue in which clients take turns."""

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


def test_clients_take_turns() -> None:
    assert taken(filled()) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_new_client_waits_one_round() -> None:
    queue = filled()
    assert queue.next() == "a1"
    queue.put("d", "d1")
    assert taken(queue) == ["b1", "c1", "a2", "d1", "b2", "a3"]


def test_items_can_be_removed() -> None:
    queue = filled()
    assert queue.remove("a", "a1") and queue.remove("c", "c1")
    assert not queue.remove("a", "a1") and not queue.remove("z", "z1") and not queue.remove("b", "a2")
    assert len(queue) == 4 and taken(queue) == ["a2", "b1", "a3", "b2"]
    with pytest.raises(IndexError):
        queue.next()


def test_clients_may_be_skipped() -> None:
    queue = filled()
    assert queue.next({"a"}) == "b1" and queue.next({"a", "c"}) == "b2" and len(queue) == 4
    with pytest.raises(IndexError):
        queue.next({"a", "c"})
    assert taken(queue) == ["a1", "c1", "a2", "a3"]


def test_the_newest_items_of_the_longest_queues_make_room() -> None:
    queue = filled()  # three of a, two of b, one of c
    assert queue.choose_dropped("d", 1, 1) == ["a3"]
    assert queue.choose_dropped("d", 1, 3) == ["a3", "a2", "b2"]
    assert queue.choose_dropped("d", 1, 4) is None  # every client has one now
    assert queue.choose_dropped("c", 1, 1) == ["a3"] and queue.choose_dropped("c", 1, 2) is None
    assert queue.choose_dropped("c", 2, 1) is None and queue.choose_dropped("a", 1, 1) is None
    assert queue.choose_dropped("a", 1, 0) == [] == queue.choose_dropped("a", 1, -5)
    assert len(queue) == 6 and FairQueue[str]().choose_dropped("a", 1, 1) is None
