"""Check fields of other servers that clients send: what they ask for is in the answer, with and without drafts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from chats import chat_tokenizer
from serving.conftest import HTTP, raw, running

import headstart
from headstart.decoding.constraints import Constraint
from headstart.errors import UsageError
from headstart.formats.huggingface import save_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.serving.server import Server
from headstart.serving.settings import ServeSettings

PROMPT = "def f("
ALL, PLAIN = {"policy": "fixed"}, {"enabled": False}


def ask(server: Server, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    status, answer = raw(server, json.dumps(body).encode(), path)
    assert status == 200, answer
    return answer


def complete(server: Server, **body: Any) -> dict[str, Any]:
    return ask(server, **{"prompt": PROMPT, "max_tokens": 24, "temperature": 0, **body})


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=264, dim=32, layers=4, attention_heads=2, heads=3, context=128)
    save_model(Transformer(config), folder / "talker", chat_tokenizer(folder / "tokenizer"))
    with running(ServeSettings(port=0, slots=2), folder / "talker") as server:
        yield server


@pytest.mark.parametrize("speculative", [ALL, PLAIN], ids=["drafts", "plain"])
def test_no_end_comes_before_the_minimum(speculative: dict[str, Any], server: Server, model: Any) -> None:
    whole = model.generate(PROMPT, max_new_tokens=40)
    token, text = whole.tokens[9], whole.text[5:7]
    stops = {"stop_token_ids": [token], "stop": [text], "max_tokens": 40, "speculative": speculative}
    assert len(complete(server, **stops)["choices"][0]["text"]) < 10
    found, plain = (complete(server, **{**stops, "speculative": how}, min_tokens=16) for how in (speculative, PLAIN))
    tokens = model.tokenizer.encode(found["choices"][0]["text"])
    assert len(tokens) >= 16 and token not in tokens[:16]  # it is not generated there
    assert found["choices"] == plain["choices"]
    if found["usage"]["completion_tokens"] < 40:
        assert found["choices"][0]["finish_reason"] == "stop"


def test_a_minimum_does_not_suit_a_constraint() -> None:
    model = headstart.load()
    with pytest.raises(UsageError, match="min_new_tokens is 3: a constraint ends"):
        model.generate("x", min_new_tokens=3, constraint=Constraint.regex("a"))
    with pytest.raises(UsageError, match="min_new_tokens is -1"):
        model.generate("x", min_new_tokens=-1)


def test_special_tokens_are_in_the_text_on_request(chatting: Server) -> None:
    start = 261
    body = {"prompt": "he", "max_tokens": 6, "temperature": 0, "logit_bias": {str(start): 100}, "logprobs": 0}
    hidden, shown = ask(chatting, **body), ask(chatting, **body, skip_special_tokens=False)
    assert hidden["choices"][0]["text"] == "" and shown["choices"][0]["text"] == "<|im_start|>" * 6
    assert shown["choices"][0]["logprobs"]["text_offset"] == [12 * i for i in range(6)]
    stream = HTTP.post(f"{chatting.url}/v1/completions", json={**body, "skip_special_tokens": False, "stream": True})
    events = [json.loads(line[6:]) for line in stream.text.split("\n\n") if line.startswith("data: {")]
    assert "".join(each["choices"][0]["text"] for each in events) == "<|im_start|>" * 6


def test_log_probabilities_of_the_prompt(server: Server, model: Any, chatting: Server) -> None:
    tokens = model.tokenizer.encode(PROMPT)
    first, *others = complete(server, prompt_logprobs=1, max_tokens=1)["choices"][0]["prompt_logprobs"]
    offline = model.generate(PROMPT, max_new_tokens=1, prompt_logprobs=1)
    assert first is None and len(others) == len(tokens) - 1
    for token, found, own, [(best, highest)] in zip(
        tokens[1:], others, offline.prompt_logprobs, offline.prompt_top_logprobs
    ):
        assert set(found) == {str(token), str(best)} and found[str(best)]["rank"] == 1
        assert (found[str(token)]["logprob"], found[str(best)]["logprob"]) == (own, highest)
        assert found[str(token)]["decoded_token"] == chr(token)
    chat = {"messages": [{"role": "user", "content": "he"}], "max_tokens": 2, "prompt_logprobs": 0}
    answer = ask(chatting, "/v1/chat/completions", **chat)
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


def test_the_best_of_several_outputs_have_the_most_probable_tokens(server: Server, model: Any) -> None:
    sampled = {"temperature": 1, "seed": 3}
    found = complete(server, **sampled, n=2, best_of=5)
    outputs = [model.generate(PROMPT, max_new_tokens=24, temperature=1.0, seed=3 + i, logprobs=0) for i in range(5)]
    outputs.sort(key=lambda output: sum(output.logprobs) / len(output.logprobs), reverse=True)
    assert [choice["text"] for choice in found["choices"]] == [output.text for output in outputs[:2]]
    assert [choice["index"] for choice in found["choices"]] == [0, 1] and found["choices"][0]["logprobs"] is None
    assert found["usage"]["completion_tokens"] == sum(len(output.tokens) for output in outputs)


def test_prompts_are_truncated_at_their_beginning(server: Server, model: Any) -> None:
    found = complete(server, prompt="x = 1\n" + PROMPT, truncate_prompt_tokens=6, echo=True)
    assert found["choices"][0]["text"] == PROMPT + model.generate(PROMPT, max_new_tokens=24).text
    assert found["usage"]["prompt_tokens"] == 6
    context = server.service.context
    long = complete(server, prompt="y" * (2 * context), truncate_prompt_tokens=-1, max_tokens=4)
    assert long["usage"]["prompt_tokens"] == context - 4 and long["usage"]["completion_tokens"] == 4


def test_the_costs_of_an_answer(server: Server, model: Any) -> None:
    prompt = "def area(width, height):\n"
    found = complete(server, prompt=prompt, speculative=ALL)
    usage, timings, stats = found["usage"], found["timings"], model.generate(prompt, max_new_tokens=24, heads=8).stats
    told = usage["speculative"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 0}
    assert told["acceptance_histogram"] == stats.accepted_counts and sum(stats.accepted_counts) == stats.passes
    assert told["mean_acceptance_length"] >= told["tokens_per_pass"] > 1
    assert told["draft_acceptance_rate"] == round(told["accepted"] / told["drafted"], 3)
    assert timings["prompt_n"] + timings["cache_n"] == len(prompt) and timings["predicted_n"] == 24
    assert (timings["draft_n"], timings["draft_n_accepted"]) == (told["drafted"], told["accepted"])
    assert math.isclose(timings["predicted_per_token_ms"] * 24, timings["predicted_ms"], rel_tol=0.01)


def test_costs_come_with_each_chunk_on_request(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        chunks = list(
            client.completions.create(
                model="python-bytes-8", prompt=PROMPT, max_tokens=16, temperature=0, stream=True,
                stream_options={"include_usage": True, "continuous_usage_stats": True},
                extra_body={"timings_per_token": True},
            )
        )  # fmt: skip
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert len(chunks) > 2 and counts == sorted(counts) and counts[0] < counts[-1] == 16
    assert all(chunk.timings["predicted_n"] == count for chunk, count in zip(chunks, counts))


def test_texts_become_tokens_and_back(server: Server, chatting: Server) -> None:
    found = ask(server, "/tokenize", prompt="hé", return_token_strs=True)
    assert found["tokens"] == list("hé".encode()) and found["count"] == 3 and found["token_strs"][0] == "h"
    assert found["max_model_len"] == server.service.context
    assert ask(server, "/detokenize", tokens=found["tokens"]) == {"prompt": "hé"}
    chat = [{"role": "user", "content": "hé"}]
    tokens = ask(chatting, "/tokenize", messages=chat)["tokens"]
    answer = ask(chatting, "/v1/chat/completions", messages=chat, max_tokens=1)
    assert len(tokens) == answer["usage"]["prompt_tokens"]
    assert len(ask(chatting, "/tokenize", messages=chat, add_generation_prompt=False)["tokens"]) < len(tokens)
    assert HTTP.get(f"{server.url}/version").json() == {"version": headstart.__version__}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {"tokens": [256]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
    ],
)
def test_wrong_texts_and_tokens_are_refused(path: str, body: dict[str, Any], param: str, server: Server) -> None:
    status, answer = raw(server, json.dumps(body).encode(), path)
    assert status == 400 and answer["error"]["param"] == param, answer
