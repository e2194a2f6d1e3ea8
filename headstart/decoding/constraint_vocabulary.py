"""A tokenizer in llguidance's form: the bytes of each token, and the tokens of a forced piece of text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from headstart.data.pieces import piece_bytes
from headstart.data.tokenizers import ByteTokenizer, PretrainedTokenizer, Tokenizer
from headstart.errors import UsageError

if TYPE_CHECKING:
    from llguidance import LLTokenizer

UTF8_BYTES = (*range(0xC0), *range(0xC2, 0xF5))
"""The bytes that occur in UTF-8."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in llguidance's form.

    A vocabulary without a token for every byte gets stand-ins after its own ids: llguidance splits every forced piece
    into tokens, and would drop what it cannot write, so that its masks were wrong from there on. A model never writes a
    stand-in, so outputs that need one are excluded.
    """

    ll: LLTokenizer
    size: int
    """Number of the tokenizer's own ids."""
    lacking: tuple[int, ...]
    """Bytes without a token of their own."""

    @cached_property
    def pieces(self) -> frozenset[bytes]:
        """The bytes of every token that is text."""
        tokens = (token for token in range(self.size) if not self.ll.is_special_token(token))
        return frozenset(self.ll.decode_bytes([token]) for token in tokens)

    def can_write(self, text: str) -> bool:
        """Return whether some sequence of tokens is `text`."""
        if not self.lacking:
            return True
        content, reached = text.encode(), {0}
        longest = max(map(len, self.pieces), default=0)
        for end in range(1, len(content) + 1):
            starts = range(max(0, end - longest), end)
            if any(start in reached and content[start:end] in self.pieces for start in starts):
                reached.add(end)
        return len(content) in reached

    @cached_property
    def writable(self) -> str | None:
        """A regular expression for text that the tokens can write; None where they can write every byte."""
        held = frozenset().union(*self.pieces) if self.lacking else frozenset(UTF8_BYTES)
        spans = [span for byte in UTF8_BYTES if byte not in held for span in _led_by(byte)]
        ranges = "".join(rf"\u{{{first:x}}}-\u{{{last:x}}}" for first, last in spans)
        return f"(?s:[^{ranges}]*)" if ranges else None


def _led_by(byte: int) -> Iterator[tuple[int, int]]:
    """Yield the first and last character whose UTF-8 form begins with `byte`; nothing for a continuation byte."""
    if byte < 0x80:
        yield byte, byte
    elif 0xC2 <= byte < 0xE0:
        yield (byte & 0x1F) << 6, (byte & 0x1F) << 6 | 0x3F
    elif 0xE0 <= byte < 0xF0:
        first = (byte & 0x0F) << 12
        yield max(first, 0x800), 0xD7FF if byte == 0xED else first | 0xFFF  # surrogates are no characters
    elif byte >= 0xF0:
        first = (byte & 0x07) << 18
        yield max(first, 0x10000), min(first | 0x3FFFF, 0x10FFFF)


_vocabularies: WeakKeyDictionary[Tokenizer, Vocabulary] = WeakKeyDictionary()


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Return the tokenizer in llguidance's form, made once. Raises UsageError for an unsupported kind."""
    if tokenizer not in _vocabularies:
        _vocabularies[tokenizer] = _made(tokenizer)
    return _vocabularies[tokenizer]


def _made(tokenizer: Tokenizer) -> Vocabulary:
    from llguidance import LLTokenizer, TokenizerWrapper

    if isinstance(tokenizer, ByteTokenizer):
        return Vocabulary(LLTokenizer(TokenizerWrapper(_Bytes())), tokenizer.vocab_size, ())
    if not isinstance(tokenizer, PretrainedTokenizer):
        raise UsageError("constraints need the byte tokenizer or one of a tokenizer.json")
    definition = tokenizer.definition()
    definition["decoder"] = _plain_decoder(definition.get("decoder"))
    try:
        ll = LLTokenizer(json.dumps(definition), n_vocab=tokenizer.vocab_size, eos_token=tokenizer.end_id)
    except ValueError as error:
        why = (str(error).splitlines() or ["unknown error"])[0]
        raise UsageError(
            f"tokenizer {tokenizer.name}: its kind does not support constraints ({why}); "
            "byte-level BPE and BPE with byte fallback do"
        ) from error
    single = {ll.decode_bytes([token]) for token in range(tokenizer.vocab_size)}
    lacking = tuple(byte for byte in UTF8_BYTES if bytes([byte]) not in single)
    if lacking:
        ll = LLTokenizer(TokenizerWrapper(_StandIns(tokenizer, lacking)))
    return Vocabulary(ll, tokenizer.vocab_size, lacking)


def _plain_decoder(decoder: Any) -> Any:
    """Return a tokenizer.json's decoder with each Metaspace step as a Replace step, which llguidance understands."""
    if isinstance(decoder, dict) and decoder.get("type") == "Sequence":
        return decoder | {"decoders": [_plain_decoder(step) for step in decoder.get("decoders", [])]}
    if isinstance(decoder, dict) and decoder.get("type") == "Metaspace":
        return {"type": "Replace", "pattern": {"String": decoder.get("replacement", "▁")}, "content": " "}
    return decoder


class _Bytes:
    """`ByteTokenizer` in the interface that llguidance takes."""

    eos_token_id = ByteTokenizer.end_id
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(eos_token_id)), ByteTokenizer.end_name.encode())
    special_token_ids = (eos_token_id,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode("utf-8") if isinstance(text, str) else text)


class _StandIns:
    """A tokenizer with further ids for the bytes `lacking`, in the interface that llguidance takes."""

    bos_token_id = None

    def __init__(self, tokenizer: PretrainedTokenizer, lacking: tuple[int, ...]) -> None:
        self._tokenizer, self.eos_token_id = tokenizer, tokenizer.end_id
        own = [piece_bytes(tokenizer, token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.skipped)
        for token in self.special_token_ids:
            own[token] = (tokenizer.piece(token) or "").encode()
        self.tokens = [*own, *(bytes([byte]) for byte in lacking)]
        text = ((token, piece) for token, piece in enumerate(self.tokens) if token not in tokenizer.skipped and piece)
        self._token_of = {piece: token for token, piece in text}
        self._longest = max(map(len, self._token_of))

    def __call__(self, text: str) -> list[int]:
        """Return the tokenizer's own tokens if they are the text to the byte, else the longest that fit."""
        content, start = text.encode(), self._tokenizer.encode("a")
        for tokens in (self._tokenizer.encode(text), self._tokenizer.encode("a" + text)[len(start) :]):
            if b"".join(self.tokens[token] for token in tokens) == content:
                return tokens
        tokens, at = [], 0
        while at < len(content):
            sizes = range(min(self._longest, len(content) - at), 0, -1)
            size = next(size for size in sizes if content[at : at + size] in self._token_of)
            tokens.append(self._token_of[content[at : at + size]])
            at += size
        return tokens
