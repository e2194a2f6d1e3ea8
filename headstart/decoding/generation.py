"""Generations: requests on their way, what they cost, and which drafter proposed which part of the output."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from headstart.data.tokenizers import Tokenizer
from headstart.decoding.constraints import Matcher, MinimumLength
from headstart.decoding.settings import Request
from headstart.decoding.stopping import Stopper
from headstart.decoding.window import FORCED, Origin, Window

HEAD_1 = Origin(1)
"""Origin of the tokens that no draft proposed."""


@dataclass
class Stats:
    """Costs of a generation."""

    passes: int = 0
    """Trunk passes after the prompt."""
    tokens: int = 0
    """Tokens generated, without end tokens."""
    ends: int = 0
    """Tokens that passes committed and the output omits: end tokens, and tokens that a constraint forbids."""
    drafted: list[int] = field(default_factory=list)
    """Passes with a draft of head k in the window, as entry k-2."""
    accepted: list[int] = field(default_factory=list)
    """Passes that accepted the draft of head k, as entry k-2."""
    accepted_counts: list[int] = field(default_factory=list)
    """Passes that accepted i drafts, of any drafter, as entry i."""
    looked_up: int = 0
    """Looked up drafts that were fed."""
    looked_up_accepted: int = 0
    """Looked up drafts that were accepted."""
    siblings: int = 0
    """Drafts of trees that were fed in addition to the one of each head that `drafted` counts."""
    forced: int = 0
    """Drafts that a constraint left no choice about and that were fed."""
    seconds: float = 0.0
    """Seconds from the start of prefill to the last token, with the time spent on other slots."""
    prefill_seconds: float = 0.0
    """Seconds of these in which the prompt was read."""
    prompt_tokens_reused: int = 0
    """Tokens of the prompt whose keys and values were reused from another sequence."""

    @property
    def tokens_per_pass(self) -> float:
        """Committed tokens per pass, with end tokens: exactly 1 in plain decoding."""
        return (self.tokens + self.ends) / self.passes if self.passes else 0.0

    @property
    def rows_per_pass(self) -> float:
        """Average number of rows fed: the root and drafts."""
        drafts = sum(self.drafted) + self.looked_up + self.siblings + self.forced
        return 1 + drafts / self.passes if self.passes else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated per second of `seconds`."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def acceptance(self) -> list[float]:
        """Shares of the drafts of head k that were accepted, with all before them, as entry k-2."""
        return [a / d if d else 0.0 for a, d in zip(self.accepted, self.drafted)]

    @classmethod
    def summed(cls, parts: Sequence[Stats]) -> Stats:
        """Return the sum over generations with the same number of heads."""
        return cls(
            passes=sum(part.passes for part in parts),
            tokens=sum(part.tokens for part in parts),
            ends=sum(part.ends for part in parts),
            drafted=[sum(column) for column in zip(*(part.drafted for part in parts))],
            accepted=[sum(column) for column in zip(*(part.accepted for part in parts))],
            accepted_counts=[sum(column) for column in zip_longest(*(p.accepted_counts for p in parts), fillvalue=0)],
            looked_up=sum(part.looked_up for part in parts),
            looked_up_accepted=sum(part.looked_up_accepted for part in parts),
            siblings=sum(part.siblings for part in parts),
            forced=sum(part.forced for part in parts),
            seconds=sum(part.seconds for part in parts),
            prefill_seconds=sum(part.prefill_seconds for part in parts),
            prompt_tokens_reused=sum(part.prompt_tokens_reused for part in parts),
        )

    def summary(self) -> dict[str, int | float | list[float]]:
        """Return rounded numbers, for people and for JSON."""
        return {
            "tokens": self.tokens,
            "passes": self.passes,
            "tokens_per_pass": round(self.tokens_per_pass, 3),
            "rows_per_pass": round(self.rows_per_pass, 3),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "looked_up": self.looked_up,
            "looked_up_accepted": self.looked_up_accepted,
            "forced": self.forced,
            "acceptance": [round(share, 3) for share in self.acceptance],
            "seconds": round(self.seconds, 3),
            "prefill_seconds": round(self.prefill_seconds, 3),
            "prompt_tokens_reused": self.prompt_tokens_reused,
        }


class Generation:
    """A request on its way. `tokens`, `text` and `finish_reason` grow as passes commit."""

    def __init__(self, request: Request, heads: int, stopper: Stopper) -> None:
        self.request = request
        self.heads = heads
        """Number of heads it uses, head 1 included."""
        self.stats = Stats(drafted=[0] * (heads - 1), accepted=[0] * (heads - 1))
        self.origins: list[int] = []
        """Drafter of each token: 1 for head 1, k for an accepted draft of head k, 0 for one that was looked up in the
        sequence, -1 for one that the constraint left no choice about (`Origin`)."""
        self.logprobs: list[float] = []
        """Log-probability of each token under the model, before penalties, temperature and truncation, if the request
        asks for them."""
        self.top_logprobs: list[list[tuple[int, float]]] = []
        """The most probable (token, log-probability) pairs at each token, best first."""
        self.prompt_logprobs: list[float] = []
        """Log-probabilities of the prompt's tokens from the second one on, if the request asks for them."""
        self.prompt_top_logprobs: list[list[tuple[int, float]]] = []
        """Like `top_logprobs`, for the prompt's tokens from the second one on."""
        self.slot: int | None = None
        """Slot that decodes it; None while it waits."""
        self.window = Window()
        """The drafts that the next pass may feed."""
        self._stopper = stopper
        self._started = 0.0

    @property
    def tokens(self) -> list[int]:
        """Tokens generated so far, without an end token."""
        return self._stopper.tokens

    @property
    def text(self) -> str:
        """Text released so far."""
        return self._stopper.text

    @property
    def sampled(self) -> bool:
        """True if its tokens are drawn with noise."""
        return self.request.sampling.temperature > 0

    @property
    def matcher(self) -> Matcher | MinimumLength | None:
        """The state of the request's constraint, or of its minimum length."""
        return self._stopper.matcher

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end it."""
        return self._stopper.ends

    @property
    def finish_reason(self) -> str | None:
        """Why it ended; None before (see `FinishReason`)."""
        return self._stopper.finish_reason

    @property
    def finished(self) -> bool:
        """True if it has ended."""
        return self._stopper.finish_reason is not None

    def start(self, slot: int) -> None:
        """Begin in a slot: the time counts from now on."""
        self.slot, self._started = slot, time.perf_counter()

    def commit(self, tokens: list[int], fed: int, siblings: int = 0) -> str:
        """Take the tokens of a pass: the accepted drafts, then head 1's own. Return the text that they release.

        The pass was fed the first `fed` drafts of the window, and in a tree `siblings` more of the same depths.
        """
        before, accepted = len(self.tokens), len(tokens) - 1
        drafters = self.window.drafters[:fed]
        if self.window.forced:  # of several candidates some may be forced
            for i in range(accepted):
                if tuple(tokens[: i + 1]) in self.window.forced:
                    drafters[i] = FORCED
        stats = self.stats
        for i, drafter in enumerate(drafters):
            if drafter.is_head:
                stats.drafted[drafter - 2] += 1
                stats.accepted[drafter - 2] += i < accepted
            elif drafter == FORCED:
                stats.forced += 1
            else:
                stats.looked_up += 1
                stats.looked_up_accepted += i < accepted
        stats.siblings += siblings
        stats.passes += 1
        counts = stats.accepted_counts
        counts += [0] * (accepted + 1 - len(counts))
        counts[accepted] += 1
        released = self._stopper.push(tokens)
        self.origins += [*drafters[:accepted], HEAD_1][: len(self.tokens) - before]
        stats.tokens = len(self.tokens)
        stats.ends = self._stopper.judged - len(self.tokens)
        stats.seconds = time.perf_counter() - self._started
        return released

    def keep_logprobs(self, count: int, own: list[float], best: list[list[int]], of_best: list[list[float]]) -> None:
        """Keep the log-probabilities of the first `count` tokens of a pass."""
        alternatives = self.request.logprobs or 0
        self.logprobs += own[:count]
        self.top_logprobs += [list(zip(*pair))[:alternatives] for pair in zip(best[:count], of_best[:count])]

    def keep_prompt_logprobs(self, own: list[float], best: list[list[int]], of_best: list[list[float]]) -> None:
        """Keep the log-probabilities of the next tokens of the prompt."""
        self.prompt_logprobs += own
        self.prompt_top_logprobs += [list(zip(*pair)) for pair in zip(best, of_best)]

    def cancel(self) -> str:
        """End it where it is; return the text that this releases."""
        return self._stopper.cancel()


class OriginStream:
    """Splits the released text of a generation into pieces by origin, see `Generation.origins`.

    A character that takes several tokens belongs to the origin of its last one.
    """

    def __init__(self, generation: Generation, tokenizer: Tokenizer) -> None:
        self.generation = generation
        request = generation.request
        self._stream = request.text_stream(tokenizer)
        self._tokens = self._characters = 0
        self._waiting: list[tuple[str, int]] = []  # of tokens whose text may be part of a stop string

    def new(self) -> list[tuple[str, int]]:
        """Return (text, origin) pieces of what was released since the last call."""
        generation = self.generation
        for token, head in zip(generation.tokens[self._tokens :], generation.origins[self._tokens :]):
            self._waiting += [(character, head) for character in self._stream.push([token])]
        self._tokens = len(generation.tokens)
        if generation.finished:
            self._waiting += [(character, 1) for character in self._stream.finish()]
        count = len(generation.text) - self._characters
        released, self._waiting = self._waiting[:count], self._waiting[count:]
        self._characters += len(released)
        groups = itertools.groupby(released, key=lambda pair: pair[1])
        return [("".join(character for character, _ in group), head) for head, group in groups]
