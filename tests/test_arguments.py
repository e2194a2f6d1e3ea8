"""Settings at the edges of their types, in the API: the value that the docs promise, or UsageError."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from chats import chat_tokenizer

import headstart
from headstart import Penalties, UsageError
from headstart.api import LanguageModel
from headstart.arguments import number, token_ids, whole_number
from headstart.data.tokenizers import ByteTokenizer, PretrainedTokenizer
from headstart.decoding.drafters.tree import MOST_NODES, DraftTree, grow, parse_tree
from headstart.decoding.settings import Rule
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer


def _model(vocab_size: int, tokenizer: ByteTokenizer | PretrainedTokenizer) -> LanguageModel:
    """Weights from a formula: whatever the processor, the greedy tokens differ from those of noise."""
    model = Transformer(ModelConfig(vocab_size=vocab_size, dim=16, layers=3, attention_heads=2, context=64, heads=2))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            values = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_(torch.sin(values * (1.7 + number)).mul(0.5).reshape(parameter.shape))
    return LanguageModel(model, tokenizer)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return _model(256, ByteTokenizer())


def _tokens(model: LanguageModel, prompt: object = "ab", **settings: object) -> list[int]:
    return model.generate(prompt, **({"max_new_tokens": 8} | settings)).tokens  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.8, "top_p": 1e-46},
        {"temperature": 0.8, "top_p": 5e-324},
        {"temperature": 0.8, "top_k": 1},
        *({"temperature": 1e-46, "acceptance": rule} for rule in ("match", "rejection", "block", "lossy-typical:0:0")),
        {"temperature": 5e-324, "top_p": 5e-324, "min_p": 5e-324},
        {"temperature": 1e-39},
        {"temperature": np.float32(0)},
        {"temperature": torch.tensor(0.0)},
        {"temperature": 0},
    ],
)
def test_settings_that_leave_one_token_are_greedy(model: LanguageModel, settings: dict[str, object]) -> None:
    assert _tokens(model, seed=5, **settings) == _tokens(model)


def test_the_other_extremes_change_nothing(model: LanguageModel) -> None:
    plain = _tokens(model, temperature=0.8, seed=3)
    assert plain != _tokens(model)
    for settings in (
        {"top_k": 2**63},
        {"top_k": 10**30},
        {"top_p": 1 - 1e-17},
        {"min_p": 5e-324},
        {"seed": np.int64(3)},
        {"seed": torch.tensor(3)},
        {"seed": np.array(3, dtype=np.uint8)},
        {"seed": 3 + 2**64},
        {"stop": None},
        {"stop": []},
        {"penalties": Penalties(bias={7: -float("inf")} if 7 not in plain else {200: -float("inf")})},  # type: ignore[arg-type]
    ):
        assert _tokens(model, **({"temperature": 0.8, "seed": 3} | settings)) == plain, settings


@pytest.mark.parametrize(
    "prompt",
    [
        (97, 98),
        range(97, 99),
        bytearray,
        np.array([97, 98]),
        np.array([97, 98], dtype=np.uint8),
        torch.tensor([97, 98], dtype=torch.int16),
        [np.int64(97), np.int32(98)],
        list(torch.tensor([97, 98])),
    ],
)
def test_ids_of_any_integer_type_are_a_prompt(model: LanguageModel, prompt: object) -> None:
    if prompt is bytearray:
        with pytest.raises(UsageError, match="token ids"):
            _tokens(model, bytearray(b"ab"))
        return
    assert _tokens(model, prompt) == _tokens(model, "ab")
    assert "".join(model.stream(prompt, 8)) == model.generate("ab", 8).text  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize("prompts", [np.array([[97, 98], [98, 99]]), [torch.tensor([97, 98]), "bc"], [(97, 98), "bc"]])
def test_several_prompts_and_seeds_in_arrays(model: LanguageModel, prompts: object) -> None:
    outputs = model.generate(prompts, 8, temperature=0.8, seed=np.array([3, 4]))  # type: ignore[arg-type]
    assert isinstance(outputs, list)
    alone = [_tokens(model, text, temperature=0.8, seed=seed) for text, seed in (("ab", 3), ("bc", 4))]
    assert [output.tokens for output in outputs] == alone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": b"ab"}, "give text, or a list of token ids"),
        ({"prompt": 5}, "give text, or a list of token ids"),
        ({"prompt": None}, "give text, or a list of token ids"),
        ({"prompt": {"role": "user", "content": "a"}}, "one message"),
        ({"prompt": {97}}, "give text, or a list of token ids"),
        ({"prompt": np.array(97)}, "dimensions"),
        ({"prompt": np.zeros((1, 1, 2), dtype=int)}, "dimensions"),
        ({"prompt": np.zeros((0, 3), dtype=int)}, "there is no prompt"),
        ({"prompt": np.array([97.0])}, "token 1 of the prompt is 97.0"),
        ({"prompt": [97, 98.5]}, "token 2 of the prompt is 98.5"),
        ({"prompt": [True]}, "token 1 of the prompt is True"),
        ({"prompt": np.array([True])}, "token 1 of the prompt is True"),
        ({"prompt": [97, None]}, "token 2"),
        ({"prompt": [97, "b"]}, "token 2"),
        ({"prompt": [-1]}, "token -1"),
        ({"prompt": [256]}, "token 256"),
        ({"prompt": [10**30]}, "token 1000"),
        ({"prompt": []}, "empty"),
        ({"prompt": np.array([], dtype=int)}, "empty"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"max_new_tokens": float("nan")}, "max_new_tokens is nan"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": -3}, "max_new_tokens is -3"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"max_new_tokens": "8"}, "max_new_tokens is '8'"),
        ({"max_new_tokens": None}, "max_new_tokens is None"),
        ({"temperature": 1e39}, "temperature is 1e\\+39"),
        ({"temperature": 10**400}, "temperature is inf"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": -1e-320}, "temperature is"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": None}, "temperature is None"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 1.0001}, "min_p"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": "1"}, "1 seeds|seed is '1'"),
        ({"seed": None}, "seed is None"),
        ({"heads": 0}, "heads is 0"),
        ({"heads": 10**30}, "heads is 1000"),
        ({"heads": 1.5}, "heads is 1.5"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"logprobs": 10**30}, "logprobs is 1000"),
        ({"logprobs": 1.0}, "logprobs is 1.0"),
        ({"stop": 5}, "stop is '5'"),
        ({"stop": [5]}, "stop is"),
        ({"stop": [""]}, "empty"),
        ({"lookup": -1}, "lookup is -1"),
        ({"lookup": 10**9}, "lookup is 1000000000"),
        ({"lookup": 0.5}, "lookup is 0.5"),
        ({"tree": 3000}, "more than 1,024 nodes"),
        ({"tree": 1_000_000}, "more than 1,024 nodes"),
        ({"tree": "1000000"}, "more than 1,024 nodes"),
        ({"tree": "9" * 5000}, "write its nodes"),
        ({"tree": -1}, "a draft tree of -1 nodes"),
        ({"tree": 1.5}, "tree is 1.5"),
        ({"tree": "--5"}, "write its nodes"),
        ({"tree": ",".join(["0"] * 2000)}, "too large"),
        ({"acceptance": 5}, "acceptance is 5"),
        ({"acceptance": "lossy-typical:1e39:1"}, "between 0 and 1e\\+09"),
        ({"acceptance": "lossy-top-k:nan"}, "between 0 and"),
        ({"constraint": "[0-9]+"}, "constraint is str"),
        ({"penalties": {"presence": 1}}, "penalties is dict"),
        ({"penalties": Penalties(presence=1e39)}, "presence penalty is 1e\\+39"),
        ({"penalties": Penalties(frequency=-1e12)}, "frequency penalty is -1000000000000.0"),
        ({"penalties": Penalties(repetition=1e-46)}, "repetition penalty is 1e-46"),
        ({"penalties": Penalties(repetition=1e30)}, "repetition penalty is 1e\\+30"),
        ({"penalties": Penalties(bias=((101, 1e39),))}, "logit bias of token 101"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_is_no_such_setting_is_refused_in_a_line(
    model: LanguageModel, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        _tokens(model, **({"prompt": "ab"} | settings))  # type: ignore[arg-type]
    assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)


@pytest.mark.parametrize("bias", [5, ((1,),), {"a": 1.0}, ((1.5, 2.0),), ((1, "x"),)])
def test_a_bias_of_another_form_is_refused(bias: object) -> None:
    with pytest.raises(UsageError, match="logit bias"):
        Penalties(bias=bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_penalties_write_tokens_of_the_vocabulary_that_noise_did_not_choose(
    model: LanguageModel, sign: int
) -> None:
    """At the bounds nothing overflows: no logit is NaN, of which the largest would be token 0."""
    for penalties in (Penalties(1e6), Penalties(1e-6), Penalties(presence=sign * 1e9), Penalties(frequency=sign * 1e9)):
        for temperature in (0.0, 1.0):
            written = _tokens(model, penalties=penalties, temperature=temperature, max_new_tokens=16)
            assert set(written) != {0}


@pytest.mark.parametrize("tokens", [[[256]], [[-1]], [1, 2], [[1], [1, 2]], [[1.5]], [[]], "ab", [[True]], None])
def test_logits_refuse_what_is_no_table_of_ids(model: LanguageModel, tokens: object) -> None:
    with pytest.raises(UsageError, match="tokens"):
        model.logits(tokens)  # type: ignore[arg-type]


def test_logits_of_arrays(model: LanguageModel) -> None:
    want = model.logits([[97, 98]])
    for tokens in (np.array([[97, 98]]), np.array([[97, 98]], dtype=np.uint8), torch.tensor([[97, 98]]).int()):
        assert torch.equal(model.logits(tokens), want)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="heads is 3"):
        model.logits([[97]], heads=3)


def test_a_tree_has_a_largest_size() -> None:
    assert parse_tree(np.int64(4), 4) == parse_tree("4", 4)
    assert parse_tree(MOST_NODES, 8) is not None
    with pytest.raises(UsageError, match="too large"):
        parse_tree(10**5000, 4)
    with pytest.raises(UsageError, match="too large"):
        grow([[0.5] * 8] * 7, MOST_NODES + 1)
    with pytest.raises(UsageError, match="too large"):
        DraftTree(tuple((rank,) for rank in range(MOST_NODES + 1)))


def test_rules_pass_through() -> None:
    assert Rule.parse(Rule("rejection")) == Rule.parse("rejection")


def test_numbers_keep_their_values() -> None:
    assert whole_number("n", np.uint64(2**63), 0) == 2**63
    assert number("x", np.float32(0.5)) == 0.5 and number("x", 10**400) == float("inf")
    assert token_ids(torch.tensor([1, 2])) == (1, 2)
    with pytest.raises(UsageError, match="more than 60 digits"):
        whole_number("n", 10**5000, 0, 7)


def test_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    """generate and stream of a conversation equal those of its rendered text, with the assistant's turn opened."""
    tokenizer = chat_tokenizer(tmp_path)
    model = _model(264, tokenizer)
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    text = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    want = model.generate(tokenizer.encode(text), 8)
    assert model.generate(chat, 8).tokens == want.tokens  # type: ignore[arg-type, union-attr]
    assert [o.tokens for o in model.generate([chat, chat], 8)] == [want.tokens] * 2  # type: ignore[arg-type, union-attr]
    assert "".join(model.stream(chat, 8)) == want.text  # type: ignore[arg-type, union-attr]
    for wrong in ([{"role": "user"}, 5], [{"content": "a"}]):
        with pytest.raises(UsageError, match="message"):
            model.generate(wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no chat template"):
        _model(256, ByteTokenizer()).generate(chat)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="has no tokenizer; give prompts as lists of token ids"):
        LanguageModel(Transformer(ModelConfig(dim=16, layers=2, attention_heads=2, heads=1)), None).generate(chat)  # type: ignore[arg-type]
    assert json.dumps(chat)  # the caller's messages are left as they were
    assert chat[1] == {"role": "user", "content": "hello"} and headstart.load is not None


def test_plain_decoding_commits_exactly_one_token_per_pass(model: LanguageModel) -> None:
    """Also where the last pass commits an end token, which is no part of the output."""
    free = model.generate("ab", 12, heads=1)
    end = Penalties(bias=((ByteTokenizer().end_id, 1e4),))
    ended = model.generate("ab", 12, heads=1, penalties=end)
    several = model.generate(["ab", "cd", "e"], 7, temperature=0.9, seed=[1, 2, 3], heads=1)
    assert (ended.finish_reason, ended.tokens, ended.stats.passes, ended.stats.ends) == ("end", [], 1, 1)  # type: ignore[union-attr]
    stopped = model.generate("ab", 12, heads=1, stop=free.text[3:5])  # type: ignore[union-attr]
    for output in (free, ended, stopped, *several):  # type: ignore[misc]
        assert output.stats.tokens_per_pass == output.stats.summary()["tokens_per_pass"] == 1.0
