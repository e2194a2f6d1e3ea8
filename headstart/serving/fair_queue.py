"""Queue items of several clients: clients take turns, and each one's items keep their order."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Container
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Serve clients round-robin, so that a client with a hundred items does not make another one wait for all of them.

    The owner locks it.
    """

    def __init__(self) -> None:
        self._of: OrderedDict[str, deque[Item]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, client: str, item: Item) -> None:
        """Add an item at the end of its client's queue."""
        self._of.setdefault(client, deque()).append(item)
        self._count += 1

    def next(self, skipped: Container[str] = ()) -> Item:
        """Take out the first item of the client whose turn it is. Raises IndexError if all clients are `skipped`."""
        client = next((client for client in self._of if client not in skipped), None)
        if client is None:
            raise IndexError("no client waits")
        items = self._of[client]
        item = items.popleft()
        self._count -= 1
        if items:
            self._of.move_to_end(client)
        else:
            del self._of[client]
        return item

    def choose_dropped(self, client: str, more: int, count: int) -> list[Item] | None:
        """Return `count` items to drop for `more` items of `client`, without removing them.

        Each is the newest item of the client that then has most. Returns None if no other client has more items than
        this one would have.
        """
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
        """Remove an item; return False if it does not wait."""
        items = self._of.get(client)
        if items is None or item not in items:
            return False
        items.remove(item)
        self._count -= 1
        if not items:
            del self._of[client]
        return True
