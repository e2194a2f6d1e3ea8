"""Check that malformed requests get errors in OpenAI's format below 500, and disturb no other request."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import httpx
import openai.types.chat
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from pydantic import ValidationError
from serving.conftest import HTTP, raw, running
from serving.malformed import bodies

from headstart.formats.bundled import boxed_model
from headstart.formats.registry import load_config
from headstart.serving.bodies import validation_error
from headstart.serving.fields import IGNORED, NEUTRAL, NEUTRAL_IN_MESSAGES
from headstart.serving.schemas import ChatRequest, CompletionRequest, Message
from headstart.serving.server import Server
from headstart.serving.settings import ServeSettings

CONTEXT = load_config(boxed_model()).context
GOOD = {"prompt": "def f(", "max_tokens": 2, "temperature": 0}


def refused(server: Server, body: Any, status: int = 400, path: str = "/v1/completions") -> dict[str, Any]:
    """Check that a request is refused in OpenAI's format, and return the error."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    found, answer = raw(server, content, path)
    assert found == status, answer
    assert set(answer) == {"error"} and set(answer["error"]) == {"message", "type", "param", "code"}
    message = answer["error"]["message"]
    assert (
        message
        and "\n" not in message
        and "Traceback" not in message
        and not re.search(r"/\w+/\w+\.py|/root|/home", message)
    )
    return answer["error"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, None),
        ({"prompt": []}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [256]}, None),
        ({"prompt": "\ud800"}, None),
        ({"prompt": "x" * CONTEXT}, "prompt"),
        ({"prompt": "x" * (CONTEXT - 12), "max_tokens": 20}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"min_tokens": 1, "guided_regex": "a"}, "min_tokens"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"response_format": {"type": "text", "grammar": "a"}}, "response_format"),
        ({"guided_grammar": "root ::= ("}, None),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"300": 1}}, None),
        ({"logit_bias": {"3": 101}}, "logit_bias"),
        ({"logit_bias": {str(i): 0 for i in range(2000)}}, "logit_bias"),
        ({"guided_regex": "("}, None),
        ({"guided_json": {"minimum": float("nan")}}, None),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"guided_regex": "a", "structured_outputs": {"json": {}}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
        ({"guided_json": "[1"}, "guided_json"),
        ({"guided_grammar": "start: nothing"}, None),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "tree"}}}}, None),
        ({"speculative": {"heads": 9}}, None),
        ({"speculative": {"heads": 0}}, "speculative"),
        ({"speculative": {"acceptance": "always"}}, "speculative"),
        ({"speculative": {"acceptance": "match:1"}}, None),
        ({"speculative": {"head": 1}}, "speculative"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_name_the_field(change: dict[str, Any], param: str | None, server: Server) -> None:
    error = refused(server, {**GOOD, **change})
    assert error["param"] == param or (error["param"] or "").startswith(f"{param}.")
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt"', b"[" * 100_000, b'{"a":' * 50_000, b'{"prompt": 1e999}'],
    ids=lambda body: str(body[:12]),
)
def test_bodies_that_are_no_objects_are_refused(body: bytes, server: Server) -> None:
    message = refused(server, body)["message"]
    if b"1e999" not in body:
        assert message.startswith("the body is not") and "; send" in message


def test_other_models_paths_and_methods(server: Server) -> None:
    assert refused(server, {**GOOD, "model": "gpt-9"}, 404)["code"] == "model_not_found"
    assert "POST /v1/embeddings; /openapi.json" in refused(server, GOOD, 404, "/v1/embeddings")["message"]
    refused(server, GOOD, 405, "/v1/models")
    status, answer = raw(server, json.dumps(GOOD).encode(), **{"Content-Type": "text/plain"})
    assert status == 400 and "Content-Type: application/json" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"prompt": None}, "prompt", "must be a string, a list of strings"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": [1, -1]}, "prompt", "prompt[1]: must be greater"),
        ({"prompt": ["x", 1]}, "prompt", "must be a string, a list of strings"),
        ({"stop": 5}, "stop", "a list of at most 16 strings"),
        ({"stop": ["x"] * 17}, "stop", "at most 16 items"),
        ({"stop": ["x", ""]}, "stop", "stop[1]: must have at least 1 character"),
        ({"temperature": "hot"}, "temperature", "must be a valid number"),
        ({"logit_bias": {"7": 101}}, "logit_bias.7", "less than or equal to 100"),
        ({"speculative": {"acceptance": "always"}}, "speculative.acceptance", "must match pattern"),
        ({"spice": 1}, "spice", "no such field; leave it out"),
        ({"bad\nname": 1}, "bad name", "no such field"),
        ({"speculative": {"spice": 1}}, "speculative.spice", "no such field"),
        ({"stream_options": {"spice": 1}}, "stream_options.spice", "no such field"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema", "no such field"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "give the schema"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_name_the_field_as_sent_and_the_fix(
    change: dict[str, Any], param: str, message: str, server: Server
) -> None:
    error = refused(server, {**GOOD, **change})
    assert error["param"] == param and message in error["message"] and param.split(".")[0] in error["message"]


CHANGING: dict[str, Any] = {
    "allowed_token_ids": [97], "audio": {"voice": "a"}, "bad_words": ["e"], "chat_template": "x", "documents": [{}],
    "early_stopping": True, "function_call": {"name": "f"}, "functions": [{}], "guided_whitespace_pattern": " ",
    "length_penalty": 2.0, "logits_processors": ["x"], "modalities": ["text", "audio"],
    "moderation": {"model": "x"}, "reasoning_effort": "low", "return_token_ids": True,
    "return_tokens_as_token_ids": True, 
    "use_beam_search": True, "verbosity": "low", "web_search_options": {},
}  # fmt: skip
"""A value of each field of `NEUTRAL` that would change the answer."""


def test_fields_that_would_change_the_answer_are_refused_by_name() -> None:
    """Their neutral values and null are accepted, in completions and chats."""
    assert CHANGING.keys() == NEUTRAL.keys()
    chat = {"messages": [{"role": "user", "content": "x"}]}
    for name, value in CHANGING.items():
        for kind, body in ((CompletionRequest, GOOD), (ChatRequest, chat)):
            for neutral in (None, *NEUTRAL[name][0]):
                kind.model_validate({**body, name: neutral})
            with pytest.raises(ValidationError) as failed:
                kind.model_validate({**body, name: value})
            error = validation_error(failed.value.errors(), {**body, name: value})
            assert error.param == name and error.detail.startswith(f"{name}: ") and "leave" in error.detail


def test_every_field_of_the_official_client_is_listed() -> None:
    for kind, params in ((CompletionRequest, completion_create_params), (ChatRequest, chat_create_params)):
        of_client = set(params.CompletionCreateParamsBase.__annotations__) | {"stream"}
        assert of_client <= {*kind.model_fields, *kind.neutral, *IGNORED}
    for role in ("System", "Developer", "User", "Assistant", "Tool"):
        of_client = set(getattr(openai.types.chat, f"ChatCompletion{role}MessageParam").__annotations__)
        assert of_client <= {*Message.model_fields, *NEUTRAL_IN_MESSAGES}


def test_ignored_fields_do_not_change_the_answer(server: Server) -> None:
    wanted = raw(server, json.dumps(GOOD).encode())[1]["choices"]
    assert raw(server, json.dumps({**GOOD, **{name: "x" for name in IGNORED}}).encode())[1]["choices"] == wanted


def test_the_body_is_bounded() -> None:
    with running(ServeSettings(port=0, slots=1, max_body_bytes=1000)) as server:
        large = json.dumps({**GOOD, "user": "x" * 1000}).encode()
        assert refused(server, large, 413)["code"] == "request_too_large"
        chunked = HTTP.post(f"{server.url}/v1/completions", content=iter([large[:600], large[600:]]))
        assert chunked.status_code == 413 and chunked.json()["error"]["code"] == "request_too_large"
        assert raw(server, json.dumps(GOOD).encode())[0] == 200


def test_hundreds_of_malformed_bodies(server: Server) -> None:
    """Every answer is JSON or a stream with a status below 500, and the server continues."""
    wanted = raw(server, json.dumps(GOOD).encode())[1]["choices"]
    statuses = []
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for path, body in bodies(random.Random(0), 400):
            answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
            statuses.append(answer.status_code)
            assert answer.status_code < 500 or answer.status_code == 504, (body[:300], answer.content[:300])
            if answer.status_code != 200:
                assert "error" in answer.json(), body[:300]
    assert 400 in statuses and 200 in statuses
    assert raw(server, json.dumps(GOOD).encode())[1]["choices"] == wanted
