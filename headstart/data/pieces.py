"""Show a single token: the bytes that it adds to a text, and a name for people and clients."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from headstart.data.detokenizer import TextStream
from headstart.data.tokenizers import PretrainedTokenizer, Tokenizer

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""The name of a byte token in a vocabulary that falls back to bytes (Llama 2, Gemma)."""


@lru_cache(maxsize=1 << 16)
def piece_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """Return the bytes that `token` adds after other text; b"" for a token that decoding drops."""
    if isinstance(tokenizer, PretrainedTokenizer) and (token in tokenizer.skipped or token >= tokenizer.vocab_size):
        return b""
    token_bytes: Callable[[int], bytes] | None = getattr(tokenizer, "token_bytes", None)
    if token_bytes is not None:
        return token_bytes(token)
    byte = _fallback_byte(tokenizer, token)
    if byte is not None:
        return bytes([byte])
    stream = TextStream(tokenizer, tokenizer.encode("a"))
    return (stream.push([token]) + stream.finish()).encode()


@lru_cache(maxsize=1 << 16)
def piece_name(tokenizer: Tokenizer, token: int) -> str:
    r"""Return the text of `token`, or else a name for it.

    Bytes that are not text give `bytes:\xe6`, a special token its own name, and an id without either `token_id:7`. A
    byte token is named by its bytes if another token is the usual one for its text, so names do not collide.
    """
    content = piece_bytes(tokenizer, token)
    if not content:
        return tokenizer.piece(token) or f"token_id:{token}"
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = ""
    if text and (_fallback_byte(tokenizer, token) is None or token in tokenizer.encode(text)):
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _fallback_byte(tokenizer: Tokenizer, token: int) -> int | None:
    if not isinstance(tokenizer, PretrainedTokenizer) or not tokenizer.falls_back_to_bytes:
        return None
    found = BYTE_PIECE.fullmatch(tokenizer.piece(token) or "")
    return None if found is None else int(found[1], 16)


class TextOffsets:
    """Find where the tokens of a completion begin in its text, in characters; `start` is its first character's place.

    All tokens of one character have the character's place. `stream` decodes the tokens of the completion; without it,
    these follow `prompt`.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), start: int = 0, stream: TextStream | None = None
    ) -> None:
        self._tokenizer, self._stream, self._next = tokenizer, stream or TextStream(tokenizer, prompt), start
        self._run = b""
        """Bytes that `TextStream` holds back until their run ends."""

    def push(self, token: int) -> int:
        """Take the next token and return its place."""
        place = self._next + len(self._run.decode(errors="ignore"))
        released = self._stream.push([token])
        self._next += len(released)
        waits = getattr(self._tokenizer, "token_bytes", None) is None and not released
        self._run = self._run + piece_bytes(self._tokenizer, token) if waits else b""
        return place
