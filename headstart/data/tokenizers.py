"""Tokenizers: raw bytes like the paper's byte-level models, or any Hugging Face `tokenizer.json`.

Importing this file imports neither `tokenizers` nor `transformers`: a byte-level model decodes without them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from headstart.data.byte_tokenizer import ByteTokenizer, byte_alphabet, check_ids, check_text
from headstart.data.special_tokens import ADDED_FILE, CONFIG_FILE, MAP_FILE, OWN_KIND, TOKENIZER_FILE, read_json
from headstart.data.tokenizer_source import TEMPLATE_FILE, TokenizerDirectory, TokenizerSource, one_line
from headstart.errors import UsageError, first_line

__all__ = ["ByteTokenizer", "PretrainedTokenizer", "Tokenizer", "load_tokenizer"]

LONG = 2**14
"""Characters of a text from which other threads run while it is encoded."""
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.json)"


class Tokenizer(Protocol):
    """Text to token ids and back."""

    name: str
    vocab_size: int  # one more than the largest id
    end_id: int  # closes every document; also the start token if a prompt is empty
    end_ids: frozenset[int]  # end a generation: `end_id`, and those that the model's directory names
    start_ids: tuple[int, ...]  # put before a text by `prompt_ids`; none for models that were trained without

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; no special token is added. Text without a UTF-8 form raises UsageError."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`: special tokens and unknown ids are dropped, invalid UTF-8 becomes U+FFFD."""
        ...

    def __hash__(self) -> int: ...

    def piece(self, token: int) -> str | None:
        """Return the name of `token` in the vocabulary; None if it has none."""
        ...

    def save(self, directory: Path) -> None:
        """Write files with which `transformers.AutoTokenizer.from_pretrained(directory)` gives the same ids."""
        ...


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a prompt: those of the text, after the tokenizer's start tokens.

    Llama, Mistral and Gemma have a start token. It is not repeated if the text spells it already.
    """
    ids, start = tokenizer.encode(text), list(tokenizer.start_ids)
    return ids if ids[: len(start)] == start else start + ids


class PretrainedTokenizer:
    """Any Hugging Face `tokenizer.json`, or a tokenizer that a program built, through the `tokenizers` library.

    Special tokens that a text spells become their ids, as in transformers. Raises UsageError if the files cannot be
    read or name no end token.

    Args:
        source: a directory, its `tokenizer.json`, or another source.
    """

    def __init__(self, source: str | Path | TokenizerSource) -> None:
        self._source = TokenizerDirectory(Path(source)) if isinstance(source, (str, Path)) else source
        self._engine = self._source.engine()
        self.name = self._source.name
        self.learnt = self._source.learnt
        self.vocab_size = self._source.vocab_size(self._engine)
        self.end_id: int = self._engine.token_to_id(self._source.end_token(self._engine))
        self.end_ids = frozenset([self.end_id])
        special = {i for i, token in self._engine.get_added_tokens_decoder().items() if token.special}
        self.skipped = frozenset(special | {self.end_id})
        self.start_ids: tuple[int, ...] = ()
        self._without_rows: dict[int, str] = {}

        steps = _decoder_steps(self._engine)
        self.falls_back_to_bytes = "ByteFallback" in steps
        self._bytes_of_character: dict[str, int] | None = None
        self._cached_bytes: dict[int, bytes] = {}
        # TextStream uses the bytes of each token, or else the knowledge which tokens leave a character unfinished. A
        # decoder that mixes ByteLevel with other steps offers neither.
        self.token_bytes = None
        if "ByteLevel" not in steps:
            self.is_partial = self._is_partial
        elif set(steps) <= {"ByteLevel", "Fuse"}:
            self._bytes_of_character = {character: byte for byte, character in enumerate(byte_alphabet())}
            self.token_bytes = self._token_bytes

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; no special token is added."""
        check_text(text)
        with one_line(f"tokenizer {self.name}: fails on this text", "fix its tokenizer.json, or change the text"):
            if len(text) < LONG:
                encoding = self._engine.encode(text, add_special_tokens=False)
            else:  # a batch of one releases Python's lock
                (encoding,) = self._engine.encode_batch_fast([text], add_special_tokens=False)
        return self._with_rows(encoding.ids)

    def encode_literally(self, text: str) -> list[int]:
        """Return the ids of `text`, with special tokens that it spells kept as text, so it has no end token."""
        self._engine.encode_special_tokens = True
        try:
            return self.encode(text)
        finally:
            self._engine.encode_special_tokens = False

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of `text`, and the begin and end of each token in it, in characters.

        Tokens that share a character all include it.
        """
        check_text(text)
        with one_line(f"tokenizer {self.name}: fails on this text", "fix its tokenizer.json, or change the text"):
            encoding = self._engine.encode(text, add_special_tokens=False)
        return self._with_rows(encoding.ids), list(encoding.offsets)

    @property
    def needed_rows(self) -> int:
        """Return the number of ids that a model needs; added tokens at the end, used only if spelled, are left out."""
        ordinary = self._engine.get_vocab(with_added_tokens=False).values()
        return max([self.end_id, *self.start_ids, *ordinary]) + 1

    def fit(self, rows: int) -> None:
        """Limit the vocabulary to `rows` ids, those of a model. A text that spells a token beyond then raises."""
        added = self._engine.get_added_tokens_decoder()
        self._without_rows = {i: token.content for i, token in added.items() if i >= rows}
        self.vocab_size = min(self.vocab_size, rows)

    def _with_rows(self, ids: list[int]) -> list[int]:
        for token in ids if self._without_rows else ():
            if token in self._without_rows:
                raise UsageError(
                    f"text: {self._without_rows[token]} is token {token}, and the model has {self.vocab_size} rows; "
                    "remove it from the text"
                )
        return list(ids)

    @property
    def directory(self) -> Path | None:
        """Return the folder of its files; None for a tokenizer that comes from elsewhere."""
        return self._source.directory

    def special_tokens(self) -> Mapping[str, str]:
        """Return the text of each special token that has a name, such as `bos_token`."""
        return self._source.special_tokens()

    def chat_template(self) -> str | None:
        """Return the source of its chat template, None without one. Raises UsageError if it cannot be read."""
        return self._source.chat_template()

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`. Special tokens and unknown ids are dropped, negative ids raise."""
        check_ids(tokens)
        kept = [int(token) for token in tokens if token not in self.skipped and token < self.vocab_size]
        with one_line(f"tokenizer {self.name}: fails on these tokens", "fix the decoder in its tokenizer.json"):
            return str(self._engine.decode(kept, skip_special_tokens=True))

    def piece(self, token: int) -> str | None:
        """Return the name of `token` in the vocabulary; None for an unused id."""
        return self._engine.id_to_token(token)

    def definition(self) -> dict[str, Any]:
        """Return the content of its `tokenizer.json`, for export, without tokens that the model has no row for."""
        content: dict[str, Any] = json.loads(self._engine.to_str())
        content["added_tokens"] = [each for each in content["added_tokens"] if each["id"] not in self._without_rows]
        return content

    def save(self, directory: Path) -> None:
        """Write its files into `directory`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._source.save(self._engine, directory)

    def own_start(self) -> tuple[int, ...]:
        """Return the tokens that transformers puts before a text; only the model's directory says if it needs them."""
        with one_line(f"tokenizer {self.name}: fails on the text 'a'", "fix its tokenizer.json"):
            plain, whole = (self._engine.encode("a", add_special_tokens=special).ids for special in (False, True))
        for count in range(len(whole) - len(plain) + 1):
            if whole[count : count + len(plain)] == plain:
                return tuple(whole[:count])
        return ()

    def _token_bytes(self, token: int) -> bytes:
        check_ids([token])
        content = self._cached_bytes.get(token)
        if content is None:
            assert self._bytes_of_character is not None
            text = (self._engine.id_to_token(token) if token < self.vocab_size else None) or ""
            try:
                content = bytes(self._bytes_of_character[character] for character in text)
            except KeyError:  # an added token outside the byte alphabet stands for itself, as in the library
                content = text.encode("utf-8")
            self._cached_bytes[token] = content
        return content

    def _is_partial(self, token: int) -> bool:
        """Return whether `token` continues a run of byte tokens: it is one, or an unused id, which decoding drops."""
        if not self.falls_back_to_bytes:
            return False
        text = self._engine.id_to_token(token)
        return text is None or re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text) is not None


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load the tokenizer that `source` names: "bytes", a `tokenizer.json`, a directory with one, or a hub id.

    What lies on the disk goes before the hub. A directory that `ByteTokenizer.save` wrote comes back as ByteTokenizer.
    Anything else raises UsageError.
    """
    if source == "bytes":
        return ByteTokenizer()
    path = Path(source)
    if not path.exists():
        if re.fullmatch(HUB_ID, str(source)):
            tokenizer = PretrainedTokenizer(_fetch(str(source)))
            tokenizer.name = str(source)
            return tokenizer
        raise UsageError(
            f'tokenizer "{source}": no such file or directory; give "bytes", a {TOKENIZER_FILE}, a directory that '
            f"holds one, or a hub id OWNER/NAME"
        )
    if path.is_dir() and not (path / TOKENIZER_FILE).is_file():
        raise UsageError(
            f"{path}: holds no {TOKENIZER_FILE}; write one with transformers: "
            f"AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    config = (path if path.is_dir() else path.parent) / CONFIG_FILE
    if config.is_file() and read_json(config).get(OWN_KIND) == "bytes":
        tokenizer_file = read_json(path / TOKENIZER_FILE if path.is_dir() else path)
        # Someone may have added tokens to the saved files: then they are no longer plain bytes, whatever the mark says.
        if len(tokenizer_file.get("added_tokens") or []) == 1:
            return ByteTokenizer()
    return PretrainedTokenizer(path)


def _fetch(repository: str) -> Path:
    """Fetch a hub model's tokenizer files, or find them in the hub's cache, and return their folder."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        folder = Path(hf_hub_download(repository, TOKENIZER_FILE)).parent
        for name in (CONFIG_FILE, MAP_FILE, ADDED_FILE, TEMPLATE_FILE):
            with suppress(EntryNotFoundError):
                hf_hub_download(repository, name)
    except Exception as error:  # of the hub, of the network, of the disk: many kinds
        raise UsageError(
            f'tokenizer "{repository}": no such file or directory here, and the hub gives none ({first_line(error)}); '
            f"check the name and the network, or give a {TOKENIZER_FILE}"
        ) from error
    return folder


def _decoder_steps(engine: Any) -> list[str]:
    """Return the types of the steps of a tokenizer's decoder, with sequences flattened."""
    return [] if engine.decoder is None else _step_types(json.loads(engine.decoder.__getstate__()))


def _step_types(decoder: Any) -> list[str]:
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _step_types(part)]
    return [decoder["type"]]
