"""From the queue into a slot: which request is next, where it goes, and its prompt chunk by chunk."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from headstart.decoding.decode_pass import DecodingState, prefill
from headstart.decoding.generation import Generation
from headstart.decoding.sampling import log_probabilities
from headstart.decoding.slots import Slots
from headstart.errors import UsageError
from headstart.model.transformer import Transformer

SCORED = 32
"""Most positions of a prompt whose logits exist at once, where its log-probabilities are asked for."""
CHUNK = 256
"""Most positions of a prompt that are computed at once."""


class Admission:
    """Requests that wait, and those whose prompts are being read. First come, first served.

    Args:
        budget: most prompt tokens of one `fill` (None: no limit).
        reuse: whether prompts go on from what slots hold of them.
        fixed_shapes: whether bits depend on the shape of a chunk. Then a prompt is cut into equal chunks from its
            start, whatever else there is to do; otherwise a chunk is what the budget leaves.
    """

    def __init__(
        self, model: Transformer, state: DecodingState, *, budget: int | None, reuse: bool, fixed_shapes: bool
    ) -> None:
        if budget is not None and budget < 1:
            raise UsageError(f"prefill_budget is {budget}; it must be at least 1 token a step, or None for no limit")
        self.model, self.state, self.budget, self.fixed_shapes = model, state, budget, fixed_shapes
        self.chunk = CHUNK if budget is None else min(CHUNK, budget)
        count = len(state.length_S)
        self.slots = Slots(count, model.config, self.chunk if fixed_shapes else None, not fixed_shapes, reuse)
        self.waiting: deque[Generation] = deque()
        self.filling: dict[int, Generation] = {}
        """By slot, in the order of their turns."""
        self._turn: Generation | None = None
        self._dirty = [0] * count
        """Position from which on the rows of a slot that is free are as they were made."""

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.filling)

    def admit(self, live: list[int]) -> None:
        """Gives the free slots to those who wait longest; `live` are those being decoded."""
        while self.waiting:
            busy = [*live, *self.filling]
            free = [slot for slot in range(len(self._dirty)) if slot not in busy]
            if not free:
                return
            generation = self.waiting.popleft()
            request = generation.request
            slot, spare = self.slots.place(request.prompt, generation.heads, free, busy, request.cache_salt)
            if spare != slot:
                self._swap(slot, spare)
            generation.slot = slot
            generation._started = time.perf_counter()
            self.filling[slot] = generation

    def fill(self) -> list[tuple[int, Generation]]:
        """Reads prompts as far as the budget goes. Returns those that are read, with their slots; they leave."""
        left, ready = self.budget, []
        while self.filling:
            slot, generation = next(iter(self.filling.items()))
            prompt, began = generation.request.prompt, time.perf_counter()
            if generation is not self._turn:
                # Not before its turn: by then those before it may have read the same text.
                self._turn = generation
                self._reuse(slot, generation)
            start = len(self.slots.held[slot].tokens)
            size = min(self.chunk, len(prompt) - 1 - start)
            if left is not None:
                if size > left and (self.fixed_shapes or left == 0):
                    break
                size = min(size, left)
                left -= size
            if size:
                piece = prompt[start : start + size]
                tokens, root = torch.tensor(prompt[start : start + size + 1], device=self.state.length_S.device).split(
                    [size, 1]
                )
                first = generation.stats.prompt_tokens_reused
                prefill(
                    self.model, self.state, slot, tokens, generation.heads,
                    chunk=size, start=start, root=root, first=first, read=self._scoring(generation, start),
                )  # fmt: skip
                self.slots.filled(slot, piece, generation.heads)
            if start + size == len(prompt) - 1:
                self.slots.held[slot].root = prompt[-1]
                ready.append((slot, self.filling.pop(slot)))
            generation.stats.prefill_seconds += time.perf_counter() - began
        return ready

    def _scoring(self, generation: Generation, start: int) -> Callable[[Tensor], None] | None:
        """Return the function that scores a chunk of the prompt from position `start` on, if that is asked for."""
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

    def remove(self, generation: Generation) -> bool:
        """A request that is cancelled before its first pass leaves; what was read of its prompt stays in the slot.
        False if it is not here."""
        if generation in self.waiting:
            self.waiting.remove(generation)
        elif generation.slot is not None and self.filling.get(generation.slot) is generation:
            del self.filling[generation.slot]
            self.left(generation.slot)
        else:
            return False
        return True

    def left(self, slot: int) -> None:
        """A request has left `slot`."""
        self.slots.freed(slot)
        # A window reaches beyond what was kept of it.
        self._dirty[slot] = len(self.slots.held[slot].tokens) - self.state.parked

    def _reuse(self, slot: int, generation: Generation) -> None:
        """Brings the rows of other texts that a prompt begins with into its slot, and clears those that it will not
        use."""
        cache, request = self.state.cache, generation.request
        donor, count = self.slots.donor(slot, request.prompt, generation.heads, request.cache_salt)
        if request.prompt_logprobs is not None:
            donor, count = slot, 0  # scores need the latents of every position
        if donor != slot:
            cache.copy(donor, slot, count)
        self.slots.take(slot, donor, count, request.cache_salt)
        # Attention multiplies masked rows by 0, and 0 x NaN is NaN: a text that overflowed must not reach the next one.
        cache.clear(slot, count, self._dirty[slot])
        cache.clear(slot, cache.capacity + self.state.parked, cache.capacity)
        self._dirty[slot] = 0
        generation.stats.prompt_tokens_reused = count

    def _swap(self, a: int, b: int) -> None:
        """What two free slots hold changes places."""
        self.state.cache.swap(a, b, *(len(self.slots.held[slot].tokens) for slot in (a, b)))
        self.slots.swap(a, b)
        self._dirty[a] = self._dirty[b] = max(self._dirty[a], self._dirty[b])
