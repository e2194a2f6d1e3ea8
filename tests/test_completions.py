"""Completions of existing models: where they end, and which text they are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from chats import chat_tokenizer
from tokenizer_kinds import KINDS, random_model, sentencepiece

from headstart.api import LanguageModel
from headstart.data.tokenizers import PretrainedTokenizer
from headstart.decoding.constraints import Constraint, compiled
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.generation import OriginStream
from headstart.decoding.settings import Penalties, Request
from headstart.errors import UsageError
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_model_tokenizer

PROMPT = "the text of"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("llama2")
    tokenizer = sentencepiece(folder)
    save_model(random_model(tokenizer.vocab_size), folder / "model", tokenizer)
    return LanguageModel(random_model(tokenizer.vocab_size), tokenizer, folder / "model")


def name_ends(folder: Path, generation: Any, config: Any) -> None:
    for file, value in (("generation_config.json", generation), ("config.json", config)):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | {"eos_token_id": value}))


def ends_of(model: LanguageModel, generation: Any, config: Any) -> set[int]:
    assert model._directory is not None
    name_ends(model._directory, generation, config)
    tokenizer = load_model_tokenizer(model._directory)
    assert tokenizer is not None
    return set(tokenizer.end_ids)


def test_the_directory_names_the_ends(model: LanguageModel) -> None:
    own = model.tokenizer.end_id
    assert ends_of(model, [7, 9], 3) == {own, 7, 9}
    assert ends_of(model, 7, [3, 4]) == {own, 7}
    assert ends_of(model, None, [3, 4]) == {own, 3, 4}
    assert ends_of(model, None, None) == ends_of(model, [], own) == {own}
    assert ends_of(model, [-1, 7], None) == {own, 7}  # -1 is no id of the vocabulary
    for wrong in ("</s>", [1, "2"], 1.5, True, {"a": 1}, model.tokenizer.vocab_size, [7, -2], [10**30]):
        with pytest.raises(UsageError, match=r"generation_config.json: eos_token_id is .*a token id or a list"):
            ends_of(model, wrong, None)
        with pytest.raises(UsageError, match=r"/config.json: eos_token_id is .*a token id"):
            ends_of(model, None, wrong)


def test_each_of_the_ends_ends_a_generation(model: LanguageModel) -> None:
    prompt = tuple(model.tokenizer.encode(PROMPT))
    free = generate_all(Engine(model.transformer), [Request(prompt, 40)])[0].tokens
    assert len(set(free)) > 3
    for token in (free[5], free[20]):
        tokenizer = PretrainedTokenizer(model.tokenizer.directory)  # type: ignore[attr-defined]
        tokenizer.end_ids |= {token, -1, 9999}
        ended, before = LanguageModel(random_model(tokenizer.vocab_size), tokenizer), free[: free.index(token)]
        for heads in (1, 2):
            found = ended.generate(prompt, max_new_tokens=40, heads=heads)
            assert (found.tokens, found.finish_reason) == (before, "end")
        assert "".join(ended.stream(prompt, max_new_tokens=40)) == found.text
        # An end that one request names is no end of the others.
        engine = Engine(model.transformer, EngineConfig(slots=2))
        both = generate_all(engine, [Request(prompt, 40, ends=frozenset([token])), Request(prompt, 40)])
        assert [generation.tokens for generation in both] == [before, free]


def test_a_constrained_text_ends_by_any_end_when_it_may(model: LanguageModel) -> None:
    end = model.tokenizer.encode("x<|turn_end|>")[-1]
    tokenizer = PretrainedTokenizer(model.tokenizer.directory)  # type: ignore[attr-defined]
    tokenizer.end_ids |= {end}
    matcher = compiled(Constraint.regex("ab*"), tokenizer, model.config.vocab_size)
    assert not matcher.allowed()[[end, tokenizer.end_id]].any()
    assert matcher.push(tokenizer.encode("xa")[-1]) and matcher.allowed()[[end, tokenizer.end_id]].all()
    alone = compiled(Constraint.regex("ab*"), tokenizer, model.config.vocab_size, [tokenizer.end_id])
    assert alone.push(tokenizer.encode("xa")[-1]) and not alone.allowed()[end]


def test_an_answer_to_messages_ends_with_its_turn(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path)
    model = LanguageModel(random_model(tokenizer.vocab_size), tokenizer)
    turn_end = tokenizer.encode("<|im_end|>")[0]
    assert turn_end not in tokenizer.end_ids
    messages, wanted = [{"role": "user", "content": "x"}], Penalties(bias=((turn_end, 1000.0),))
    chat, plain = model.generate([messages, "x"], max_new_tokens=3, penalties=wanted)  # type: ignore[list-item, arg-type]
    assert (chat.tokens, chat.finish_reason) == ([], "end") and plain.tokens == [turn_end] * 3
    assert "".join(model.stream(messages, max_new_tokens=3, penalties=wanted)) == ""


@pytest.mark.parametrize("name", KINDS)
def test_prompt_and_text_together_are_the_text_of_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = KINDS[name](tmp_path)
    model = LanguageModel(random_model(tokenizer.vocab_size), tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prompts = [PROMPT, "def f(x):\n", "hello 日", " "]
    for prompt, found in zip(prompts, model.generate(prompts, max_new_tokens=24)):  # type: ignore[arg-type]
        ids = tokenizer.encode(prompt)
        whole, start = (theirs.decode(x, skip_special_tokens=True) for x in ([*ids, *found.tokens], ids))
        if whole.startswith(start):  # bytes may change the text of those before them
            assert whole[len(start) :] == found.text
        assert "".join(model.stream(prompt, max_new_tokens=24)) == found.text


@pytest.mark.parametrize("name", KINDS)
def test_constraints_and_stop_strings_are_of_the_text_given(name: str, tmp_path: Path) -> None:
    tokenizer = KINDS[name](tmp_path)
    model = LanguageModel(random_model(tokenizer.vocab_size), tokenizer)
    for pattern in (" the model", " ", "the", "  y = x\n", " ?[a-f]{1,6} 日", "\n| x"):
        found = model.generate(PROMPT, max_new_tokens=40, constraint=Constraint.regex(pattern))
        assert re.fullmatch(pattern, found.text), (pattern, found.text)
    options = [" the", " no", "yes"]
    for prompt in (PROMPT, "hello", "x\n"):
        assert model.generate(prompt, max_new_tokens=20, constraint=Constraint.choice(options)).text in options
    body = Constraint.regex(" the text is the same")
    for stop, text in ((" the", ""), (" text", " the"), ("t is", " the tex"), (" is the s", " the text")):
        found = model.generate(PROMPT, max_new_tokens=40, constraint=body, stop=[stop])
        assert (found.text, found.finish_reason) == (text, "stop")


def test_origins_and_text_agree(model: LanguageModel) -> None:
    engine = model.engine(1, 100)
    generation = engine.submit(
        Request(tuple(model.tokenizer.encode(PROMPT)), 30, constraint=Constraint.regex(" the model( the)*"))
    )
    origins, pieces = OriginStream(generation, model.tokenizer), []
    for _ in engine.run():
        pieces += origins.new()
    assert "".join(piece for piece, _ in pieces) == generation.text != ""
    assert generation.text.startswith(" the model")
