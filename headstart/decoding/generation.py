"""Generations: requests on their way, what they cost, and which drafter proposed which part of the output."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from headstart.data.detokenizer import TextStream
from headstart.data.tokenizers import Tokenizer
from headstart.decoding.constraints import Matcher
from headstart.decoding.drafters.lookup import Lookup
from headstart.decoding.drafters.tree import DraftTree
from headstart.decoding.settings import Request
from headstart.decoding.stopping import Stopper

FORCED = -1
"""Stands for the head of a draft that the constraint left no choice about."""


@dataclass
class Stats:
    """What a generation cost."""

    passes: int = 0
    """Trunk passes after the prompt."""
    tokens: int = 0
    """Tokens generated."""
    ends: int = 0
    """Tokens that passes committed and the output leaves out: end tokens, and those that a constraint forbids."""
    drafted: list[int] = field(default_factory=list)
    """Entry k-2: passes in which head k had a draft in the window."""
    accepted: list[int] = field(default_factory=list)
    """Entry k-2: passes in which the draft of head k was accepted."""
    looked_up: int = 0
    """Drafts that were looked up in the text itself and fed."""
    looked_up_accepted: int = 0
    beside: int = 0
    """Drafts of trees that were fed beside those counted in `drafted`, of which there is one of each head."""
    forced: int = 0
    """Drafts that a constraint left no choice about, and fed."""
    seconds: float = 0.0
    """From the prompt's prefill to the last token, waiting for other slots included."""
    prefill_seconds: float = 0.0
    """Of these, those in which this prompt was read."""
    prompt_tokens_reused: int = 0
    """Tokens of the prompt whose keys and values were there already, of another text in a slot."""

    @property
    def tokens_per_pass(self) -> float:
        """Committed tokens per pass, end tokens included: exactly 1 in plain decoding."""
        return (self.tokens + self.ends) / self.passes if self.passes else 0.0

    @property
    def rows_per_pass(self) -> float:
        """Rows fed on average: the root and drafts."""
        drafts = sum(self.drafted) + self.looked_up + self.beside + self.forced
        return 1 + drafts / self.passes if self.passes else 0.0

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
            ends=sum(part.ends for part in parts),
            drafted=[sum(column) for column in zip(*(part.drafted for part in parts))],
            accepted=[sum(column) for column in zip(*(part.accepted for part in parts))],
            looked_up=sum(part.looked_up for part in parts),
            looked_up_accepted=sum(part.looked_up_accepted for part in parts),
            beside=sum(part.beside for part in parts),
            forced=sum(part.forced for part in parts),
            seconds=sum(part.seconds for part in parts),
            prefill_seconds=sum(part.prefill_seconds for part in parts),
            prompt_tokens_reused=sum(part.prompt_tokens_reused for part in parts),
        )

    def summary(self) -> dict[str, int | float | list[float]]:
        """Rounded, for people and for JSON."""
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
        self.stats = Stats(drafted=[0] * (heads - 1), accepted=[0] * (heads - 1))
        self.origins: list[int] = []
        """For each token the head that proposed it: 1 for head 1, k for an accepted draft of head k, 0 for one that was
        looked up in the text, -1 (`FORCED`) for one that the constraint left no choice about."""
        self.logprobs: list[float] = []
        """For each token its log-probability under the model, before penalties, temperature and truncation; where the
        request asks for them."""
        self.top_logprobs: list[list[tuple[int, float]]] = []
        """For each token the (token, log-probability) of the most probable ones, best first."""
        self.prompt_logprobs: list[float] = []
        """Log-probabilities of the prompt's tokens from the second one on, where the request asks for them."""
        self.prompt_top_logprobs: list[list[tuple[int, float]]] = []
        """Like `top_logprobs`, for the prompt's tokens from the second one on."""
        self.slot: int | None = None
        self.sources: list[int] = []
        """For each draft in its window, or depth of its tree, the head that proposed it; 0 where it was looked up,
        `FORCED` where nothing else may stand."""
        self.confidences: list[float] = []
        """Of the drafts in its window, in a tree of the best of each head; empty where there are none, or where nothing
        asks for them."""
        self.nodes: dict[int, int] | None = None
        """Of a tree under a constraint, the rows that hold drafts, with their depths; of others None, for all do."""
        self.forced: set[tuple[int, ...]] = set()
        """The beginnings of drafts of which the last one was forced."""
        self.prefixes: list[float] = []
        """Entry j-1: the probability that the first j drafts in its window are right, in a tree that the path to node j
        is; where something estimates it."""
        self.lookup: Lookup | None = None
        self.match = 0
        """Length of the match that the looked up drafts in its window are from."""
        self._stopper = stopper
        self._started = 0.0

    @property
    def tokens(self) -> list[int]:
        return self._stopper.tokens

    @property
    def text(self) -> str:
        return self._stopper.text

    @property
    def sampled(self) -> bool:
        return self.request.sampling.temperature > 0

    @property
    def matcher(self) -> Matcher | None:
        """Where the text stands in the request's constraint."""
        return self._stopper.matcher

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end it."""
        return self._stopper.ends

    @property
    def finish_reason(self) -> str | None:
        return self._stopper.finish_reason

    @property
    def finished(self) -> bool:
        return self._stopper.finish_reason is not None

    def fed(self, rows: int, tree: DraftTree | None) -> tuple[int, int]:
        """Of how many drafts, or depths of a tree, one was fed with the first `rows` rows of the window, and how many
        more beside those."""
        if tree is None:
            return min(len(self.sources), rows - 1), 0
        if self.nodes is None:
            fed = min(len(self.sources), tree.depth)
            return fed, tree.within(rows, fed) - fed
        depths = [depth for row, depth in self.nodes.items() if row < rows]
        fed = max(depths, default=0)
        return fed, len(depths) - fed

    def commit(self, tokens: list[int], fed: int, beside: int = 0) -> str:
        """Takes the tokens of one pass that was fed the first `fed` drafts, and in a tree `beside` more of the same
        depths: those accepted, then head 1's own token."""
        before, accepted = len(self.tokens), len(tokens) - 1
        sources = self.sources[:fed]
        for i in range(accepted if self.forced else 0):  # of several candidates some may be forced
            if tuple(tokens[: i + 1]) in self.forced:
                sources[i] = FORCED
        for i, head in enumerate(sources):
            if head > 0:
                self.stats.drafted[head - 2] += 1
                self.stats.accepted[head - 2] += i < accepted
            elif head == FORCED:
                self.stats.forced += 1
            else:
                self.stats.looked_up += 1
                self.stats.looked_up_accepted += i < accepted
        self.stats.beside += beside
        self.stats.passes += 1
        released = self._stopper.push(tokens)
        self.origins += [*sources[:accepted], 1][: len(self.tokens) - before]
        self.stats.tokens = len(self.tokens)
        self.stats.ends = self._stopper.judged - len(self.tokens)
        self.stats.seconds = time.perf_counter() - self._started
        return released

    def keep_logprobs(self, count: int, own: list[float], best: list[list[int]], of_best: list[list[float]]) -> None:
        """Keeps the log-probabilities of the first `count` tokens of a pass."""
        alternatives = self.request.logprobs or 0
        self.logprobs += own[:count]
        self.top_logprobs += [list(zip(*pair))[:alternatives] for pair in zip(best[:count], of_best[:count])]

    def keep_prompt_logprobs(self, own: list[float], best: list[list[int]], of_best: list[list[float]]) -> None:
        """Keep the log-probabilities of the next tokens of the prompt."""
        self.prompt_logprobs += own
        self.prompt_top_logprobs += [list(zip(*pair)) for pair in zip(best, of_best)]

    def cancel(self) -> str:
        return self._stopper.cancel()


class OriginStream:
    """The released text of a generation as it grows, in pieces of one head each: 1, or k for accepted drafts of head k.

    A character that takes several tokens belongs to the head of its last one.
    """

    def __init__(self, generation: Generation, tokenizer: Tokenizer) -> None:
        self.generation = generation
        request = generation.request
        self._stream = TextStream(tokenizer, request.prompt, keep_space=request.constraint is not None)
        self._tokens = self._characters = 0
        self._waiting: list[tuple[str, int]] = []  # of tokens whose text is held back: it may be that of a stop string

    def new(self) -> list[tuple[str, int]]:
        """What was released since the last call."""
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
