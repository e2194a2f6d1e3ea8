"""The scheduler: which request is next, which slot it takes, and how far its prompt is read.

Keys and values of a position depend on the tokens up to it alone, in every head. So a prompt that begins like a
sequence that some slot holds, or held last, starts from a copy of those rows, if both requests have the same salt: how
much a request reuses shows in its cost, and would tell one client how another one's prompt continues. (As vLLM's prefix
caching and SGLang's RadixAttention, with whole slots in place of pages.)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from headstart.decoding.decode_pass import prefill
from headstart.decoding.drafters.interface import PromptPiece
from headstart.decoding.generation import Generation
from headstart.decoding.sampling import log_probabilities
from headstart.decoding.state import DecodingState
from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

SHORTEST = 16
"""Fewest positions worth reusing; fewer are computed as fast as they are found."""
SCORED = 32
"""Most positions of a prompt whose logits exist at once, for log-probabilities of the prompt."""
CHUNK = 256
"""Most positions of a prompt that are computed at once."""


class RequestQueue(Protocol):
    """The requests that wait for a slot, in an order of its own."""

    def __len__(self) -> int:
        """Return how many wait."""

    def pop(self) -> Generation | None:
        """Take out the next one; None where none can start."""

    def remove(self, generation: Generation) -> bool:
        """Take one out that is cancelled; False if it does not wait."""


class FirstComeQueue:
    """Requests in the order in which they came; a `RequestQueue`."""

    def __init__(self) -> None:
        self._waiting: deque[Generation] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def append(self, generation: Generation) -> None:
        """Put a request at the end."""
        self._waiting.append(generation)

    def pop(self) -> Generation | None:
        """Take out the first one."""
        return self._waiting.popleft() if self._waiting else None

    def remove(self, generation: Generation) -> bool:
        """Take one out that is cancelled; False if it does not wait."""
        if generation not in self._waiting:
            return False
        self._waiting.remove(generation)
        return True


class Scheduler:
    """Assigns slots to waiting requests, and reads their prompts: in one `fill` at most `budget` tokens, if given.

    With `reuse` prompts start from what slots hold of them. `fixed_chunks`: bits depend on the shape of a chunk. Then a
    prompt is cut into equal chunks from its start, whatever else there is to do; otherwise a chunk is what the budget
    leaves.
    """

    def __init__(
        self, model: Transformer, state: DecodingState, *, budget: int | None, reuse: bool, fixed_chunks: bool
    ) -> None:
        if budget is not None and budget < 1:
            raise UsageError(f"prefill_budget is {budget}; it must be at least 1 token a step, or None for no limit")
        self.model, self.state, self.budget, self.fixed_chunks = model, state, budget, fixed_chunks
        self._submitted = FirstComeQueue()
        self.queue: RequestQueue = self._submitted
        """The requests that wait; its order says who is next. An owner of an engine may put in a queue of its own."""
        self.chunk = CHUNK if budget is None else min(CHUNK, budget)
        count = len(state.length_S)
        sliding = state.cache.sliding
        sees = sliding.sees if sliding else 0
        self.slots = Slots(count, model.config, self.chunk if fixed_chunks else None, not fixed_chunks, reuse, sees)
        self.filling: dict[int, Generation] = {}
        """Requests whose prompts are read, by slot, in the order of their turns."""
        self.live: list[Generation | None] = [None] * count
        """Requests that are decoded, by slot."""
        self.lengths = [state.parked] * count
        """`DecodingState.length_S` on the host."""
        self._turn: Generation | None = None
        self._dirty = [0] * count
        """Position from which on the rows of a free slot are as they were made."""

    @property
    def busy(self) -> bool:
        """True if any request is not finished."""
        return bool(len(self.queue) or self.filling or any(self.live))

    def submit(self, generation: Generation) -> None:
        """Queue a request, first come, first served."""
        assert self.queue is self._submitted, "the engine takes its requests from another queue"
        self._submitted.append(generation)

    def decoding(self) -> list[tuple[int, Generation]]:
        """Return the slots that decode, with their requests."""
        return [(slot, generation) for slot, generation in enumerate(self.live) if generation is not None]

    def admit(self) -> None:
        """Give the free slots to those who are next in the queue."""
        while len(self.queue):
            busy = [*(slot for slot, _ in self.decoding()), *self.filling]
            free = [slot for slot in range(len(self.live)) if slot not in busy]
            if not free or (generation := self.queue.pop()) is None:
                return
            request = generation.request
            slot, spare = self.slots.place(request.prompt, generation.heads, free, busy, request.cache_salt)
            if spare != slot:
                self._swap(slot, spare)
            generation.start(slot)
            self.filling[slot] = generation

    def fill(self) -> list[tuple[int, Generation]]:
        """Read prompts as far as the budget goes. Return the requests whose prompts are read; they leave `filling`."""
        left, ready = self.budget, []
        while self.filling:
            slot, generation = next(iter(self.filling.items()))
            prompt, began = generation.request.prompt, time.perf_counter()
            if generation is not self._turn:
                # Not before its turn: by then those before it may have read the same prefix.
                self._turn = generation
                self._reuse(slot, generation)
            start = len(self.slots.held[slot].tokens)
            size = min(self.chunk, len(prompt) - 1 - start)
            if left is not None:
                if size > left and (self.fixed_chunks or left == 0):
                    break
                size = min(size, left)
                left -= size
            if size:
                self._read(slot, generation, start, size)
            if start + size == len(prompt) - 1:
                self.slots.held[slot].root = prompt[-1]
                ready.append((slot, self.filling.pop(slot)))
            generation.stats.prefill_seconds += time.perf_counter() - began
        return ready

    def _read(self, slot: int, generation: Generation, start: int, size: int) -> None:
        """Compute `size` positions of a prompt from position `start` on."""
        prompt = generation.request.prompt
        tokens = torch.tensor(prompt[start : start + size + 1], device=self.state.length_S.device)
        tokens_T, root_1 = tokens.split([size, 1])
        first = generation.stats.prompt_tokens_reused
        piece = PromptPiece(slot, tokens_T, start, generation.heads, root_1, first)
        prefill(self.model, self.state, piece, self._scoring(generation, start))
        self.slots.filled(slot, prompt[start : start + size], generation.heads)
        self._forget(slot)

    def _scoring(self, generation: Generation, start: int) -> Callable[[Tensor], None] | None:
        """Return the function that scores a chunk of a prompt from position `start` on; None if nothing asks for it."""
        prompt, alternatives = generation.request.prompt, generation.request.prompt_logprobs
        if alternatives is None:
            return None

        def score(z_1WD: Tensor) -> None:
            for done in range(0, z_1WD.shape[1], SCORED):
                z_1RD = z_1WD[:, done : done + SCORED]
                behind = prompt[start + done + 1 : start + done + 1 + z_1RD.shape[1]]
                tokens_1R = torch.tensor([behind], device=z_1RD.device)
                found = log_probabilities(self.model.unembedding(z_1RD), tokens_1R, alternatives)
                generation.keep_prompt_logprobs(*(part[0] for part in found))

        return score

    def begin(self, slot: int, generation: Generation) -> None:
        """Start decoding in `slot`: all of the prompt but its last token is in the caches."""
        self.live[slot], self.lengths[slot] = generation, len(generation.request.prompt) - 1

    def advance(self, slot: int, committed: Sequence[int], heads: int) -> None:
        """Record the tokens that a pass over `heads` heads committed in `slot`."""
        self.lengths[slot] += len(committed)
        self.slots.wrote(slot, committed, heads)
        self._forget(slot)

    def _forget(self, slot: int) -> None:
        """Free what no later position of a slot sees, nor a prompt that continues it."""
        if (sliding := self.state.cache.sliding) is not None:
            for start, end in self.slots.held[slot].forget(sliding.sees, sliding.block, self.chunk):
                self.state.cache.release(slot, start, end)

    def leave(self, slot: int) -> None:
        """Free `slot`, whose request has ended; what its caches hold stays until it is overwritten."""
        self.live[slot], self.lengths[slot] = None, self.state.parked
        self.slots.freed(slot)
        # A window reaches beyond what was kept of it.
        self._dirty[slot] = len(self.slots.held[slot].tokens) - self.state.parked

    def remove(self, generation: Generation) -> bool:
        """Take out a request that is cancelled before its first pass; False if it is neither waiting nor read."""
        if self.queue.remove(generation):
            return True
        if generation.slot is None or self.filling.get(generation.slot) is not generation:
            return False
        del self.filling[generation.slot]
        self.leave(generation.slot)
        return True

    def _reuse(self, slot: int, generation: Generation) -> None:
        """Copy the rows that a prompt begins with into its slot, and clear those that it will not use."""
        cache, request = self.state.cache, generation.request
        donor, count = self.slots.donor(slot, request.prompt, generation.heads, request.cache_salt)
        if request.prompt_logprobs is not None:
            donor, count = slot, 0  # scores need the latents of every position
        left_out = cache.copy(donor, slot, count) if donor != slot else 0
        self.slots.take(slot, donor, count, request.cache_salt)
        if left_out:
            self.slots.held[slot].lost = [(0, left_out)]
        # Attention multiplies masked rows by 0, and 0 x NaN is NaN: an overflow must not reach the next request.
        cache.clear(slot, count, self._dirty[slot])
        cache.clear(slot, cache.capacity + self.state.parked, cache.capacity)
        self._dirty[slot] = 0
        generation.stats.prompt_tokens_reused = count

    def _swap(self, a: int, b: int) -> None:
        """Exchange what two free slots hold."""
        self.state.cache.swap(a, b, *(len(self.slots.held[slot].tokens) for slot in (a, b)))
        self.slots.swap(a, b)
        for slot in (a, b):
            for start, end in self.slots.held[slot].lost:
                self.state.cache.release(slot, start, end)
        self._dirty[a] = self._dirty[b] = max(self._dirty[a], self._dirty[b])


@dataclass
class Held:
    """The contents of the caches of a slot."""

    heads: list[int]
    """Number of leading positions that have all keys and values which heads 1..k need, as entry k-1."""
    tokens: list[int] = field(default_factory=list)
    """Tokens of the positions whose keys and values of the trunk are there."""
    root: int = -1
    """The token after them while a request is decoded, else -1."""
    prefilled: int = 0
    """Number of leading positions that were computed as chunks of a prompt, not in windows."""
    used: int = 0
    """Time when a request last left the slot, counted in requests."""
    salt: str = ""
    """The salt of the request that wrote the positions: only requests with the same salt may use them."""
    lost: list[tuple[int, int]] = field(default_factory=list)
    """Ranges of positions that sliding layers no longer hold, in order."""

    def usable(self, prompt: Sequence[int], heads: int, chunk: int | None, ahead: int = 0, sees: int = 0) -> int:
        """Return how many leading positions a request with this prompt can reuse.

        The last token of a prompt is never reused: it is the root of the first window. With a `chunk`, positions count
        only if their chunk was computed in the shape in which the prompt would compute it: then the bits are the same.
        Heads that read `ahead` tokens have read other tokens at the last positions. Sliding layers need the last `sees`
        positions of what is reused.
        """
        count = max(0, min(common_prefix(self.tokens, prompt[:-1]), self.heads[heads - 1]) - ahead)
        if chunk is not None:
            count = min(count, self.prefilled)
            if not count == self.prefilled == len(prompt) - 1:
                count -= count % chunk
        for start, end in reversed(self.lost):
            if start < count < end + sees:
                count = start
        return count if count >= SHORTEST else 0

    def cut(self, count: int) -> Held:
        """Return a copy that holds the first `count` positions only."""
        heads = [min(reached, count) for reached in self.heads]
        return replace(
            self,
            heads=heads,
            tokens=self.tokens[:count],
            root=-1,
            prefilled=min(self.prefilled, count),
            lost=[(start, min(end, count)) for start, end in self.lost if start < count],
        )

    def forget(self, sees: int, block: int, chunk: int) -> list[tuple[int, int]]:
        """Record which positions sliding layers may lose, in whole blocks, and return those that were not lost before.

        They keep the last `sees` positions, for the sequence itself, and those before the last whole chunk of the
        prompt, where a prompt that continues this one would start.
        """
        ends = {0: self.prefilled - self.prefilled % chunk - sees, self.prefilled: len(self.tokens) - sees}
        before, found = dict(self.lost), []
        for start, end in ends.items():
            known, end = before.get(start, start), end // block * block
            if end > known:
                found.append((known, end))
                before[start] = end
        reached = before.get(0, 0)
        self.lost = sorted((start, end) for start, end in before.items() if start == 0 or end > reached)
        return found

    def add(self, tokens: Sequence[int], heads: int) -> None:
        """Append positions that were computed with what heads 1..`heads` need."""
        before = len(self.tokens)
        self.tokens += tokens
        for k in range(heads):
            # A head that missed a position cannot use what comes after it.
            if self.heads[k] == before:
                self.heads[k] = len(self.tokens)


class Slots:
    """The contents of all slots: where a request goes, and which positions it reuses, if any (`reuse`).

    `chunk` is the number of positions of a prompt that are computed at once, where bits depend on that, else None.
    `compact`: the cost of a pass grows with the range of slots that it covers, so slots in use should be close
    together. `sees`: number of positions before its end that a reused prefix needs in sliding layers.
    """

    def __init__(
        self, count: int, config: ModelConfig, chunk: int | None, compact: bool, reuse: bool, sees: int = 0
    ) -> None:
        self.config, self.chunk, self.compact, self.reuse, self.sees = config, chunk, compact, reuse, sees
        self.held = [Held([0] * config.heads) for _ in range(count)]
        self._freed = 0

    def place(
        self, prompt: Sequence[int], heads: int, free: Sequence[int], busy: Sequence[int], salt: str = ""
    ) -> tuple[int, int]:
        """Return the free slot for a request, and the free slot to move its contents to (itself: they may be lost)."""
        worth = {slot: self._worth(slot, prompt, heads, salt) for slot in free}

        def width(slot: int) -> int:
            return max(*busy, slot) - min(*busy, slot) if busy and self.compact else 0

        slot = min(free, key=lambda slot: (width(slot), worth[slot]))
        spare = min(free, key=lambda slot: worth[slot])
        return slot, spare if worth[slot][0] and worth[spare] < worth[slot] else slot

    def _worth(self, slot: int, prompt: Sequence[int], heads: int, salt: str) -> tuple[bool, int]:
        """Return a key that orders slots by what a prompt would overwrite.

        Slots that lose nothing come first, most of the prompt first; then the others, longest unused first.
        """
        if not self.reuse:
            return False, 0
        held = self.held[slot]
        found = self._usable(held, prompt, heads, salt)
        lost = len(held.tokens) - found >= SHORTEST
        return lost, held.used if lost else -found

    def donor(self, slot: int, prompt: Sequence[int], heads: int, salt: str = "") -> tuple[int, int]:
        """Return the slot with this salt that holds most of a prompt, and how many positions; `slot` in a draw."""
        if not self.reuse:
            return slot, 0
        found = [self._usable(held, prompt, heads, salt) for held in self.held]
        best = max(found)
        return (slot, best) if found[slot] == best else (found.index(best), best)

    def swap(self, a: int, b: int) -> None:
        """Exchange the contents of two slots."""
        self.held[a], self.held[b] = self.held[b], self.held[a]

    def take(self, slot: int, donor: int, count: int, salt: str = "") -> None:
        """Record that `slot` holds the first `count` positions of `donor`, for a request with this salt."""
        self.held[slot] = replace(self.held[donor].cut(count), salt=salt)

    def filled(self, slot: int, tokens: Sequence[int], heads: int) -> None:
        """Record a chunk of a prompt that was computed."""
        held = self.held[slot]
        held.add(tokens, self._computed(heads))
        held.prefilled = len(held.tokens)

    def wrote(self, slot: int, committed: Sequence[int], heads: int) -> None:
        """Record the tokens that a pass committed: the root and all but the last of them are cached now."""
        held = self.held[slot]
        held.add([held.root, *committed[:-1]], self._computed(heads))
        held.root = committed[-1]

    def freed(self, slot: int) -> None:
        """Record that the request in `slot` has ended; its positions stay."""
        self._freed += 1
        self.held[slot].used = self._freed

    def _usable(self, held: Held, prompt: Sequence[int], heads: int, salt: str) -> int:
        return held.usable(prompt, heads, self.chunk, self.config.ahead, self.sees) if held.salt == salt else 0

    def _computed(self, heads: int) -> int:
        """Return up to which head nothing is missing where heads 1..`heads` were computed.

        Heads without blocks of their own need nothing, and anticausal heads are all on the path to head 1.
        """
        config = self.config
        own = config.head_blocks > 0 and config.wiring != "anticausal"
        return heads if own else config.heads


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many leading tokens two sequences share."""
    a, b = list(a), list(b)
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices compare at the speed of memory, tokens one by one do not
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
