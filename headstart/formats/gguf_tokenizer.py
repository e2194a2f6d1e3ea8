"""The tokenizer of a GGUF file: byte-level BPE or SentencePiece's BPE, from the file's metadata.

Token ids equal llama.cpp's, with the special tokens that a text spells parsed (`parse_special`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.data.byte_tokenizer import byte_alphabet
from headstart.data.tokenizer_source import END_NAMES, BuiltTokenizer, check_template, one_line
from headstart.data.tokenizers import ByteTokenizer, PretrainedTokenizer, Tokenizer
from headstart.errors import UsageError, shorten
from headstart.formats.gguf_split import pre_tokenizer, split_named
from headstart.formats.gguf_vocabulary import ENDS, SPACE

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
AGAIN = "convert the model again with a current llama.cpp"
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id", "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id")
Merge = tuple[str, str]


def tokenizer_from_metadata(metadata: Mapping[str, Any], name: str) -> Tokenizer | None:
    """Return the tokenizer that the metadata of a GGUF file describes, None if it describes none.

    Args:
        metadata: the file's keys with plain values: numbers, booleans, strings, and lists of them.
        name: the file, for messages.

    Raises:
        UsageError: another kind of tokenizer, a split of text that headstart does not know, or metadata that
            contradicts itself.
    """
    fields = _Fields(metadata, name)
    model = fields.text(PREFIX + "model", "no_vocab")
    if model in ("no_vocab", "none"):
        return None
    if model not in ("gpt2", "llama"):
        raise UsageError(
            f"{name}: its tokenizer is of the kind {shorten(model)}, and headstart reads gpt2 (byte-level BPE) and "
            "llama (SentencePiece); take a model with one of them"
        )
    tokens = _read_tokens(fields)
    if model == "gpt2" and _are_bytes(tokens):
        return ByteTokenizer()
    parts = (_byte_level if model == "gpt2" else _sentencepiece)(fields, tokens)
    return _build(fields, tokens, parts)


class _Fields:
    """The metadata of a file, with errors for values of another type."""

    def __init__(self, metadata: Mapping[str, Any], name: str) -> None:
        self.metadata, self.name = metadata, name

    def error(self, wrong: str) -> UsageError:
        return UsageError(f"{self.name}: {wrong}; {AGAIN}")

    def _value(self, key: str, kind: type, called: str, default: Any) -> Any:
        value = self.metadata.get(key)
        if value is None:
            return default
        if type(value) is not kind:
            raise self.error(f"{key} is {shorten(repr(value))}, and must be {called}")
        return value

    def text(self, key: str, default: str) -> str:
        return str(self._value(key, str, "a string", default))

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._value(PREFIX + key, bool, "true or false", default))

    def token(self, key: str, size: int, default: int | None = None) -> int | None:
        """Return the id of a token, one of `size`."""
        found: int | None = self._value(PREFIX + key, int, "a token id", default)
        if found is not None and not 0 <= found < size:
            raise self.error(f"{PREFIX}{key} is {found}, and the vocabulary has {size:,} tokens")
        return found

    def values(self, key: str, kinds: tuple[type, ...], called: str, size: int | None = None) -> list[Any]:
        """Return a list that the file must have, of `size` values if that is given."""
        values: list[Any] | None = self._value(PREFIX + key, list, f"a list of {called}", None)
        if values is None:
            raise self.error(f"{PREFIX}{key} is missing")
        if not set(map(type, values)) <= set(kinds):
            raise self.error(f"{PREFIX}{key} must be a list of {called}")
        if size is not None and len(values) != size:
            raise self.error(f"{PREFIX}{key} has {len(values):,} entries, and the vocabulary has {size:,} tokens")
        return values


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a file by id, and what kind each is."""

    names: list[str]
    """Names; two ids never share one, but "" stands for no token."""
    types: NDArray[np.int64]
    """`gguf.TokenType` of each."""

    def of(self, *kinds: int) -> set[int]:
        """Return the ids of the tokens of some types."""
        return set(np.flatnonzero(np.isin(self.types, kinds)).tolist())


@dataclass(frozen=True)
class _Parts:
    """The parts of a tokenizer.json that depend on the kind of tokenizer."""

    merges: list[Merge]
    options: dict[str, Any]
    """Options of the BPE model."""
    steps: dict[str, Any]
    """Normalizer, pre-tokenizer and decoder."""
    starts: bool
    """True if text begins with the start token unless the file says otherwise."""
    default_ids: dict[str, int]
    """Ids of the special tokens that the file does not name."""


def _read_tokens(fields: _Fields) -> _Tokens:
    from gguf import TokenType

    names = fields.values("tokens", (str,), "strings")
    if not names:
        raise fields.error(f"{PREFIX}tokens is empty")
    try:
        "".join(names).encode("utf-8")
    except UnicodeEncodeError:
        i = next(i for i, token in enumerate(names) if any("\ud800" <= letter <= "\udfff" for letter in token))
        raise fields.error(f"{PREFIX}tokens: token {i}, {shorten(ascii(names[i]))}, is not UTF-8") from None
    if len(set(names)) + max(0, names.count("") - 1) != len(names):
        i = next(i for i, token in enumerate(names) if token and names.index(token) != i)
        raise fields.error(f"{PREFIX}tokens: tokens {names.index(names[i])} and {i} are both {shorten(names[i])}")
    if PREFIX + "token_type" not in fields.metadata:
        return _Tokens(names, np.full(len(names), int(TokenType.NORMAL)))
    types = fields.values("token_type", (int,), "whole numbers", len(names))
    return _Tokens(names, np.array(types, dtype=np.int64))


def _are_bytes(tokens: _Tokens) -> bool:
    """Return whether the tokens are those that `save_gguf` writes for the byte tokenizer."""
    from gguf import TokenType

    end = ByteTokenizer.end_id
    return tokens.names[: end + 1] == [*byte_alphabet()[:end], ByteTokenizer.end_name] and bool(
        (tokens.types[end + 1 :] == TokenType.UNUSED).all()
    )


def _byte_level(fields: _Fields, tokens: _Tokens) -> _Parts:
    """Return the parts of byte-level BPE."""
    name = fields.text(PREFIX + "pre", "default")
    split = split_named(name)
    if split is None:
        raise UsageError(
            f"{fields.name}: its tokenizer splits text as {shorten(name)} ({PREFIX}pre), which headstart does not "
            "know; take the model as a Hugging Face directory"
        )
    steps = {
        "pre_tokenizer": pre_tokenizer(split, set(byte_alphabet()) - set(tokens.names)),
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    }
    merges = fields.values("merges", (str,), "strings")
    options = {"ignore_merges": split.whole_words}
    return _Parts(_pairs(fields, tokens, merges), options, steps, split.starts, {})


def _pairs(fields: _Fields, tokens: _Tokens, merges: Sequence[str]) -> list[Merge]:
    """Return the two tokens of each merge, in order; a merge that is repeated counts where it is first."""
    pairs: dict[Merge, None] = {}
    known = set(tokens.names)
    for merge in merges:
        left, _, right = merge.partition(" ")
        if left in known and right in known and left + right in known:
            pairs[left, right] = None
        elif merges != [f"{left} {left}"]:  # what `save_gguf` writes for a tokenizer without merges
            raise fields.error(f"{PREFIX}merges: {shorten(merge)} does not make a token of two tokens")
    return list(pairs)


def _sentencepiece(fields: _Fields, tokens: _Tokens) -> _Parts:
    """Return the parts of SentencePiece's BPE."""
    from gguf import TokenType

    scores = np.array(fields.values("scores", (float, int), "numbers", len(tokens.names)), dtype=np.float64)
    if not np.isfinite(scores).all():
        raise fields.error(f"{PREFIX}scores: token {int(np.argmin(np.isfinite(scores)))} has no finite score")
    hidden = tokens.of(TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE)
    order = [i for i in np.argsort(-scores, kind="stable").tolist() if i not in hidden]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders = [spaces | {"pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if fields.flag("add_space_prefix", True):
        steps: dict[str, Any] = {
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces]}
        }
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    else:
        steps = {"normalizer": spaces}
    steps["decoder"] = {"type": "Sequence", "decoders": decoders}
    defaults = {"unk": 0, "bos": 1, "eos": 2}
    unknown = fields.token("unknown_token_id", len(tokens.names)) or 0
    options = {"byte_fallback": True, "fuse_unk": True, "unk_token": tokens.names[unknown]}
    return _Parts(_all_splits([tokens.names[i] for i in order]), options, steps, True, defaults)


def _all_splits(pieces: Sequence[str]) -> list[Merge]:
    """Return every split of every piece into two pieces, in the order of `pieces` and from left to right.

    SentencePiece merges the two neighbours whose union has the highest score. With these merges, BPE does the same.
    """
    known = set(pieces)  # a million lookups, so one expression; the right part is rarer
    return [
        (left, right)
        for piece in pieces
        for i in range(1, len(piece))
        if (right := piece[i:]) in known and (left := piece[:i]) in known
    ]


def _build(fields: _Fields, tokens: _Tokens, parts: _Parts) -> PretrainedTokenizer:
    """Return the tokenizer of its parts, with its special tokens, start and end tokens and chat templates."""
    from gguf import TokenType
    from tokenizers import AddedToken, models, processors
    from tokenizers import Tokenizer as Engine

    named = _named_tokens(fields, tokens, parts)
    end, start = named["eos_token"], named.get("bos_token")
    ends = {end} | {found for key in END_KEYS if (found := fields.token(key, len(tokens.names))) is not None}
    ends |= {i for i, name in enumerate(tokens.names) if name in ENDS}
    special = tokens.of(TokenType.CONTROL, TokenType.UNKNOWN) | ends
    if not fields.flag("add_bos_token", parts.starts):
        start = None
    elif start is None:
        raise fields.error(f"{PREFIX}add_bos_token is true, and {PREFIX}bos_token_id is missing")
    else:
        special.add(start)
    added = tokens.of(TokenType.USER_DEFINED) - special
    unused = _unused(tokens, parts.merges) - special
    vocabulary = {name: i for i, name in enumerate(tokens.names) if name and i not in unused}

    skeleton = {"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}, **parts.steps}
    with one_line(f"{fields.name}: the tokenizers library does not take its tokenizer", AGAIN):
        engine = Engine.from_str(json.dumps(skeleton))
        engine.model = models.BPE(vocab=vocabulary, merges=parts.merges, **parts.options)
        engine.add_tokens(
            [AddedToken(tokens.names[i], special=i in special, normalized=False) for i in sorted(special | added)]
        )
        if start is not None:
            name = tokens.names[start]
            engine.post_processor = processors.TemplateProcessing(
                single=[name, "$A"], pair=[name, "$A", name, "$B"], special_tokens=[(name, start)]
            )
    spelled = {key: tokens.names[i] for key, i in named.items() if i in special}
    tokenizer = PretrainedTokenizer(
        BuiltTokenizer(fields.name, engine, max(vocabulary.values()) + 1, spelled, _templates(fields))
    )
    tokenizer.end_ids = frozenset(ends)
    tokenizer.start_ids = () if start is None else (start,)
    return tokenizer


def _named_tokens(fields: _Fields, tokens: _Tokens, parts: _Parts) -> dict[str, int]:
    """Return the ids of the special tokens that have names in a tokenizer.json; `eos_token` is one of them."""
    size, found = len(tokens.names), {}
    keys = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}
    for name, key in (keys | ({"unk": "unknown_token_id"} if parts.default_ids else {})).items():
        default = parts.default_ids.get(name)
        token = fields.token(key, size, default if default is not None and default < size else None)
        if token is not None:
            found[f"{name}_token"] = token
    if "eos_token" not in found:
        ends = [name for name in END_NAMES if name in tokens.names]
        if not ends:
            raise fields.error(f"{PREFIX}eos_token_id is missing, and no token has the name of an end token")
        found["eos_token"] = tokens.names.index(ends[0])
    return found


def _unused(tokens: _Tokens, merges: Sequence[Merge]) -> set[int]:
    """Return the ids that stand for no token: those of the type UNUSED that no merge makes (`[PAD151665]`)."""
    from gguf import TokenType

    unused = tokens.of(TokenType.UNUSED)
    made = {left + right for left, right in merges} if unused else set()
    return {i for i in unused if len(tokens.names[i]) > 1 and tokens.names[i] not in made}


def _templates(fields: _Fields) -> dict[str, str]:
    """Return the chat templates by name; the usual one is called "default"."""
    found = {}
    for key, source in fields.metadata.items():
        if key == TEMPLATE or key.startswith(TEMPLATE + "."):
            name = key.removeprefix(TEMPLATE).removeprefix(".") or "default"
            found[name] = check_template(f"{fields.name}: {key}", source)
    return found
