"""Decode text incrementally: token ids in, finished characters out."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain, dropwhile, islice

from headstart.data.tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
TAIL = 8
"""The most tokens of a prompt that serve as context for decoding the tokens after it."""


class TextStream:
    """Incremental `tokenizer.decode`.

    The pieces that `push` returns, joined, plus `finish()`, equal the text that the pushed tokens add to the text of
    the tokens `before` them. Without such tokens, they equal `tokenizer.decode` of all pushed tokens. (Some decoders,
    Llama 2's and Mistral's, strip the space at the beginning of a text; the first token of a completion is not at the
    beginning.) A piece never holds half a character, nor a U+FFFD that a later token would replace: such tokens wait.
    The work per token does not grow with the length of the text.

    With `keep_space` the space is kept at the beginning of a text too. A constraint needs this, because it has checked
    the bytes of the tokens, including the space.

    Special tokens are left out of the text, except those of `shown`, which appear by their names.

    If a tokenizer falls back to single bytes (Llama 2, Gemma), a run of byte tokens waits until it ends: one bad byte
    turns the *whole* run into U+FFFD, so nothing of it is certain before.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        before: Sequence[int] = (),
        keep_space: bool = False,
        shown: Collection[int] = frozenset(),
    ) -> None:
        self._tokenizer, self._shown = tokenizer, frozenset(shown)
        self._skipped: frozenset[int] = getattr(tokenizer, "skipped", frozenset([tokenizer.end_id]))
        self._assembly = self._begin(before, keep_space)

    def _begin(self, before: Sequence[int], keep_space: bool) -> _Window | _Bytes:
        token_bytes: Callable[[int], bytes] | None = getattr(self._tokenizer, "token_bytes", None)
        backwards = (token for token in reversed(before) if token not in self._skipped)
        return _Window(self._tokenizer, backwards, keep_space) if token_bytes is None else _Bytes(token_bytes)

    def push(self, tokens: Sequence[int]) -> str:
        """Take the next tokens and return the text that they complete, "" if none."""
        pieces, kept = [], list[int]()
        for token in tokens:
            if token in self._shown:
                pieces += [self._assembly.push(kept), self._assembly.finish(), self._tokenizer.piece(token) or ""]
                self._assembly, kept = self._begin((), keep_space=True), []
            elif token not in self._skipped:  # a token that decoding drops must not end a run of bytes
                kept.append(token)
        return "".join(pieces) + self._assembly.push(kept)

    def finish(self) -> str:
        """Return the rest of the text (an unfinished character as U+FFFD) and reset the stream."""
        return self._assembly.finish()


class _Bytes:
    """Decode a byte-level vocabulary: every token is a fixed string of bytes, and UTF-8 decodes incrementally."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(self._token_bytes(token) for token in tokens))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Window:
    """Decode any other vocabulary: the text of a token is what it adds to the text of a few tokens of context.

    The context is the shortest tail of the decoded tokens whose text is not empty. What a decoder does to the first
    token of a text, such as stripping its space, then happens inside the context, in both decodings that are compared.
    """

    def __init__(self, tokenizer: Tokenizer, backwards: Iterator[int], keep_space: bool) -> None:
        self._tokenizer = tokenizer
        self._is_partial: Callable[[int], bool] | None = getattr(tokenizer, "is_partial", None)
        self._context = self._tail(self._before(backwards) or (tokenizer.encode("a") if keep_space else []))
        self._pending: list[int] = []

    def push(self, tokens: Sequence[int]) -> str:
        pieces = []
        for token in tokens:
            self._pending.append(token)
            if self._is_partial is None or not self._is_partial(token):
                pieces.append(self._release(final=False))
        return "".join(pieces)

    def finish(self) -> str:
        text = self._release(final=True)
        self._context, self._pending = [], []
        return text

    def _release(self, final: bool) -> str:
        decode = self._tokenizer.decode
        tokens = self._context + self._pending
        before, after = decode(self._context), decode(tokens)
        if not final:
            if not after.startswith(before):
                return ""
            if self._is_partial is None and after.endswith(REPLACEMENT):
                return ""
        self._context, self._pending = self._tail(tokens), []
        return after[len(before) :]

    def _tail(self, tokens: list[int]) -> list[int]:
        """Return the shortest tail of `tokens` whose text is not empty, or all of them if there is none."""
        size = 1
        while size < len(tokens):
            if self._tokenizer.decode(tokens[-size:]):
                return tokens[-size:]
            size *= 2
        return tokens

    def _before(self, backwards: Iterator[int]) -> list[int]:
        """Return the last tokens of a prompt, which comes in reverse.

        Byte tokens at the end are left out, because bytes that follow would change their text.
        """
        last = next(backwards, None)
        if last is None:
            return []
        rest = dropwhile(self._is_partial or (lambda token: False), chain([last], backwards))
        tokens = list(islice(rest, TAIL))[::-1] or self._tokenizer.encode("a")
        while tokens and self._tokenizer.decode(tokens).endswith(REPLACEMENT):
            tokens.pop()
        return tokens
