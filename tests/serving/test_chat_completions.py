"""Check chat completions, with the chat template of a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest
import torch
from chats import chat_tokenizer
from serving.conftest import raw, running

import headstart
from headstart.data.chat_template import need_chat_template
from headstart.data.tokenizers import load_tokenizer
from headstart.errors import UsageError
from headstart.formats.huggingface import save_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.serving.settings import ServeSettings

MESSAGES = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "hé"}]},
]
RENDERED = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[openai.OpenAI, headstart.api.LanguageModel]]:
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = chat_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=264, dim=32, layers=4, attention_heads=2, heads=3, context=128)
    save_model(Transformer(config), folder / "talker", tokenizer)
    with (
        running(ServeSettings(port=0, slots=2, name="talks"), folder / "talker") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client, headstart.load(folder / "talker")


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_a_chat_is_the_offline_output_of_its_template(limit, chatting) -> None:
    client, model = chatting
    prompt = model.tokenizer.encode(RENDERED)
    answer = client.chat.completions.create(model="talks", messages=MESSAGES, temperature=0.9, seed=4, **{limit: 12})
    offline = model.generate(prompt, max_new_tokens=12, temperature=0.9, seed=4)
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", offline.text)
    assert answer.usage.prompt_tokens == len(prompt) and answer.usage.completion_tokens == len(offline.tokens)
    stream = client.chat.completions.create(
        model="talks", messages=MESSAGES, temperature=0.9, seed=4, stream=True, **{limit: 12}
    )
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert "".join(delta.content for delta in deltas) == offline.text
    assert [delta.role for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]


def test_a_chat_stops_at_the_end_of_its_turn(chatting) -> None:
    client, model = chatting
    turn_end = model.tokenizer.encode("<|im_end|>")[0]
    assert turn_end != model.tokenizer.end_id
    settings = {"model": "talks", "max_tokens": 4, "temperature": 0, "logit_bias": {str(turn_end): 100}}
    answer = client.chat.completions.create(messages=MESSAGES, **settings)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", 0)
    stream = list(client.chat.completions.create(messages=MESSAGES, stream=True, **settings))
    assert stream[-1].choices[0].finish_reason == "stop" and len(stream) == 1
    # A completion does not know of turns.
    plain = client.completions.create(prompt="a", **settings)
    assert (plain.choices[0].finish_reason, plain.usage.completion_tokens) == ("length", 4)


def test_a_chat_without_limit_fills_the_context(chatting) -> None:
    client, model = chatting
    prompt = model.tokenizer.encode(RENDERED)
    answer = client.chat.completions.create(model="talks", messages=MESSAGES, temperature=0)
    assert answer.usage.total_tokens == 128 or answer.choices[0].finish_detail == "end"
    assert answer.usage.completion_tokens == len(model.generate(prompt, max_new_tokens=128 - len(prompt)).tokens)


def test_log_probabilities_of_a_chat(chatting) -> None:
    client, model = chatting
    answer = client.chat.completions.create(
        model="talks", messages=MESSAGES, temperature=0, max_tokens=6, logprobs=True, top_logprobs=2
    )
    offline = model.generate(model.tokenizer.encode(RENDERED), max_new_tokens=6, logprobs=2)
    content = answer.choices[0].logprobs.content
    assert [token.logprob for token in content] == pytest.approx(offline.logprobs, abs=1e-4)
    assert [[t.logprob for t in token.top_logprobs] for token in content] == [
        pytest.approx([lp for _, lp in best], abs=1e-4) for best in offline.top_logprobs
    ]
    assert bytes(byte for token in content for byte in token.bytes).decode(errors="replace") == offline.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": ""}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "content"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "context"),
    ],
)
def test_unsupported_options_of_chats_are_refused(change, message, chatting) -> None:
    client, _ = chatting
    asked = {"model": "talks", "messages": MESSAGES, "max_tokens": 4, **change}
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**asked)


def test_a_model_without_a_template_says_so(server) -> None:
    status, answer = raw(server, b'{"messages": [{"role": "user", "content": "x"}]}', "/v1/chat/completions")
    message = answer["error"]["message"]
    assert status == 400 and "chat template" in message and "chat_template.jinja" not in message  # it would not be read


def test_the_template_that_the_error_requires_is_read(tmp_path) -> None:
    chat_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UsageError, match=r"put a chat_template\.jinja next to its tokenizer\.json"):
        need_chat_template(load_tokenizer(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert need_chat_template(load_tokenizer(tmp_path)).render([{"role": "user", "content": "x"}]) == "x"
