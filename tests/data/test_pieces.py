"""Single tokens: the bytes that they add, their names, and where they begin in a text."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizer_kinds import KINDS

from headstart.data.pieces import TextOffsets, piece_bytes, piece_name
from headstart.data.tokenizers import ByteTokenizer, PretrainedTokenizer, Tokenizer

STRINGS = (" the model", "x日=1", "é= 1", "日本🎉 x\n\n  y", "\x00\x7f", "don't  stop", "🎉")
NAMES = ("bytes", *KINDS)


def tokenizer_of(name: str, folder: Path) -> Tokenizer:
    return ByteTokenizer() if name == "bytes" else KINDS[name](folder)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_names_and_places_of_the_tokens_of_a_text(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(name, tmp_path)
    prompt = tokenizer.encode("x")
    for text in STRINGS:
        # The tokens of the text behind a prompt: alone it might begin with another space.
        tokens = tokenizer.encode("x" + text)[len(prompt) :]
        assert tokenizer.decode([*prompt, *tokens]) == "x" + text
        content = [piece_bytes(tokenizer, token) for token in tokens]
        assert b"".join(content) == text.encode()
        for token, part in zip(tokens, content):
            try:
                assert piece_name(tokenizer, token) == part.decode()
            except UnicodeDecodeError:
                assert piece_name(tokenizer, token) == "bytes:" + "".join(f"\\x{byte:02x}" for byte in part)
        offsets = TextOffsets(tokenizer, prompt, 5)
        places = [5 + len(b"".join(content[:i]).decode(errors="ignore")) for i in range(len(tokens))]
        assert [offsets.push(token) for token in tokens] == places


@pytest.mark.parametrize("name", NAMES)
def test_no_two_tokens_share_a_name(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(name, tmp_path)
    names = [piece_name(tokenizer, token) for token in range(tokenizer.vocab_size + 3)]
    assert len(set(names)) == len(names)
    assert names[tokenizer.end_id] == ("<|end|>" if name == "bytes" else "</s>")
    assert names[-1] == f"token_id:{tokenizer.vocab_size + 2}"
    assert piece_bytes(tokenizer, tokenizer.end_id) == piece_bytes(tokenizer, tokenizer.vocab_size + 2) == b""


def test_the_usual_token_of_a_text_has_its_name(tmp_path: Path) -> None:
    tokenizer = KINDS["llama2"](tmp_path)
    assert isinstance(tokenizer, PretrainedTokenizer)
    of = {tokenizer.piece(token): token for token in range(tokenizer.vocab_size)}
    named = {"<0x09>": "\t", "<0x41>": "A", "<0x61>": "bytes:\\x61", "<0x20>": "bytes:\\x20", "▁": " ", "a": "a"}
    assert {piece: piece_name(tokenizer, of[piece]) for piece in named} == named


def test_places_after_bytes_that_are_no_text(tmp_path: Path) -> None:
    tokenizer = KINDS["llama2"](tmp_path)
    bad, a = tokenizer.encode("x日")[-3:-1], tokenizer.encode("xx")[-1]
    offsets = TextOffsets(tokenizer, [a])
    # Each byte of a run that is no text becomes a character of its own; that is certain when the run has ended.
    places = [offsets.push(token) for token in (*bad, a, a)]
    assert places[:2] == [0, 0] and places[3] == len(tokenizer.decode([a, *bad, a])) - 1
