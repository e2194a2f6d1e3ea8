"""The end of a generation: end tokens, token limit, stop strings, a constraint. Exact anywhere inside a pass."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from headstart.data.detokenizer import TextStream
from headstart.data.tokenizers import Tokenizer
from headstart.decoding.constraints import Matcher, MinimumLength
from headstart.errors import UsageError

FinishReason = Literal["end", "length", "stop", "cancelled", "stuck"]
"""Reasons why a generation ends. end: an end token, or a constraint that is satisfied and allows nothing more. stuck: a
constraint that allows no token, and not the end either."""


def stop_strings(given: Any) -> tuple[str, ...]:
    """Return stop strings as a tuple: none of None, one of a string. Raise UsageError for anything but strings."""
    if given is None:
        return ()
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, Sequence) or any(not isinstance(each, str) for each in given):
        raise UsageError(f"stop is {str(given)[:60]!r}; give a string, a list of strings, or None")
    return tuple(given)


class Stopper:
    """Takes the tokens of one generation as they are committed, keeps those before the end, and releases their text.

    It judges tokens one by one, so the end does not depend on how many a pass commits. Text that may be the beginning
    of a stop string is held back until that is decided; the stop string itself is released with `keep_stop` only.
    Tokens of `ends` are not kept. The `matcher` of a constraint is advanced by the tokens kept. `stream` decodes the
    tokens; without it the text begins with the first of them.
    """

    def __init__(
        self,
        max_new_tokens: int,
        ends: Collection[int] = (),
        stop: Sequence[str] = (),
        tokenizer: Tokenizer | None = None,
        matcher: Matcher | MinimumLength | None = None,
        stream: TextStream | None = None,
    ) -> None:
        if stop and tokenizer is None:
            raise UsageError("stop strings need a tokenizer; this model directory has none, stop by tokens instead")
        if any(not s for s in stop):
            raise UsageError("a stop string is empty; leave it out")
        self.remaining = max_new_tokens
        self.ends = frozenset(ends)
        self.stop = tuple(stop)
        self.keep_stop = False
        self.least = 0
        """Number of tokens before which no stop string is looked for."""
        self.stop_tokens: frozenset[int] = frozenset()
        """Tokens that end the generation and are kept."""
        self.matcher = matcher
        self.tokens: list[int] = []
        self.judged = 0
        """Number of tokens judged: those kept, and an end that is not kept."""
        self.text = ""
        """Released text so far."""
        self.finish_reason: FinishReason | None = None
        self._stream = stream or (None if tokenizer is None else TextStream(tokenizer, keep_space=matcher is not None))
        self._held = ""

    def push(self, tokens: Sequence[int]) -> str:
        """Take `tokens` up to the end of the generation; return the text that they release."""
        released = ""
        for token in tokens:
            if self.finish_reason is not None:
                break
            self.judged += 1
            matcher = self.matcher
            if token in self.ends:
                return released + self._finish("end" if matcher is None or matcher.may_end else "stuck")
            if matcher is not None and not matcher.push(token):
                return released + self._finish("stuck")
            self.tokens.append(token)
            self.remaining -= 1
            if self._stream is not None:
                released += self._release(self._stream.push([token]))
            if self.finish_reason is None and matcher is not None and matcher.ended:
                released += self._finish("end")
            if self.finish_reason is None and token in self.stop_tokens:
                released += self._finish("stop")
            if self.finish_reason is None and self.remaining == 0:
                released += self._finish("length")
        return released

    def cancel(self) -> str:
        """End the generation where it is; return the text that this releases."""
        return self._finish("cancelled") if self.finish_reason is None else ""

    def _release(self, text: str) -> str:
        self._held += text
        if len(self.tokens) < self.least:
            released, self._held = self._held, ""
            self.text += released
            return released
        found = [(at, len(s)) for s in self.stop if (at := self._held.find(s)) >= 0]
        if found:
            self.finish_reason = "stop"
            at, length = min(found)
            text, self._held = self._held[: at + length if self.keep_stop else at], ""
        else:
            keep = max((_overlap(self._held, s) for s in self.stop), default=0)
            cut = len(self._held) - keep
            text, self._held = self._held[:cut], self._held[cut:]
        self.text += text
        return text

    def _finish(self, reason: FinishReason) -> str:
        rest = self._release(self._stream.finish()) if self._stream is not None else ""
        if self.finish_reason is None:  # the last piece of text may still complete a stop string
            self.finish_reason = reason
            rest, self.text, self._held = rest + self._held, self.text + self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
