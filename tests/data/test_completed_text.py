"""A completion is decoded behind its prompt: prompt and text together are the text of all tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS

from headstart.data.detokenizer import TextStream
from headstart.data.tokenizers import PretrainedTokenizer

KNOWN: dict[str, PretrainedTokenizer] = {}


@pytest.fixture(scope="module", autouse=True)
def made(tmp_path_factory: pytest.TempPathFactory) -> None:
    for name, make in KINDS.items():
        KNOWN[name] = make(tmp_path_factory.mktemp(name))


def completed(tokenizer: PretrainedTokenizer, before: list[int], tokens: list[int]) -> str:
    stream = TextStream(tokenizer, before)
    return "".join(stream.push([token]) for token in tokens) + stream.finish()


@pytest.mark.parametrize("name", KINDS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_prompt_and_text_are_the_text_of_all_tokens(name: str, data: st.DataObject) -> None:
    tokenizer = KNOWN[name]
    ids = st.integers(0, tokenizer.vocab_size - 1)
    words = ids if name in ("llama3", "smollm") else ids | st.integers(260, tokenizer.vocab_size - 1)
    before, tokens = data.draw(st.lists(words, max_size=12)), data.draw(st.lists(words, max_size=12))
    whole, start = tokenizer.decode([*before, *tokens]), tokenizer.decode(before)
    text = completed(tokenizer, before, tokens)
    if whole.startswith(start) and "\ufffd" not in start:
        assert text == whole[len(start) :]
    if not start:
        assert text == whole


@pytest.mark.parametrize(("name", "text"), [("llama2", " the model"), ("metaspace", " the model"), ("gemma", " the")])
def test_the_first_space_is_kept(name: str, text: str) -> None:
    tokenizer = KNOWN[name]
    tokens = tokenizer.encode("x" + text)[1 if name == "gemma" else 2 :]
    tokens = tokens if tokenizer.decode([*tokenizer.encode("x"), *tokens]) == "x" + text else tokenizer.encode(text[1:])
    for prompt in ("x", "import class", "日", "日日日日日日", " ", "<s>x"):
        assert completed(tokenizer, tokenizer.encode(prompt), tokens) == text, prompt
    # At the beginning of a text it is what `decode` gives.
    assert completed(tokenizer, [], tokens) == completed(tokenizer, [1, 1], tokens) == tokenizer.decode(tokens)


def test_bytes_of_a_prompt_do_not_change_those_behind() -> None:
    tokenizer = KNOWN["llama2"]
    first, second, third = (tokenizer.encode("x日")[-3:], tokenizer.encode("x本")[-3:], tokenizer.encode("x<s>")[-1:])
    assert [completed(tokenizer, before, second) for before in (first, first * 4, [*first, *third])] == ["本"] * 3
    # A character that stays unfinished is no reason to lose the one before it.
    assert completed(tokenizer, first, second[:2]) == "\ufffd\ufffd"
