"""What the caches of each slot hold: where a request goes, and what is there of its prompt already.

Keys and values of a position depend on the tokens up to it alone, in every head. So a prompt that begins like a text
some slot holds, or has held last, goes on from a copy of those rows, if both requests have the same salt: how much a
request reuses shows in its cost, and would tell one client how another one's prompt continues. (As vLLM's prefix
caching and SGLang's RadixAttention, with whole slots in place of pages.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from headstart.model.config import ModelConfig

SHORTEST = 16
"""Fewer positions than this are computed as soon as they are found."""


@dataclass
class Held:
    """What lies in the caches of a slot."""

    heads: list[int]
    """Entry k-1: how many leading positions have all keys and values that heads 1..k need."""
    tokens: list[int] = field(default_factory=list)
    """Of the positions whose keys and values of the trunk are there."""
    root: int = -1
    """The token after them, while a request is being decoded."""
    prefilled: int = 0
    """Leading positions that were computed as chunks of a prompt, not in windows."""
    used: int = 0
    """When a request last left the slot, counted in requests."""
    salt: str = ""
    """The salt of the request that wrote the positions: only requests with the same salt may use them."""

    def usable(self, prompt: Sequence[int], heads: int, chunk: int | None, ahead: int = 0) -> int:
        """How many leading positions a request with this prompt can take. The last token of a prompt is never one: it
        is the root of the first window.

        With a `chunk`, positions count only if their chunk was computed in the shape in which the prompt would compute
        it itself: then its bits are the same. Heads that read `ahead` tokens have read others in the last positions."""
        count = max(0, min(common_prefix(self.tokens, prompt[:-1]), self.heads[heads - 1]) - ahead)
        if chunk is not None:
            count = min(count, self.prefilled)
            if not count == self.prefilled == len(prompt) - 1:
                count -= count % chunk
        return count if count >= SHORTEST else 0

    def cut(self, count: int) -> Held:
        """A copy that holds the first `count` positions only."""
        heads = [min(reached, count) for reached in self.heads]
        return replace(self, heads=heads, tokens=self.tokens[:count], root=-1, prefilled=min(self.prefilled, count))

    def add(self, tokens: Sequence[int], heads: int) -> None:
        """`tokens` follow, computed with what heads 1..`heads` need."""
        before = len(self.tokens)
        self.tokens += tokens
        for k in range(heads):
            # A head that has missed a position has a hole there, and what comes after it is of no use.
            if self.heads[k] == before:
                self.heads[k] = len(self.tokens)


class Slots:
    """What every slot holds.

    Args:
        chunk: how many positions of a prompt are computed at once, where bits depend on that; else None.
        compact: whether a pass costs by the slots between its first and its last one, so that those which are decoded
            should lie close together.
        reuse: whether anything is to be used again.
    """

    def __init__(self, count: int, config: ModelConfig, chunk: int | None, compact: bool, reuse: bool) -> None:
        self.config, self.chunk, self.compact, self.reuse = config, chunk, compact, reuse
        self.held = [Held([0] * config.heads) for _ in range(count)]
        self._freed = 0

    def place(
        self, prompt: Sequence[int], heads: int, free: Sequence[int], busy: Sequence[int], salt: str = ""
    ) -> tuple[int, int]:
        """The one of the `free` slots that a request takes, and the one which what lies there should change places with
        (itself: it may be lost)."""

        worth = {slot: self._worth(slot, prompt, heads, salt) for slot in free}

        def width(slot: int) -> int:
            return max(*busy, slot) - min(*busy, slot) if busy and self.compact else 0

        slot = min(free, key=lambda slot: (width(slot), worth[slot]))
        spare = min(free, key=lambda slot: worth[slot])
        return slot, spare if worth[slot][0] and worth[spare] < worth[slot] else slot

    def _worth(self, slot: int, prompt: Sequence[int], heads: int, salt: str) -> tuple[bool, int]:
        """Orders slots by what a prompt would overwrite there: first those where nothing is lost, the one which holds
        most of the prompt before the others; then those that were left longest ago."""
        if not self.reuse:
            return False, 0
        held = self.held[slot]
        found = self._usable(held, prompt, heads, salt)
        lost = len(held.tokens) - found >= SHORTEST
        return lost, held.used if lost else -found

    def donor(self, slot: int, prompt: Sequence[int], heads: int, salt: str = "") -> tuple[int, int]:
        """The slot that holds most of this prompt (`slot` itself, if no other has more), and how many positions; only
        slots with this salt are looked at."""
        if not self.reuse:
            return slot, 0
        found = [self._usable(held, prompt, heads, salt) for held in self.held]
        best = max(found)
        return (slot, best) if found[slot] == best else (found.index(best), best)

    def swap(self, a: int, b: int) -> None:
        self.held[a], self.held[b] = self.held[b], self.held[a]

    def take(self, slot: int, donor: int, count: int, salt: str = "") -> None:
        """`slot` now holds the first `count` positions of `donor`, for a request with this salt."""
        self.held[slot] = replace(self.held[donor].cut(count), salt=salt)

    def filled(self, slot: int, tokens: Sequence[int], heads: int) -> None:
        """A chunk of a prompt was computed."""
        held = self.held[slot]
        held.add(tokens, self._computed(heads))
        held.prefilled = len(held.tokens)

    def wrote(self, slot: int, committed: Sequence[int], heads: int) -> None:
        """A pass over `heads` heads has committed tokens: the root and all but the last of them are cached now."""
        held = self.held[slot]
        held.add([held.root, *committed[:-1]], self._computed(heads))
        held.root = committed[-1]

    def freed(self, slot: int) -> None:
        """The request in `slot` has ended; what it has left there stays."""
        self._freed += 1
        self.held[slot].used = self._freed

    def _usable(self, held: Held, prompt: Sequence[int], heads: int, salt: str) -> int:
        return held.usable(prompt, heads, self.chunk, self.config.ahead) if held.salt == salt else 0

    def _computed(self, heads: int) -> int:
        """The heads up to which nothing is missing where heads 1..`heads` were computed: without blocks of their own
        they need nothing, and anticausal ones all hang on the way to head 1."""
        config = self.config
        own = config.head_blocks > 0 and config.wiring != "anticausal"
        return heads if own else config.heads


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens two texts share. (Both of one type: slices are compared.)"""
    a, b = list(a), list(b)
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices compare at the speed of memory, tokens one by one do not
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
