"""Prompt lookup: drafts without a model, copied from where the last tokens stood before in the same sequence.

They cost a dictionary and a row of a window. They help models without drafting heads, and sequences that repeat long
pieces of themselves (edited code, quotations, tables).
"""

from __future__ import annotations

from collections.abc import Sequence

from headstart.decoding.drafters.interface import HostDrafter, Turn
from headstart.decoding.engine_config import EngineConfig
from headstart.decoding.window import LOOKUP, Window

SIZES = (16, 8, 4, 2)
"""Lengths of matches to try, longest first."""


class Lookup:
    """The tokens of one sequence, and what followed each run of `SIZES` tokens in it last."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self.push(tokens)

    def push(self, tokens: Sequence[int]) -> None:
        """Append `tokens` to the sequence."""
        for token in tokens:
            # Runs that end before this token now have a successor; the end of the sequence itself has none.
            end = len(self.tokens)
            for size in SIZES:
                if size <= end:
                    self._after[tuple(self.tokens[end - size : end])] = end
            self.tokens.append(token)

    def drafts(self, beyond: Sequence[int], count: int) -> tuple[list[int], int]:
        """Return what followed the longest earlier match of the sequence's end and `beyond`, and the match's length.

        At most `count` tokens; none, and length 0, without a match.
        """
        if count < 1:
            return [], 0
        end = [*self.tokens[-SIZES[0] :], *beyond]
        for size in SIZES:
            at = self._after.get(tuple(end[-size:])) if size <= len(end) else None
            if at is not None:
                found = self.tokens[at : at + count]
                # A match near the end is a loop: it continues with its own drafts.
                period = len(self.tokens) + len(beyond) - at
                text = [*self.tokens[at:], *beyond]
                while len(found) < count:
                    found.append(text[len(found)] if len(found) < len(text) else found[len(found) - period])
                return found, size
        return [], 0


class Odds:
    """Recent acceptance rates of looked up drafts, by the length of their match, over all generations of an engine."""

    MEMORY = 0.98

    def __init__(self) -> None:
        self._right = {size: 1.5 + 0.5 * i for i, size in enumerate(reversed(SIZES))}
        self._seen = dict.fromkeys(SIZES, 4.0)

    def of(self, size: int) -> float:
        """Return the probability that a draft is right where those before it are."""
        return self._right[size] / self._seen[size]

    def saw(self, size: int, fed: int, accepted: int) -> None:
        """Record that of `fed` drafts of one match the first `accepted` were right."""
        judged = min(fed, accepted + 1)
        self._right[size] = self.MEMORY**judged * self._right[size] + accepted
        self._seen[size] = self.MEMORY**judged * self._seen[size] + judged


class PromptLookup(HostDrafter):
    """Puts looked up drafts into windows, in place of those of heads or after them."""

    reads_tokens = True

    def __init__(self, slots: int, most: int) -> None:
        self.most = most
        self.odds = Odds()
        self._sequences = [Lookup(()) for _ in range(slots)]

    @classmethod
    def make(cls, config: EngineConfig) -> PromptLookup | None:
        """Return the drafter if `lookup` asks for drafts."""
        return cls(config.slots, config.lookup) if config.lookup else None

    @classmethod
    def rows(cls, config: EngineConfig) -> int:
        """Return the most drafts of a window."""
        return config.lookup

    def begin(self, slot: int, prompt: Sequence[int]) -> None:
        """Index the prompt of the request that begins in `slot`."""
        self._sequences[slot] = Lookup(prompt)

    def propose(self, turn: Turn) -> None:
        """Look up drafts in place of those of heads, or after them, whichever is expected to bring more tokens."""
        if not turn.committed:  # decoding begins: the prompt is indexed, and nothing says yet how well heads do
            return
        generation, window = turn.generation, turn.generation.window
        lookup, heads = self._sequences[turn.slot], len(window.drafters)
        lookup.push(turn.committed)
        stats = generation.stats
        ahead = window.chances or [(a + 0.5) / (d + 1) for a, d in zip(stats.accepted[:heads], stats.drafted[:heads])]
        # Where drafts are weighed, what is fed must not depend on which drafts were drawn, so nothing follows those.
        weighs = generation.request.acceptance.weighs
        options = []
        for own in sorted({0, heads}):
            most = 0 if weighs and own else min(self.most, turn.rows - 1 - own)
            drafts, size = lookup.drafts(turn.tokens[1 : 1 + own], most)
            chance = self.odds.of(size) if size else 0.0
            reached = ahead[own - 1] if own else 1.0
            chances = ahead[:own] + [reached * chance**j for j in range(1, len(drafts) + 1)]
            options.append((sum(chances), own, drafts, size, chances))
        _, own, drafts, window.match, window.chances = max(options, key=lambda option: option[0])
        window.drafters = window.drafters[:own] + [LOOKUP] * len(drafts)
        window.confidences = window.confidences[:own]
        if drafts:
            certain = not turn.state.sampling.plain_rules(slice(turn.slot, turn.slot + 1))
            turn.state.windows.replace(turn.slot, own, drafts, certain)

    def learn(self, window: Window, fed: int, accepted: int) -> None:
        """Record how many looked up drafts were right, where all drafts of heads before them were."""
        if window.match and fed > 0 and accepted >= 0:
            self.odds.saw(window.match, fed, accepted)
