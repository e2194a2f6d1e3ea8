"""Splits of text before byte-level BPE, by llama.cpp's names (`tokenizer.ggml.pre`): one table for reader and writer.

A split is a series of regular expressions. Each cuts every piece that the previous ones left into matches and what lies
between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The split that is built into the ByteLevel step of a tokenizer.json."""
DIGIT = r"\p{N}"
"""The split of the Digits step, which cuts digits one by one."""
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = _CONTRACTIONS + "|" + _WORD + r"|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + "|" + _WORD + r"|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_SYMBOLS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""


@dataclass(frozen=True)
class Split:
    """One way to split text."""

    names: tuple[str, ...]
    """llama.cpp's names; the first is written into files."""
    patterns: tuple[str, ...]
    """Regular expressions, in the order of their use."""
    whole_words: bool = False
    """True if a piece that is a token is not split (`ignore_merges`)."""
    starts: bool = False
    """True if text begins with the start token in a file without `add_bos_token`."""


def _cased(contraction: str, digits: str) -> str:
    """Return a pattern that ends a word where lower case is followed by upper case."""
    words = f"{_BEFORE}{_UPPER}*{_LOWER}+{contraction}|{_BEFORE}{_UPPER}+{_LOWER}*{contraction}"
    return words + rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*" + _SPACES


SPLITS = (
    Split(
        (
            *("gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum"),
            *("modern-bert", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"),
        ),
        (GPT2,),
    ),
    Split(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), (DIGIT, GPT2)
    ),
    Split(
        (
            *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
            "jina-v5-nano",
        ),
        (_LLAMA3,),
        whole_words=True,
        starts=True,
    ),
    Split(("glm4", "glm5"), (_LLAMA3,), whole_words=True),
    Split(("smaug-bpe", "dbrx", "chatglm-bpe"), (_LLAMA3,)),
    Split(
        (
            *("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open"),
            "grok-2",
        ),
        (_QWEN2,),
    ),
    Split(
        ("qwen35",),
        (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES,),
    ),
    Split(("tekken",), (_cased("", r"\p{N}"),), whole_words=True, starts=True),
    Split(("gpt-4o", "llama4", "kanana2", "talkie"), (_cased(_CONTRACTIONS + "?", r"\p{N}{1,3}"),)),
    Split(
        ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"),
        (
            r"\p{N}{1,3}",
            "[一-龥぀-ゟ゠-ヿ]+",
            _SYMBOLS + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + _SPACES,
        ),
    ),
    Split(("deepseek-coder",), (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", DIGIT)),
    Split(("falcon",), (r"[\p{P}$+<=>^~|`]+", GPT2, "[0-9][0-9][0-9]")),
    Split(("seed-coder",), (_CONTRACTIONS + "|" + _WORD + r"|\p{N}| ?[^\s\p{L}\p{N}\r\n]+" + _SPACES,)),
    Split(
        ("bailingmoe", "bailingmoe2", "llada-moe"),
        (r"'(?i:[sdmt]|ll|ve|re)|" + _WORD + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",),
    ),
    Split(("minicpm5",), (r"\p{N}{1,3}", _CONTRACTIONS + "|" + _WORD + r"|\p{N}+" + _REST), whole_words=True),
    Split(("poro-chat", "bloom", "gpt3-finnish"), (r" ?[^(\s|.,!?…。，、।۔،)]+",)),
    Split(("viking",), (r" ?[^(\s|.,!?…。，、।۔،)]+", DIGIT)),
    Split(("default",), (r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
)
"""Every split that is read and written. Patterns are those of the models' own tokenizer.json if it is known."""


def split_named(name: str) -> Split | None:
    """Return the split that llama.cpp calls `name`, None for an unknown one."""
    return next((split for split in SPLITS if name in split.names), None)


def split_of(steps: Sequence[dict[str, Any]], whole_words: bool, unwritable: Iterable[str]) -> Split | None:
    """Return the split that the steps of a tokenizer.json's pre-tokenizer make; None if llama.cpp has no name for it.

    Args:
        steps: the steps in order, without sequences.
        whole_words: `ignore_merges` of the tokenizer.json.
        unwritable: characters of the byte alphabet that are no tokens.
    """
    if steps and steps[-1] == _isolation(unwritable):
        steps = steps[:-1]
    patterns = _patterns(steps)
    return next((split for split in SPLITS if (split.patterns, split.whole_words) == (patterns, whole_words)), None)


def pre_tokenizer(split: Split, unwritable: Iterable[str]) -> dict[str, Any]:
    """Return the pre-tokenizer of a tokenizer.json that splits text so.

    A byte without a token is dropped, and neighbours are not merged over the gap; so it becomes a piece of its own.

    Args:
        split: the split.
        unwritable: characters of the byte alphabet that are no tokens.
    """
    patterns = split.patterns
    built_in = patterns[-1] == GPT2
    steps = [
        {"type": "Digits", "individual_digits": True} if pattern == DIGIT else _isolated(pattern)
        for pattern in (patterns[:-1] if built_in else patterns)
    ]
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": built_in})
    isolation = _isolation(unwritable)
    if isolation is not None:
        steps.append(isolation)
    return {"type": "Sequence", "pretokenizers": steps}


def _isolated(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _isolation(characters: Iterable[str]) -> dict[str, Any] | None:
    """Return the step that makes each of some characters a piece of its own; None without characters."""
    group = "".join(map(re.escape, sorted(characters)))
    return _isolated(f"[{group}]") if group else None


def _patterns(steps: Sequence[dict[str, Any]]) -> tuple[str, ...] | None:
    """Return the regular expressions of a pre-tokenizer that ends in bytes; None for other steps."""
    found = []
    for step in steps[:-1]:
        if step["type"] == "Digits" and step.get("individual_digits"):
            found.append(DIGIT)
        elif step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            found.append(step["pattern"].get("Regex"))
        else:
            return None
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space", True):
        return None
    return (*found, GPT2) if steps[-1].get("use_regex", True) else tuple(found)
