"""Drafts without a model: what followed the last tokens where they stood before in the same text (prompt lookup).

They cost a dictionary and a row of a window, so they help a model without drafting heads, and where a text repeats long
pieces of itself (code that is edited, quotations, tables) they outrun any head.
"""

from __future__ import annotations

from collections.abc import Sequence

SIZES = (16, 8, 4, 2)
"""Lengths of the matches tried, longest first."""
MOST_LOOKUP = 1024
"""Drafts of a pass that may be looked up; a window of so many rows costs far more than they can bring."""


class Lookup:
    """The text of one generation, and where each run of `SIZES` tokens in it went on last."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self.push(tokens)

    def push(self, tokens: Sequence[int]) -> None:
        """The text goes on with `tokens`."""
        for token in tokens:
            # Runs that end before this token now have something after them; the end of the text itself has not.
            end = len(self.tokens)
            for size in SIZES:
                if size <= end:
                    self._after[tuple(self.tokens[end - size : end])] = end
            self.tokens.append(token)

    def drafts(self, beyond: Sequence[int], count: int) -> tuple[list[int], int]:
        """At most `count` tokens that followed the longest earlier match of the end of the text and then `beyond`, and
        the length of the match (0, and no tokens, where there is none)."""
        if count < 1:
            return [], 0
        end = [*self.tokens[-SIZES[0] :], *beyond]
        for size in SIZES:
            at = self._after.get(tuple(end[-size:])) if size <= len(end) else None
            if at is not None:
                found = self.tokens[at : at + count]
                # A match near the end is a loop: it goes on with what it drafts.
                period = len(self.tokens) + len(beyond) - at
                text = [*self.tokens[at:], *beyond]
                while len(found) < count:
                    found.append(text[len(found)] if len(found) < len(text) else found[len(found) - period])
                return found, size
        return [], 0


class Odds:
    """How often drafts of a match of each size were right, of late; of all generations of an engine."""

    MEMORY = 0.98

    def __init__(self) -> None:
        self._right = {size: 1.5 + 0.5 * i for i, size in enumerate(reversed(SIZES))}
        self._seen = dict.fromkeys(SIZES, 4.0)

    def of(self, size: int) -> float:
        """That a draft is right where those before it are."""
        return self._right[size] / self._seen[size]

    def saw(self, size: int, fed: int, accepted: int) -> None:
        """`fed` drafts of one match were judged, the first `accepted` of them right."""
        judged = min(fed, accepted + 1)
        self._right[size] = self.MEMORY**judged * self._right[size] + accepted
        self._seen[size] = self.MEMORY**judged * self._seen[size] + judged
