"""Requests that are not right: told in OpenAI's shape, with a status below 500, and nothing else is disturbed."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import httpx
import pytest
from serving.conftest import HTTP, raw, running

from headstart.benchmarks.malformed import bodies
from headstart.serving.server import Server
from headstart.serving.settings import ServeSettings
from headstart.storage.boxed import boxed_model
from headstart.storage.model_directory import load_config

CONTEXT = load_config(boxed_model()).context
GOOD = {"prompt": "def f(", "max_tokens": 2, "temperature": 0}


def refused(server: Server, body: Any, status: int = 400, path: str = "/v1/completions") -> dict[str, Any]:
    """The error of an answer, which is of OpenAI's shape."""
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
        ({"n": 2, "best_of": 3}, None),
        ({"suffix": "x"}, None),
        ({"echo": True, "logprobs": 1}, None),
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
        ({"guided_regex": "a", "guided_choice": ["b"]}, None),
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
def test_the_field_that_is_wrong_is_named(change: dict[str, Any], param: str | None, server: Server) -> None:
    error = refused(server, {**GOOD, **change})
    assert error["param"] == param or (error["param"] or "").startswith(f"{param}.")
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt"', b"[" * 100_000, b'{"a":' * 50_000, b'{"prompt": 1e999}'],
    ids=lambda body: str(body[:12]),
)
def test_what_is_no_object_is_refused(body: bytes, server: Server) -> None:
    refused(server, body)


def test_other_models_paths_and_methods(server: Server) -> None:
    assert refused(server, {**GOOD, "model": "gpt-9"}, 404)["code"] == "model_not_found"
    assert "POST /v1/embeddings; /openapi.json" in refused(server, GOOD, 404, "/v1/embeddings")["message"]
    refused(server, GOOD, 405, "/v1/models")
    status, answer = raw(server, json.dumps(GOOD).encode(), **{"Content-Type": "text/plain"})
    assert status == 400 and "Content-Type: application/json" in answer["error"]["message"]


def test_unknown_fields_are_ignored(server: Server) -> None:
    wanted = raw(server, json.dumps(GOOD).encode())[1]["choices"]
    assert raw(server, json.dumps({**GOOD, "user": "me", "store": True, "spice": [1]}).encode())[1]["choices"] == wanted


def test_the_body_is_bounded() -> None:
    with running(ServeSettings(port=0, slots=1, max_body_bytes=1000)) as server:
        large = json.dumps({**GOOD, "user": "x" * 1000}).encode()
        assert refused(server, large, 413)["code"] == "request_too_large"
        chunked = HTTP.post(f"{server.url}/v1/completions", content=iter([large[:600], large[600:]]))
        assert chunked.status_code == 413 and chunked.json()["error"]["code"] == "request_too_large"
        assert raw(server, json.dumps(GOOD).encode())[0] == 200


def test_hundreds_of_malformed_bodies(server: Server) -> None:
    """Whatever is answered, it is no 5xx, it is JSON or a stream, and the server goes on."""
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
