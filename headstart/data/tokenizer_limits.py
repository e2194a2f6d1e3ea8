"""Bounds on a `tokenizer.json` from elsewhere: how much longer it makes a text, and how large its token ids are."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from headstart.errors import UsageError

MAX_GROWTH = 64
"""The largest factor by which a normalizer or decoder may lengthen a text."""
MAX_ID = 10**8
"""The bound of token ids, which is also the largest vocabulary of a model."""


def check_growth(file: Path, content: dict[str, Any]) -> None:
    """Raise UsageError if the normalizer or the decoder makes a text more than MAX_GROWTH times as long."""
    if max(_growth(content.get("normalizer")), _growth(content.get("decoder"))) > MAX_GROWTH:
        raise UsageError(
            f"{file}: its normalizer or decoder makes a text over {MAX_GROWTH} times as long; "
            "name a tokenizer that does not lengthen text"
        )


def check_ids(file: Path, content: dict[str, Any], vocabulary: Iterable[int]) -> None:
    """Raise UsageError for an id of MAX_ID or above in the vocabulary, the added tokens or the post-processor."""
    # The library silently renumbers an added token whose id in the file is out of order.
    added = [token["id"] for token in content.get("added_tokens") or []]
    largest = max([*vocabulary, *added, *_processor_ids(content.get("post_processor"))], default=0)
    if largest >= MAX_ID:
        raise UsageError(f"{file}: holds token id {largest:,}, ids must be below {MAX_ID:,}; fetch the file again")


def _processor_ids(processor: Any) -> list[int]:
    """Return the token ids that a post-processor puts around a text."""
    if isinstance(processor, list):
        return [token for part in processor for token in _processor_ids(part)]
    if not isinstance(processor, dict):
        return []
    pairs = [processor.get("sep"), processor.get("cls")]
    ids = [pair[1] for pair in pairs if isinstance(pair, list) and len(pair) == 2]
    for token in (processor.get("special_tokens") or {}).values():
        ids += token["ids"]
    return ids + _processor_ids(processor.get("processors"))


def _growth(step: Any) -> float:
    """Return the largest number of characters that a normalizer or decoder makes of one."""
    if not isinstance(step, dict):
        return 1.0
    if step.get("type") == "Sequence":
        parts = step.get("normalizers") or step.get("decoders")
        return math.prod(_growth(part) for part in parts) if isinstance(parts, list) else 1.0
    if step.get("type") == "Prepend":
        return 1.0 + len(str(step.get("prepend")))
    if step.get("type") == "Precompiled":
        return _growth_of_charsmap(str(step.get("precompiled_charsmap")))
    content, pattern = step.get("content"), step.get("pattern")
    if step.get("type") != "Replace" or not isinstance(content, str) or not isinstance(pattern, dict):
        return 1.0
    literal = pattern.get("String")
    if isinstance(literal, str) and literal:
        return max(1.0, len(content) / len(literal))
    return max(1.0, len(content) + _matches_nothing(str(literal or pattern.get("Regex") or "")))


def _matches_nothing(pattern: str) -> bool:
    """Return whether a pattern may match the empty text, and so inserts between all characters."""
    try:
        return re.match(pattern, "") is not None
    except (re.error, RecursionError, OverflowError):
        return True


def _growth_of_charsmap(charsmap: str) -> float:
    """Return the most characters that a SentencePiece map, in base64, puts in the place of one.

    The map is the size of a trie in four bytes, the trie, and strings that end with NUL.
    """
    try:
        content = base64.b64decode(charsmap)
    except ValueError:
        return 1.0  # the library reports what is wrong
    replacements = content[4 + int.from_bytes(content[:4], "little") :].split(b"\0")
    return float(max(1, *(len(text.decode("utf-8", "replace")) for text in replacements)))
