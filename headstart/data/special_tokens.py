"""Special and added tokens that the files next to a `tokenizer.json` name, as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headstart.errors import UsageError
from headstart.fileio import regular

CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILE = "tokenizer.json"
OWN_KIND = "headstart_tokenizer"
"""The key of tokenizer_config.json that says how Headstart made a tokenizer: "bytes" or "bpe"."""
MAP_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def special_tokens(directory: Path) -> dict[str, str]:
    """Return the text of each special token that has a name, such as `bos_token`.

    `special_tokens_map.json` goes before `tokenizer_config.json`, but is not read where the latter describes its added
    tokens (`added_tokens_decoder`), which makes it complete.
    """
    config = _read(directory / CONFIG_FILE)
    if "added_tokens_decoder" not in config:
        config |= _read(directory / MAP_FILE)
    found = {name: _content(config.get(name)) for name in NAMES}
    return {name: text for name, text in found.items() if text}


def added_tokens(directory: Path) -> list[dict[str, Any]]:
    """Return the tokens that are added to those of `tokenizer.json`, in the order of ids: `content` and `FLAGS`."""
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


def read_json(path: Path, fix: str = "fetch the file again") -> dict[str, Any]:
    """Return the object in `path`. Raises UsageError where there is none."""
    try:
        content = json.loads(regular(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); {fix}") from error
    except (ValueError, RecursionError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path}: not JSON ({why}); fetch the file again") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: not a JSON object; fetch the file again")
    return content


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _content(token: object) -> str | None:
    """Return the text of a token, which files give as it is or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
