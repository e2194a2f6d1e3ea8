"""Tokenizers that would blow a text up, or whose file is nested too deep, are refused when they are loaded."""

from __future__ import annotations

import base64
import json

import pytest

from headstart.data.tokenizers import ByteTokenizer, PretrainedTokenizer
from headstart.errors import UsageError


def replace(content: str, **pattern: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def charsmap(text: str) -> str:
    """Return a SentencePiece map with an empty trie and one text."""
    return base64.b64encode(bytes(4) + text.encode() + b"\0").decode()


@pytest.mark.parametrize(
    ("part", "step", "refused"),
    [
        ("normalizer", {"type": "Sequence", "normalizers": [replace("a" * 100, String="a")] * 5}, True),
        (
            "decoder",
            {"type": "Sequence", "decoders": [{"type": "ByteLevel"}, *[replace("a" * 60, Regex=".")] * 4]},
            True,
        ),
        ("normalizer", {"type": "Prepend", "prepend": "a" * 100}, True),
        ("normalizer", {"type": "Sequence", "normalizers": [replace("a", Regex="")] * 7}, True),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": charsmap("a" * 100)}, True),
        ("normalizer", {"type": "Sequence", "normalizers": [replace(" ", Regex=" {2,}")] * 50}, False),
        ("normalizer", {"type": "Sequence", "normalizers": [replace("\u2581", String=" "), {"type": "NFC"}]}, False),
        ("normalizer", {"type": "Sequence", "normalizers": [replace("\u2581", String=" ")] * 50}, False),
    ],
)
def test_growth_is_bounded(tmp_path, part, step, refused):
    ByteTokenizer().save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    if part == "decoder":
        step["decoders"][0] |= {"add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    file.write_text(json.dumps({**content, part: step}))
    if refused:
        with pytest.raises(UsageError, match="over 64 times as long"):
            PretrainedTokenizer(tmp_path)
    else:
        assert PretrainedTokenizer(tmp_path).encode("a") == [97]


@pytest.mark.parametrize(
    "change",
    [
        {"added_tokens": [{"id": 10**9, "content": "<|far|>", "special": True, "normalized": False,
                           "single_word": False, "lstrip": False, "rstrip": False}]},
        {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                            {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
                            "special_tokens": {"<s>": {"id": "<s>", "ids": [10**9], "tokens": ["<s>"]}}}},
        {"post_processor": {"type": "BertProcessing", "sep": ["</s>", 10**9], "cls": ["<s>", 1]}},
        {"post_processor": {"type": "Sequence", "processors": [
            {"type": "BertProcessing", "sep": ["</s>", 10**9], "cls": ["<s>", 1]}]}},
        {"vocab": {"far": 10**9}},
    ],
)  # fmt: skip
def test_ids_are_bounded(tmp_path, change):
    ByteTokenizer().save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    change = dict(change)
    extra = change.pop("added_tokens", [])
    content["model"]["vocab"] |= change.pop("vocab", {})
    file.write_text(json.dumps({**content, **change, "added_tokens": [*content["added_tokens"], *extra]}))
    with pytest.raises(UsageError, match=r"tokenizer.json: holds token id 1,000,000,000, ids must be below [\d,]+; "):
        PretrainedTokenizer(tmp_path)


def test_deep_nesting_is_one_line(tmp_path):
    ByteTokenizer().save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[" * 200_000)
    with pytest.raises(UsageError, match=r"tokenizer.json: "):
        PretrainedTokenizer(tmp_path)
