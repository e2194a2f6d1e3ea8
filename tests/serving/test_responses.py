"""Check OpenAI's responses with the official client: they are the output of the same chat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from chats import TOOLS, chat_tokenizer
from openai.types.responses import response_create_params
from serving.conftest import raw, running

from headstart.formats.huggingface import save_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.serving.responses import ResponseRequest
from headstart.serving.server import Server
from headstart.serving.settings import ServeSettings

TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"x": {"enum": [1, 2]}},
        "required": ["x"], "additionalProperties": False}}  # fmt: skip


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, openai.OpenAI]]:
    folder = tmp_path_factory.mktemp("answering")
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=264, dim=32, layers=4, attention_heads=2, heads=3, context=1024)
    save_model(Transformer(config), folder / "answers", chat_tokenizer(folder / "tokenizer", TOOLS))
    with (
        running(ServeSettings(port=0, slots=2, stream_interval=0), folder / "answers") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield server, client


def test_a_response_is_the_answer_of_the_chat(answering: Any) -> None:
    _, client = answering
    asked = {"model": "answers", "temperature": 0.8, "extra_body": {"seed": 3}}
    found = client.responses.create(input="hi", instructions="Be brief.", max_output_tokens=9, **asked)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    chat = client.chat.completions.create(messages=messages, max_tokens=9, **asked)
    assert found.output_text == chat.choices[0].message.content
    assert found.usage.input_tokens == chat.usage.prompt_tokens
    assert found.usage.output_tokens == chat.usage.completion_tokens
    cut = chat.choices[0].finish_reason == "length"
    assert found.status == ("incomplete" if cut else "completed")
    assert not cut or found.incomplete_details.reason == "max_output_tokens"


def test_a_stream_has_the_events_of_the_response(answering: Any) -> None:
    _, client = answering
    asked = {"model": "answers", "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]}
    asked |= {"temperature": 0, "max_output_tokens": 9}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:-1] == ["output_text.done", "content_part.done", "output_item.done"]
    assert set(kinds[4:-4]) == {"output_text.delta"} and kinds[-1] == whole.status
    assert "".join(event.delta for event in events if event.type.endswith("delta")) == whole.output_text
    assert events[-1].response.output_text == whole.output_text and events[-1].response.usage.output_tokens == 9


def test_a_required_call_and_its_result(answering: Any) -> None:
    _, client = answering
    asked = {"model": "answers", "tools": [TOOL], "temperature": 0, "parallel_tool_calls": False}
    required = {**asked, "tool_choice": "required"}
    [call] = client.responses.create(input="hi", **required).output
    assert (call.type, call.name, call.status) == ("function_call", "f", "completed")
    assert json.loads(call.arguments)["x"] in (1, 2)
    events = list(client.responses.create(input="hi", stream=True, **required))
    deltas = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    done = next(e for e in events if e.type == "response.function_call_arguments.done")
    assert deltas == done.arguments == call.arguments == events[-1].response.output[0].arguments
    said = [{"role": "user", "content": "hi"}, call.model_dump(exclude_none=True)]
    said.append({"type": "function_call_output", "call_id": call.call_id, "output": "4"})
    answer = client.responses.create(input=said, max_output_tokens=4, **asked)
    alone = client.responses.create(input="hi", max_output_tokens=4, **asked)
    assert answer.usage.input_tokens > alone.usage.input_tokens + len(call.arguments)
    named = {"type": "function", "name": "f"}
    assert client.responses.create(input="hi", **asked, tool_choice=named).output[0].name == "f"


def test_the_format_of_a_text_holds(answering: Any) -> None:
    form = {"type": "json_schema", "name": "n", "schema": {"enum": [7]}, "strict": True}
    asked = {"model": "answers", "input": "hi", "text": {"format": form}}
    found = answering[1].responses.create(**asked)
    assert found.output_text == "7" and found.status == "completed"
    with answering[1].responses.stream(**asked) as stream:  # the client builds the response from the events
        assert stream.get_final_response().output_text == "7"


@pytest.mark.parametrize(
    ("change", "param", "why"),
    [
        ({"input": 5}, "input", "must be a string, or a list of items"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": [{"role": "user"}]}, "input[0].content", "a message needs it"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "'message'"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id", "needs it"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps no responses"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice", "no tool 'g'"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater"),
        ({"n": 2}, "n", "no such field"),
        ({"model": "gpt-9"}, "model", "no model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_requests_are_refused(change: dict[str, Any], param: str, why: str, answering: Any) -> None:
    status, answer = raw(answering[0], json.dumps({"input": "hi", **change}).encode(), "/v1/responses")
    assert status == (404 if param == "model" else 400)
    assert answer["error"]["param"] == param and why in answer["error"]["message"], answer


def test_every_field_of_the_official_client_is_listed() -> None:
    of_client = set(response_create_params.ResponseCreateParamsBase.__annotations__) | {"stream"}
    assert of_client <= {*ResponseRequest.model_fields, *ResponseRequest.neutral, *ResponseRequest.ignored}
