"""The official client, against a real server: what it gets is what decoding gives offline."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

import headstart
from headstart.serving.server import Server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def model() -> headstart.api.LanguageModel:
    return headstart.load()


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["python-bytes-8"]
    assert client.models.retrieve("python-bytes-8").id == "python-bytes-8"


def test_a_completion_is_the_offline_output(client, model) -> None:
    # How many heads pay is a matter of time; the text does not depend on it, passes do.
    answer = client.completions.create(
        model="python-bytes-8", prompt="def f(", max_tokens=40, temperature=0.8, seed=5,
        extra_body={"speculative": {"heads": 8}},
    )  # fmt: skip
    offline = model.generate("def f(", max_new_tokens=40, temperature=0.8, seed=5, heads=8)
    assert answer.choices[0].text == offline.text and answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (6, 40, 46)
    assert answer.usage.speculative["passes"] == offline.stats.passes


def test_a_stream_is_the_offline_output_with_origins(client, model) -> None:
    stream = client.completions.create(
        model="python-bytes-8", prompt="def f(", max_tokens=40, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body={"speculative": {"heads": 8, "origins": True}},
    )  # fmt: skip
    *chunks, last = list(stream)
    offline = model.generate("def f(", max_new_tokens=40, heads=8)
    assert "".join(chunk.choices[0].text for chunk in chunks) == offline.text
    assert len(chunks) > 5 and chunks[-1].choices[0].finish_reason == "length"
    parts = [part for chunk in chunks for part in chunk.choices[0].speculative["tokens"]]
    heads = [part["head"] for part in parts for _ in part["text"]]
    assert heads == offline.origins and max(heads) > 2
    assert not last.choices and last.usage.completion_tokens == 40
