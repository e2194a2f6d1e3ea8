"""Who is next: clients take turns, each one's own requests in the order they came."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Container
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

    def next(self, skipped: Container[str] = ()) -> Item:
        """The first item of the client whose turn it is, without those who are skipped; IndexError where there is
        none."""
        client = next((client for client in self._of if client not in skipped), None)
        if client is None:
            raise IndexError("nobody waits")
        items = self._of[client]
        item = items.popleft()
        self._count -= 1
        if items:
            self._of.move_to_end(client)
        else:
            del self._of[client]
        return item

    def newest_of_longest(self, client: str, more: int, count: int) -> list[Item] | None:
        """Choose `count` items that leave a full queue for `more` items of `client`: one by one the newest item of the
        client that has most. None where no other client has more items than this one would have. Nothing is removed."""
        sizes = {other: len(items) for other, items in self._of.items()}
        own = sizes.pop(client, 0) + more
        chosen = []
        for _ in range(count):
            longest = max(sizes, key=lambda other: sizes[other], default=None)
            if longest is None or sizes[longest] <= own:
                return None
            sizes[longest] -= 1
            chosen.append(self._of[longest][sizes[longest]])
        return chosen

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
