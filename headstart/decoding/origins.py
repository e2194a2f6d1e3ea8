"""Which head proposed which part of a text."""

from __future__ import annotations

import itertools

from headstart.data.detokenizer import TextStream
from headstart.data.tokenizers import Tokenizer
from headstart.decoding.request import Generation


class OriginStream:
    """The released text of a generation as it grows, in pieces of one head each: 1, or k for accepted drafts of head k.

    A character that takes several tokens belongs to the head of its last one.
    """

    def __init__(self, generation: Generation, tokenizer: Tokenizer) -> None:
        self.generation = generation
        self._stream = TextStream(tokenizer, generation.request.prompt)
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
