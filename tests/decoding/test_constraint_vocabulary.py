"""Constraints on vocabularies without a token for every byte: what cannot be written is excluded, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizer_kinds import BYTE_TOKENS, byte_level, random_model, sentencepiece

from headstart.api import LanguageModel
from headstart.data.tokenizers import PretrainedTokenizer
from headstart.decoding.constraint_vocabulary import UTF8_BYTES, vocabulary_of
from headstart.decoding.constraints import Constraint, compiled
from headstart.errors import UsageError

LACKING = bytes([0x04, 0x1F, 0x7F, 0xC8, 0xF1, 0xF4])


def without_byte_tokens(folder: Path) -> PretrainedTokenizer:
    """Like Llama 2, with 16 of the 256 byte tokens renamed: they fall back to <unk>."""
    sentencepiece(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    for byte in range(0xE0, 0xF0):
        content["model"]["vocab"][f"used_{byte}"] = content["model"]["vocab"].pop(BYTE_TOKENS[byte])
    file.write_text(json.dumps(content))
    return PretrainedTokenizer(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    tokenizer = byte_level(tmp_path_factory.mktemp("lacking"), digits=True, lacking=LACKING)
    # More rows than the tokenizer has ids: stand-ins of bytes must not be taken for those.
    return LanguageModel(random_model(tokenizer.vocab_size + 9), tokenizer)


def test_what_the_vocabulary_can_write(model: LanguageModel) -> None:
    vocabulary = vocabulary_of(model.tokenizer)
    assert bytes(vocabulary.lacking) == LACKING and vocabulary.size == model.tokenizer.vocab_size
    assert vocabulary.can_write("the ü 日🎉\n") and vocabulary.can_write("")
    assert not any(map(vocabulary.can_write, ["a\x04", "\x7fb", "Ȁ", "\U00040000", "\U0010ffff"]))
    assert vocabulary.writable is not None
    allowed = re.compile(re.sub(r"\\u\{([0-9a-f]+)\}", lambda m: f"\\U{int(m[1], 16):08x}", vocabulary.writable))
    for point in (*range(0x900), 0xFFFF, 0x10000, 0x3FFFF, 0x40000, 0x7FFFF, 0x80000, 0xFFFFF, 0x100000, 0x10FFFF):
        assert bool(allowed.fullmatch(chr(point))) == (chr(point).encode()[0] not in LACKING), hex(point)


def test_only_what_cannot_be_written_is_excluded(model: LanguageModel) -> None:
    whole = r"[\x00-\x7f]*"
    matcher = compiled(Constraint.regex(whole), model.tokenizer, model.config.vocab_size)
    words = vocabulary_of(model.tokenizer)
    ascii_tokens = [
        token for token in range(words.size) if (piece := words.ll.decode_bytes([token])) and max(piece) < 0x80
    ]
    text = [token for token in ascii_tokens if not words.ll.is_special_token(token)]
    assert np.flatnonzero(matcher.allowed()).tolist() == sorted([*text, model.tokenizer.end_id])


@pytest.mark.parametrize(
    ("constraint", "outputs"),
    [
        (Constraint.regex("a\x04c|ab"), {"ab"}),
        (Constraint.regex(r"x[\x00-\x1f]{1,3}y"), None),
        (Constraint.regex("(日|Ȁ|\U00040000)+!"), None),
        (Constraint.choice(["a\x04", "ab", "a\U0010ffff"]), {"ab"}),
        (Constraint.choice(["Ȁ", "é\n"]), {"é\n"}),
        (Constraint.json_schema({"enum": ["\x04\x7f"]}), None),
        (Constraint.json_schema({"type": "string", "maxLength": 5}), None),
        (Constraint.lark('start: "the model" | "no 1986"'), {"the model", "no 1986"}),
    ],
)
def test_outputs_satisfy_the_constraint(constraint: Constraint, outputs: set[str] | None, model: LanguageModel) -> None:
    for seed, heads in ((0, 1), (1, 2)):
        found = model.generate(
            "the text", max_new_tokens=60, constraint=constraint, seed=seed, temperature=1.0, heads=heads
        )
        assert found.finish_reason in ("end", "length")
        assert outputs is None or found.text in outputs
        assert not set(found.text.encode()) & set(LACKING)
        if constraint.kind == "regex" and found.finish_reason == "end":
            assert re.fullmatch(constraint.text, found.text)
        if constraint.kind == "json_schema" and found.finish_reason == "end":
            assert isinstance(json.loads(found.text), str)


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint.regex("abc\x04"),
        Constraint.regex("[\U00040000-\U0007ffff]x"),
        Constraint.choice(["a\x04", "\x7f"]),
        Constraint.lark('start: "a" "\\u007f"'),
        Constraint.json_schema({"const": "ab\U00040000"}),
    ],
)
def test_a_constraint_that_nothing_writable_satisfies(constraint: Constraint, model: LanguageModel) -> None:
    with pytest.raises(UsageError, match=r"^\S.*: no text of this model's tokens satisfies it; loosen it$"):
        model.generate("the text", constraint=constraint)


def test_a_vocabulary_that_falls_back_to_some_bytes(tmp_path: Path) -> None:
    tokenizer = without_byte_tokens(tmp_path)
    vocabulary = vocabulary_of(tokenizer)
    assert vocabulary.lacking == tuple(range(0xE0, 0xF0)) and set(vocabulary.lacking) < set(UTF8_BYTES)
    model = LanguageModel(random_model(tokenizer.vocab_size), tokenizer)
    for pattern in (" the( model| 日)", "(日|é)b", " ?yes"):
        found = model.generate("the text of", max_new_tokens=30, constraint=Constraint.regex(pattern))
        assert found.finish_reason == "end" and re.fullmatch(pattern, found.text) and "日" not in found.text
    with pytest.raises(UsageError, match="no text of this model's tokens"):
        model.generate("the", constraint=Constraint.choice(["日", "a日"]))


def test_a_first_space_survives_behind_a_prompt_of_special_tokens_alone(tmp_path: Path) -> None:
    """A decoder like Llama 2's strips the space of a text's first token, but the constraint asks for it."""
    tokenizer = sentencepiece(tmp_path)
    model = LanguageModel(random_model(tokenizer.vocab_size), tokenizer)
    start = tokenizer.encode("<s>")[-1]
    for prompt in ([start], [start, start], [start, *tokenizer.encode("the")]):
        found = model.generate(prompt, max_new_tokens=30, constraint=Constraint.regex(" the model"))
        assert (found.finish_reason, found.text) == ("end", " the model")
        pieces = model.stream(prompt, max_new_tokens=30, constraint=Constraint.regex(" the model"))
        assert "".join(pieces) == " the model"
