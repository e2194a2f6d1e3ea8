"""The engine: slots, each at its own length, decoded together pass by pass. Everything that generates runs on it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from headstart.data.tokenizers import Tokenizer
from headstart.decoding.acceptance import Rule
from headstart.decoding.packing import is_row_exact
from headstart.decoding.policy import DraftPolicy
from headstart.decoding.sampling import Sampling
from headstart.decoding.step import DecodingState, decode_step, prefill
from headstart.decoding.stopping import Stopper
from headstart.errors import UsageError
from headstart.model.transformer import Transformer

EXACT_SPAN = 512
"""Exact decoding reads keys and values in multiples of this many positions: the block of torch's CPU attention. With
spans inside a block the last bits of a row depend on the span, hence on where its window happened to start; whole
blocks of masked positions add exactly nothing (docs/lab-notes.md)."""
SPAN = 64


@dataclass(frozen=True)
class Request:
    """One text to generate."""

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    heads: int | None = None
    """K: how many heads to use, head 1 included (None: as many as the engine's policy finds worth it, without a policy
    all the model has; 1: plain decoding)."""
    acceptance: Rule = field(default_factory=Rule)
    """Which drafts are kept."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""


@dataclass
class Stats:
    """What a generation cost."""

    passes: int = 0
    """Trunk passes after the prompt."""
    tokens: int = 0
    """Tokens generated."""
    drafted: list[int] = field(default_factory=list)
    """Entry k-2: passes in which head k had a draft in the window."""
    accepted: list[int] = field(default_factory=list)
    """Entry k-2: passes in which the draft of head k was accepted."""
    seconds: float = 0.0
    """From the prompt's prefill to the last token, waiting for other slots included."""
    prefill_seconds: float = 0.0

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / self.passes if self.passes else 0.0

    @property
    def rows_per_pass(self) -> float:
        """Rows fed on average: the root and drafts."""
        return 1 + sum(self.drafted) / self.passes if self.passes else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def acceptance(self) -> list[float]:
        """Entry k-2: the share of head k's drafts that were accepted (with all before them)."""
        return [a / d if d else 0.0 for a, d in zip(self.accepted, self.drafted)]

    @classmethod
    def summed(cls, parts: Sequence[Stats]) -> Stats:
        """Of several generations with the same number of heads."""
        return cls(
            passes=sum(part.passes for part in parts),
            tokens=sum(part.tokens for part in parts),
            drafted=[sum(column) for column in zip(*(part.drafted for part in parts))],
            accepted=[sum(column) for column in zip(*(part.accepted for part in parts))],
            seconds=sum(part.seconds for part in parts),
            prefill_seconds=sum(part.prefill_seconds for part in parts),
        )

    def summary(self) -> dict[str, int | float | list[float]]:
        """Rounded, for people and for JSON."""
        return {
            "tokens": self.tokens,
            "passes": self.passes,
            "tokens_per_pass": round(self.tokens_per_pass, 3),
            "rows_per_pass": round(self.rows_per_pass, 3),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "acceptance": [round(share, 3) for share in self.acceptance],
            "seconds": round(self.seconds, 3),
            "prefill_seconds": round(self.prefill_seconds, 3),
        }


class Generation:
    """A request on its way. `tokens`, `text` and `finish_reason` grow as passes commit."""

    def __init__(self, request: Request, heads: int, stopper: Stopper) -> None:
        self.request = request
        self.heads = heads
        self.stats = Stats(drafted=[0] * (heads - 1), accepted=[0] * (heads - 1))
        self.origins: list[int] = []
        """For each token the head that proposed it: 1 for head 1, k for an accepted draft of head k."""
        self.slot: int | None = None
        self.confidences: list[float] = []
        """Of the drafts in its window; empty where there are none, or where the engine has no policy."""
        self._drafts = 0  # in its window
        self._stopper = stopper
        self._started = 0.0

    @property
    def tokens(self) -> list[int]:
        return self._stopper.tokens

    @property
    def text(self) -> str:
        return self._stopper.text

    @property
    def finish_reason(self) -> str | None:
        return self._stopper.finish_reason

    @property
    def finished(self) -> bool:
        return self._stopper.finish_reason is not None

    def commit(self, tokens: list[int]) -> str:
        """Takes the tokens of one pass: accepted drafts of heads 2, 3, ... and then head 1's own token."""
        before = len(self.tokens)
        released = self._stopper.push(tokens)
        self.origins += [*range(2, len(tokens) + 1), 1][: len(self.tokens) - before]
        self.stats.tokens = len(self.tokens)
        self.stats.seconds = time.perf_counter() - self._started
        return released

    def cancel(self) -> str:
        return self._stopper.cancel()


class Engine:
    """Decodes up to `slots` requests at once; more wait in a queue.

    Args:
        model: in decoding form (`packing.pack`).
        slots: rows of the caches.
        context: most positions a request may reach (default: the model's).
        exact: True: a request's output is bit for bit the same for every number of heads. With the compiled kernels
            that costs nothing, and holds for every batch too. Elsewhere it fixes the shapes of a pass: all n rows of
            a window, all slots, whole attention blocks. False makes every pass as small as it can be: faster with few
            heads, equal up to rounding.
        deferred: see `decode_step`.
        policy: chooses the rows of each pass for requests that do not name a number of heads. Where `exact` fixes the
            shapes it has nothing to choose, and is left out.
        watch: called after each pass over drafts of which the confidence is known, with the generation, how many were
            fed and how many accepted. (`generation.confidences` are still those of the drafts fed.) It makes the engine
            ask for confidences without a policy too.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        slots: int = 1,
        context: int | None = None,
        tokenizer: Tokenizer | None = None,
        exact: bool = True,
        deferred: bool = True,
        policy: DraftPolicy | None = None,
        watch: Callable[[Generation, int, int], None] | None = None,
    ) -> None:
        if slots < 1:
            raise UsageError(f"an engine needs at least one slot, not {slots}")
        self.model, self.tokenizer, self.exact, self.deferred = model, tokenizer, exact, deferred
        self.context = context or model.config.context
        self.fixed_shapes = exact and not is_row_exact(model)
        self.policy = None if self.fixed_shapes or model.config.heads == 1 else policy
        self.watch = watch
        self.step_span = EXACT_SPAN if self.fixed_shapes else SPAN
        self.state = DecodingState.empty(model, slots, _round_up(self.context + model.config.heads, self.step_span))
        self._live: list[Generation | None] = [None] * slots
        self._lengths = [0] * slots
        self._waiting: deque[Generation] = deque()

    def submit(self, request: Request) -> Generation:
        """Queues a request. Raises UsageError if it does not fit this model."""
        config = self.model.config
        heads = config.heads if request.heads is None else request.heads
        if not 1 <= heads <= config.heads:
            raise UsageError(f"heads is {heads}; this model has {config.heads}, take 1 (plain decoding) to that many")
        if not request.prompt:
            raise UsageError("the prompt is empty; give at least one token (to start a document, its end token)")
        if request.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {request.max_new_tokens}; it must be at least 1")
        if len(request.prompt) >= self.context:
            raise UsageError(
                f"the prompt has {len(request.prompt)} tokens; the context is {self.context}, which must also hold "
                "what is generated: shorten the prompt"
            )
        largest, smallest = max(request.prompt), min(request.prompt)
        if smallest < 0 or largest >= config.vocab_size:
            bad = smallest if smallest < 0 else largest
            raise UsageError(f"the prompt holds token {bad}; this model's vocabulary has {config.vocab_size} tokens")
        room = self.context - len(request.prompt)
        end_id = None if self.tokenizer is None else self.tokenizer.end_id
        stopper = Stopper(min(request.max_new_tokens, room), end_id, request.stop, self.tokenizer)
        generation = Generation(request, heads, stopper)
        self._waiting.append(generation)
        return generation

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or any(self._live)

    @torch.no_grad()
    def step(self) -> list[tuple[Generation, str]]:
        """Admits what fits, runs one pass over the live slots, and returns what each committed (its released text)."""
        self._admit()
        live = [(slot, g) for slot, g in enumerate(self._live) if g is not None]
        if not live:
            return []
        last = len(self._live) if self.fixed_shapes else live[-1][0] + 1
        rows, heads = self._shape([g for _, g in live], last)
        slots = slice(0, last)
        # Slots between the live ones run along on what they last held; their results are never read.
        starts = self._lengths[slots]
        confident = heads > 1 and (self.policy is not None or self.watch is not None)
        tokens_SW, accepted_S = decode_step(
            self.model,
            self.state,
            slots,
            rows=rows,
            heads=heads,
            span=min(_round_up(max(starts) + rows, self.step_span), self.state.cache.capacity),
            starts=starts,
            deferred=self.deferred,
            confident=confident,
        )
        tokens, accepted = tokens_SW.tolist(), accepted_S.tolist()
        confidences = self.state.confidence_SK[slots].tolist() if confident else []
        results, total = [], 0
        for slot, generation in live:
            committed = tokens[slot][: accepted[slot] + 1]
            self._lengths[slot] += len(committed)
            total += len(committed)
            fed = min(generation._drafts, rows - 1)
            if self.watch is not None and generation.confidences and fed:
                self.watch(generation, fed, accepted[slot])
            stats = generation.stats
            for i in range(fed):
                stats.drafted[i] += 1
                stats.accepted[i] += i < accepted[slot]
            stats.passes += 1
            generation._drafts = min(generation.heads, heads) - 1
            generation.confidences = confidences[slot][: generation._drafts] if confident else []
            if heads < generation.heads and self.model.config.head_kind == "transformer":
                # Its drafting heads have missed these positions, and would draft from caches with holes.
                generation.heads = heads
                self.state.heads_S[slot] = heads
            results.append((generation, generation.commit(committed)))
        if self.policy is not None:
            self.policy.saw(last, len(live), rows, heads > 1, total)
        for slot in range(last):
            generation_or_none = self._live[slot]
            if generation_or_none is None or generation_or_none.finished:
                self._free(slot)
        return results

    def _shape(self, live: list[Generation], slots: int) -> tuple[int, int]:
        """Rows and heads of the next pass."""
        n = self.model.config.heads
        fixed = max((g.heads for g in live if self.policy is None or g.request.heads is not None), default=1)
        if self.fixed_shapes:
            return n, fixed
        free = [g for g in live if self.policy is not None and g.request.heads is None and g.heads > 1]
        if self.policy is None or not free:
            return fixed, fixed
        windows = [(g.request.sampling.temperature > 0, g.confidences) for g in free]
        rows, drafting = self.policy.plan(slots, windows)
        return max(rows, fixed), max(fixed, *(g.heads for g in free)) if drafting else fixed

    def run(self) -> Iterator[tuple[Generation, str]]:
        """Steps until nothing is left."""
        while self.busy:
            yield from self.step()

    def cancel(self, generation: Generation) -> None:
        """Ends a request now: it leaves the queue, or its slot is free for the next step."""
        generation.cancel()
        if generation in self._waiting:
            self._waiting.remove(generation)
        elif generation.slot is not None:
            self._free(generation.slot)

    def _free(self, slot: int) -> None:
        self._live[slot] = None
        # An idle slot stands at position 0, so that it never lengthens the span nor runs over its buffer.
        self._lengths[slot] = 0
        self.state.length_S[slot] = 0
        self.state.drafted_S[slot] = 0

    def _admit(self) -> None:
        for slot, occupant in enumerate(self._live):
            if occupant is not None or not self._waiting:
                continue
            generation = self._waiting.popleft()
            generation.slot = slot
            generation._started = time.perf_counter()
            self._live[slot] = generation
            self._start(slot, generation.request, generation.heads)
            generation.stats.prefill_seconds = time.perf_counter() - generation._started

    def _start(self, slot: int, request: Request, heads: int) -> None:
        """The prompt but its last token goes to the caches; the last one is the root of the first window."""
        state = self.state
        prompt = torch.tensor(request.prompt, device=state.length_S.device)
        prefill(self.model, state, slot, prompt[:-1], heads)
        state.length_S[slot] = self._lengths[slot] = len(prompt) - 1
        state.window_SW[slot] = 0
        state.window_SW[slot, 0] = prompt[-1]
        state.drafted_S[slot] = 0
        state.heads_S[slot] = heads
        state.sampling.set(slot, request.sampling, request.acceptance)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def generate_all(engine: Engine, requests: Sequence[Request]) -> list[Generation]:
    """Runs `requests` to their ends; results in the order given."""
    generations = [engine.submit(request) for request in requests]
    for _ in engine.run():
        pass
    return generations
