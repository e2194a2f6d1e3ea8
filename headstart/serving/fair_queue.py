"""Who is next: clients take turns, each one's own requests in the order they came."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Round-robin over clients, so that one who sends a hundred requests does not keep another waiting for a hundred.

    It is not locked: its owner does that.
    """

    def __init__(self) -> None:
        self._of: OrderedDict[str, deque[Item]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, client: str, item: Item) -> None:
        self._of.setdefault(client, deque()).append(item)
        self._count += 1

    def next(self) -> Item:
        """The first item of the client whose turn it is; IndexError where there is none."""
        if not self._of:
            raise IndexError("nobody waits")
        client, items = next(iter(self._of.items()))
        item = items.popleft()
        self._count -= 1
        if items:
            self._of.move_to_end(client)
        else:
            del self._of[client]
        return item

    def remove(self, client: str, item: Item) -> bool:
        """Takes an item out; False if it is not here."""
        items = self._of.get(client)
        if items is None or item not in items:
            return False
        items.remove(item)
        self._count -= 1
        if not items:
            del self._of[client]
        return True
