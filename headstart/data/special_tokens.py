"""Read the special and added tokens that the files next to a `tokenizer.json` name, like transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headstart import fileio
from headstart.errors import UsageError, shorten

CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILE = "tokenizer.json"
MAX_BYTES = 256 << 20
"""The largest JSON file of a tokenizer; a tokenizer.json of 260,000 tokens has 33 MB."""
FETCH = "fetch the file again"
OWN_KIND = "headstart_tokenizer"
"""The key of tokenizer_config.json with the kind of a tokenizer that Headstart made: "bytes" or "bpe"."""
MAP_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def special_tokens(directory: Path) -> dict[str, str]:
    """Return the text of each special token that has a name, such as `bos_token`.

    `special_tokens_map.json` overrides `tokenizer_config.json`, unless the latter describes its added tokens
    (`added_tokens_decoder`), which makes it complete. Raises UsageError for a token that is not text.
    """
    found = _named(directory / CONFIG_FILE)
    if "added_tokens_decoder" not in _read(directory / CONFIG_FILE):
        found |= _named(directory / MAP_FILE)
    return {name: text for name, text in found.items() if text}


def _named(file: Path) -> dict[str, str]:
    """Return the text of each of NAMES that a file holds, "" for null."""
    content = _read(file)
    found = {name: "" if content[name] is None else _content(content[name]) for name in NAMES if name in content}
    for name, text in found.items():
        if text is None:
            value = shorten(json.dumps(content[name]))
            raise UsageError(f'{file}: {name} is {value}; it must be a token\'s text, or {{"content": its text}}')
    return {name: text for name, text in found.items() if text is not None}


def added_tokens(directory: Path) -> list[dict[str, Any]]:
    """Return the tokens to add to those of `tokenizer.json`, in the order of their ids: content and FLAGS."""
    described = _read(directory / CONFIG_FILE).get("added_tokens_decoder")
    if described is None:
        named = set(special_tokens(directory).values())
        plain = {text: i for text, i in _read(directory / ADDED_FILE).items() if type(i) is int and text}
        return [
            {"content": text, "special": text in named, "normalized": text not in named}
            for text in sorted(plain, key=plain.__getitem__)
        ]
    if not isinstance(described, dict) or not all(i.isdecimal() and _content(each) for i, each in described.items()):
        raise UsageError(
            f"{directory / CONFIG_FILE}: added_tokens_decoder must hold tokens by their ids; fetch the file again"
        )
    tokens = [described[i] for i in sorted(described, key=int)]
    return [
        {"content": each["content"], **{flag: bool(each[flag]) for flag in FLAGS if flag in each}} for each in tokens
    ]


def read_json(path: Path, readable: str = FETCH) -> dict[str, Any]:
    """Return the JSON object in a file of a tokenizer. Raise UsageError for anything else."""
    return fileio.read_json(path, MAX_BYTES, readable, FETCH)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _content(token: object) -> str | None:
    """Return the text of a token, which files write as text or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
