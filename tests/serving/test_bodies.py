"""Check that large bodies are counted before they are parsed, and read while other requests are answered."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from pydantic import ValidationError
from serving.conftest import HTTP, raw, running, until

from headstart.serving import bodies, service
from headstart.serving.bodies import LARGE, MAX_PARTS, MAX_VALUES, STEP, read_body, validation_error
from headstart.serving.errors import ApiError
from headstart.serving.schemas import MAX_CALLS, MAX_MESSAGES, MAX_TEXT_PARTS, ChatRequest, CompletionRequest
from headstart.serving.settings import ServeSettings

USER = {"role": "user", "content": "x"}
CALL = {"function": {"name": "f"}}


def read(body: dict[str, Any] | bytes, kind: Any = CompletionRequest, most: int = MAX_VALUES) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_body(kind, content, "application/json; charset=utf-8", most)


@pytest.mark.parametrize(
    ("item", "count"),
    [(b"1", MAX_VALUES + 9), (b'"a"', MAX_VALUES + 9), (b"[1]", MAX_PARTS + 9), (b'{"a":1}', MAX_PARTS // 2 + 9)],
)
@pytest.mark.parametrize("field", ["prompt", "stop", "guided_choice", "stop_token_ids", "logit_bias", "user"])
def test_a_body_of_too_many_values_is_refused_unparsed(
    item: bytes, count: int, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "json", None)
    body = b'{"max_tokens":1,"%s":[%s],"n":1}' % (field.encode(), b",".join([item] * count))
    with pytest.raises(ApiError) as refused:
        read(body)
    assert refused.value.status_code == 400 and refused.value.param == field
    assert refused.value.detail.startswith(f"{field}: the body is not read") and "\n" not in refused.value.detail


@pytest.mark.parametrize("body", [b'{"":' * 50_000, b'{"spice":{%s}}' % b",".join([b'"a":1'] * MAX_PARTS)])
def test_the_error_names_known_fields_only(body: bytes) -> None:
    with pytest.raises(ApiError, match="the body is not read, for it has more than") as refused:
        read(body)
    assert refused.value.param is None and refused.value.detail.startswith("the body")


@pytest.mark.parametrize("text", ['[{,:"\\', '"', "\\", '\\"', "x,"])
@pytest.mark.parametrize("shift", range(4))
def test_strings_are_not_counted(text: str, shift: int) -> None:
    """The result does not depend on where a step ends."""
    prompt = "x" * shift + text * (2 * STEP // len(text))
    assert read({"prompt": prompt, "stop": ["a", "b"]}, most=3).prompt == prompt
    with pytest.raises(ApiError):
        read({"prompt": prompt, "stop": ["a", "b"]}, most=2)


def test_many_token_ids_are_read() -> None:
    assert len(read({"prompt": [1] * (MAX_VALUES - 1), "n": 1}).prompt) == MAX_VALUES - 1


@pytest.mark.parametrize(
    ("message", "place"),
    [
        ([USER] * (MAX_MESSAGES + 1), "messages"),
        ([{"role": "user", "content": [{"type": "text", "text": ""}] * (MAX_TEXT_PARTS + 1)}], "messages[0].content"),
        ([{"role": "assistant", "tool_calls": [CALL] * (MAX_CALLS + 1)}], "messages[0].tool_calls"),
    ],
    ids=["messages", "parts", "calls"],
)
def test_lists_in_chats_are_bounded(message: list[Any], place: str) -> None:
    with pytest.raises(ApiError, match="must have at most") as refused:
        read({"messages": message}, ChatRequest)
    assert refused.value.param == place


@pytest.mark.parametrize("field", ["structured_outputs", "speculative", "stream_options", "response_format"])
def test_many_unknown_fields_are_one_error(field: str) -> None:
    body = {"prompt": "x", field: {f"x{i}": 1 for i in range(200)}}
    with pytest.raises(ValidationError) as failed:
        CompletionRequest.model_validate(body)
    assert failed.value.error_count() == 1
    assert validation_error(failed.value.errors(), body).param == f"{field}.x0"


def test_an_error_path_does_not_search_a_long_list() -> None:
    class Long(list[int]):
        def __len__(self) -> int:
            raise AssertionError("its places are compared with a name")

    error = {"type": "string_type", "loc": ("stop", "constrained-str"), "msg": "Input should be a valid string"}
    assert validation_error([error], {"stop": Long()}).param == "stop"


def test_others_are_answered_while_a_large_body_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop waits for it."""
    free, begun = threading.Event(), threading.Event()

    def slow(kind: Any, content: bytes, *rest: Any) -> Any:
        if len(content) > LARGE:
            begun.set()
            assert free.wait(60)
        return read_body(kind, content, *rest)

    monkeypatch.setattr(service, "read_body", slow)
    large = json.dumps({"prompt": "x", "max_tokens": 2, "user": "x" * LARGE}).encode()
    with running(ServeSettings(port=0, slots=1)) as server, ThreadPoolExecutor(2) as pool:
        arrived, read = [], server.service.read
        monkeypatch.setattr(server.service, "read", lambda *body: arrived.append(body) or read(*body))
        answers = [pool.submit(raw, server, large) for _ in range(2)]
        assert begun.wait(20)
        assert HTTP.get(f"{server.url}/health").status_code == 200
        assert raw(server, b'{"prompt": "x", "max_tokens": 1}')[0] == 200
        until(lambda: sum(len(content) > LARGE for _, content, *_ in arrived) == 2)
        server.drain()
        free.set()
        assert [answer.result()[0] for answer in answers] == [200, 200]
