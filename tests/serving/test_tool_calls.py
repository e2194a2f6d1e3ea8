"""Check calls of functions through a real server: what is required parses and fits its schema, drafts or not."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import openai
import pytest
import torch
from chats import TOOLS, chat_tokenizer
from serving.conftest import raw, running

from headstart.data.detokenizer import TextStream
from headstart.formats.huggingface import save_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.serving.chats import Chats
from headstart.serving.schemas import ChatRequest
from headstart.serving.server import Server
from headstart.serving.settings import ServeSettings

USER = {"role": "user", "content": "hi"}
ALL, PLAIN = {"policy": "fixed"}, {"enabled": False}


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, openai.OpenAI]]:
    folder = tmp_path_factory.mktemp("calling")
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=264, dim=32, layers=4, attention_heads=2, heads=3, context=2048)
    save_model(Transformer(config), folder / "caller", chat_tokenizer(folder / "tokenizer", TOOLS))
    with (
        running(ServeSettings(port=0, slots=2, stream_interval=0), folder / "caller") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield server, client


def schema(dice: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema whose values are short."""
    kinds = ["boolean", "integer", "enum", "string", "pattern", "null"]
    kinds += ["array", "object", "any"] if depth < 2 else []
    kind = dice.choice(kinds) if depth else "object"
    if kind == "integer":
        return {"type": "integer", "minimum": 0, "maximum": dice.choice((1, 9, 50))}
    if kind == "enum":
        return {"enum": dice.sample(["a b", 'q"', "é", 1, 2.5, None, True, [], {"k": 1}], dice.randrange(1, 5))}
    if kind == "string":
        return {"type": "string", "maxLength": dice.randrange(5)}
    if kind == "pattern":
        return {"type": "string", "pattern": dice.choice(("^[a-z]{1,3}$", "^\\d\\d-\\d$"))}
    if kind == "array":
        return {"type": "array", "items": schema(dice, depth + 1), "maxItems": dice.randrange(3)}
    if kind == "any":
        return {"anyOf": [schema(dice, depth + 1) for _ in range(2)]}
    if kind == "object":
        names = dice.sample(["x", "y z", "é", "name", "arguments"], dice.randrange(4))
        return {
            "type": "object",
            "properties": {name: schema(dice, depth + 1) for name in names},
            "required": [name for name in names if dice.random() < 0.7],
            "additionalProperties": False,
        }
    return {"type": kind}


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


def in_stream(client: openai.OpenAI, **asked: Any) -> tuple[list[tuple[str, str]], str]:
    """Return the calls of a stream, and why it ended."""
    calls: list[tuple[str, str]] = []
    reason = None
    for chunk in client.chat.completions.create(stream=True, **asked):
        reason = chunk.choices[0].finish_reason or reason
        for call in chunk.choices[0].delta.tool_calls or ():
            if call.id:
                calls.append((call.function.name, ""))
            name, arguments = calls[call.index]
            calls[call.index] = name, arguments + call.function.arguments
    return calls, reason


def fit(client: openai.OpenAI, seed: int) -> None:
    """Check a required call with drafts and without them, whole and as a stream."""
    dice = random.Random(seed)
    schemas = {"first": schema(dice), "second.2": schema(dice)}
    asked = {"model": "caller", "messages": [USER], "tools": [tool(name, each) for name, each in schemas.items()]}
    asked |= {"tool_choice": "required", "temperature": seed % 2, "seed": seed, "parallel_tool_calls": False}
    [choice] = client.chat.completions.create(**asked, extra_body={"speculative": ALL}).choices
    [call] = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content is None and call.id
    jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])
    calls, reason = in_stream(client, **asked, extra_body={"speculative": PLAIN})
    assert calls == [(call.function.name, call.function.arguments)] and reason == "tool_calls"


def test_required_calls_fit_their_schemas_with_drafts_and_without(calling: Any) -> None:
    for seed in range(12):
        fit(calling[1], seed)


@pytest.mark.slow
def test_required_calls_fit_hundreds_of_schemas(calling: Any) -> None:
    for seed in range(200):
        fit(calling[1], seed)


def test_a_named_call_and_an_answer_to_it(calling: Any) -> None:
    _, client = calling
    asked: dict[str, Any] = {"model": "caller", "temperature": 0, "tools": [tool("f"), tool("g")]}
    named = {"type": "function", "function": {"name": "g"}}
    message = client.chat.completions.create(**asked, messages=[USER], tool_choice=named).choices[0].message
    [call] = message.tool_calls
    assert (call.function.name, call.function.arguments, call.type) == ("g", "{}", "function")
    result = {"role": "tool", "tool_call_id": call.id, "content": "4"}
    messages = [USER, message.model_dump(exclude_none=True), result]
    answer = client.chat.completions.create(**asked, messages=messages, max_tokens=4)
    alone = client.chat.completions.create(**asked, messages=[USER], max_tokens=4)
    assert answer.usage.prompt_tokens > alone.usage.prompt_tokens + len('"name": "g"')
    assert answer.choices[0].message.tool_calls is None  # as the model likes


def test_calls_may_be_several_and_schemas_of_answers_remain(calling: Any) -> None:
    _, client = calling
    number = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [7]}}}
    asked = {"model": "caller", "messages": [USER], "tools": [tool("f")], "temperature": 1, "response_format": number}
    for seed in range(4):
        choice = client.chat.completions.create(**asked, seed=seed).choices[0]
        assert choice.message.content == "7" if choice.message.tool_calls is None else choice.message.content is None
    del asked["response_format"]
    required = {"tool_choice": "required", "max_tokens": 200}
    answers = [client.chat.completions.create(**asked, **required, seed=i).choices[0].message for i in range(6)]
    assert max(len(answer.tool_calls) for answer in answers) > 1


def test_tools_change_nothing_where_none_may_be_called(calling: Any) -> None:
    server, _ = calling
    asked = {"messages": [USER], "temperature": 0, "max_tokens": 8}
    answers = [
        raw(server, json.dumps({**asked, **more}).encode(), "/v1/chat/completions")[1]["choices"]
        for more in ({}, {"tools": [tool("f")], "tool_choice": "none"}, {"tools": [], "tool_choice": "auto"})
    ]
    assert answers[0] == answers[1] == answers[2]


UNKNOWN = {"type": "function", "function": {"name": "g"}}


@pytest.mark.parametrize(
    ("change", "param", "why"),
    [
        ({"tool_choice": UNKNOWN}, "tool_choice", "no tool 'g'; tools has f"),
        ({"tools": {"f": 1}}, "tools", "valid list"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type", "'function'"),
        ({"tools": [tool("a b")]}, "tools[0].function.name", "pattern"),
        ({"tools": [tool("f"), tool("f")]}, "tools", "two functions"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": "often"}, "tool_choice", "must be"),
        ({"tools": [tool("f", {"type": "tree"})], "tool_choice": "required"}, "tools[0].function.parameters", "tree"),
        ({"tools": [tool(f"f{i}") for i in range(129)]}, "tools", "at most 128"),
        ({"tools": [tool("f", {"enum": ["x" * 70_000]})], "tool_choice": "required"}, None, "make it shorter"),
        ({"messages": [USER, {"role": "tool", "content": "4"}]}, "messages[1].tool_call_id", "name the call"),
        ({"guided_regex": "a"}, "guided_regex", "leave out tools"),
        ({"tool_choice": "required", "min_tokens": 3}, "min_tokens", "required call"),
        ({"functions": [{}]}, "functions", "use tools"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_wrong_tools_are_refused(change: dict[str, Any], param: str | None, why: str, calling: Any) -> None:
    body = {"messages": [USER], "tools": [tool("f")], "max_tokens": 9, **change}
    status, answer = raw(calling[0], json.dumps(body).encode(), "/v1/chat/completions")
    assert status == 400 and answer["error"]["param"] == param and why in answer["error"]["message"], answer


FORMS = {
    "hermes": TOOLS,
    "mistral": TOOLS.replace("<tool_call>\n", "[TOOL_CALLS] [").replace("\n</tool_call>", "]"),
    "llama": TOOLS.replace("<tool_call>\n", "").replace("\n</tool_call>", "") + "{# parameters, ipython #}",
}


@pytest.mark.parametrize("form", FORMS)
def test_what_a_constraint_allows_is_read_as_calls(form: str, tmp_path: Path) -> None:
    """Random tokens under the constraint; the mark of Mistral and Llama is a special token."""
    tokenizer = chat_tokenizer(tmp_path, FORMS[form], more=("[TOOL_CALLS]", "<|python_tag|>"))
    chats = Chats(tokenizer, 266)
    assert chats.form is not None and chats.form.name == form
    dice = random.Random(3)
    for _ in range(8):
        schemas = {"f": schema(dice), "g": schema(dice)}
        tools = [tool(name, each) for name, each in schemas.items()]
        body = ChatRequest.model_validate({"messages": [USER], "tools": tools, "tool_choice": "required"})
        constraint, parser = chats.constraint(body), chats.parser(body)
        assert constraint is not None and parser is not None
        matcher, stream, text = chats.compiled(body, constraint), TextStream(tokenizer, (), True, chats.shown), ""
        while not matcher.ended and not (matcher.may_end and dice.random() < 0.5):
            token = dice.choice(
                [each for each in np.flatnonzero(matcher.allowed()).tolist() if each != tokenizer.end_id]
            )
            assert matcher.push(token)
            text += stream.push([token])
        text += stream.finish()
        content, parts = parser.push(text)
        assert content + parser.finish() == "" and parts
        for part in parts:
            jsonschema.validate(json.loads(part.arguments), schemas[part.name or ""])
