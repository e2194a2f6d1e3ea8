"""Check the text that the messages of a chat become, and the messages that are refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from headstart.data.chat_template import ChatTemplate
from headstart.errors import UsageError
from headstart.serving.bodies import validation_error
from headstart.serving.errors import ApiError
from headstart.serving.schemas import ChatRequest
from headstart.serving.translation import render_chat

PLAIN = ChatTemplate(
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ m.tool_call_id or '' }}{{ m.name or '' }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}{{ more or '' }}"
)
CALLING = ChatTemplate(
    "{% for m in messages %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<{{ c.function.name }} {{ c.function.arguments.x }}>{% endfor %}{% endfor %}"
)
USER = {"role": "user", "content": "hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 3}'}}


def request(*messages: dict[str, Any], **fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": list(messages), **fields})


def refusal(*messages: dict[str, Any], **fields: Any) -> ApiError:
    body = {"messages": list(messages), **fields}
    with pytest.raises(ValidationError) as failed:
        ChatRequest.model_validate(body)
    return validation_error(failed.value.errors(), body)


def test_content_of_an_assistant_may_be_null() -> None:
    asked = request(USER, {"role": "assistant", "content": None}, {"role": "assistant"}, USER)
    assert render_chat(asked, PLAIN) == "[user]hi;[assistant];[assistant];[user]hi;[assistant]"


def test_an_answer_of_the_official_client_is_a_valid_message() -> None:
    answer = {"role": "assistant", "content": "a", "refusal": None, "annotations": None, "audio": None}
    answer |= {"function_call": None, "tool_calls": None}
    assert render_chat(request(USER, answer, USER), PLAIN).startswith("[user]hi;[assistant]a;[user]hi;")


def test_calls_reach_a_template_that_shows_them() -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "1", "content": "y"}
    assert render_chat(request(USER, called, result), CALLING) == "hi<f 3>y"
    as_object = {**CALL, "function": {"name": "f", "arguments": {"x": 3}}}
    assert render_chat(request(USER, {**called, "tool_calls": [as_object]}), CALLING) == "hi<f 3>"
    with pytest.raises(ApiError, match=r"messages\[1\].tool_calls: this model's chat template does not show") as found:
        render_chat(request(USER, called, result), PLAIN)
    assert found.value.param == "messages[1].tool_calls"
    assert render_chat(request(USER, {**called, "tool_calls": []}, result), PLAIN).endswith("[tool]y1;[assistant]")


def test_a_template_may_require_calls() -> None:
    needs = ChatTemplate("{% for m in messages %}{{ m.tool_calls[0].id }}{% endfor %}")
    assert render_chat(request({"role": "assistant", "tool_calls": [CALL]}), needs) == "1"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "[user]hi;[assistant]"),
        ({"add_generation_prompt": False}, "[user]hi;"),
        ({"add_generation_prompt": True, "continue_final_message": False}, "[user]hi;[assistant]"),
        ({"chat_template_kwargs": {"more": "x"}}, "[user]hi;[assistant]x"),
    ],
    ids=str,
)
def test_fields_that_control_the_end_of_the_prompt(fields: dict[str, Any], text: str) -> None:
    assert render_chat(request(USER, **fields), PLAIN) == text


@pytest.mark.parametrize(
    ("said", "text"), [("Well", "[user]hi;[assistant]Well"), ("  Well ", "[user]hi;[assistant]  Well ")]
)
def test_the_last_message_is_continued(said: str, text: str) -> None:
    last = {"role": "assistant", "content": said}
    assert render_chat(request(USER, last, continue_final_message=True, add_generation_prompt=False), PLAIN) == text
    trimming = ChatTemplate("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}")
    assert render_chat(request(USER, last, continue_final_message=True), trimming) == "[hi][Well"
    shouting = ChatTemplate("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    with pytest.raises(ApiError, match="continue_final_message: the chat template changes"):
        render_chat(request(USER, last, continue_final_message=True), shouting)


def test_an_error_of_the_template_is_reported() -> None:
    with pytest.raises(UsageError, match="no systems"):
        render_chat(request(USER), ChatTemplate("{{ raise_exception('no systems') }}"))


IMAGE = {"type": "image_url", "image_url": {"url": "http://x"}}


@pytest.mark.parametrize(
    ("message", "param", "why"),
    [
        ({"role": "user", "content": None}, "messages[1].content", "only an assistant's may be null"),
        ({"role": "user"}, "messages[1].content", "only an assistant's may be null"),
        ({"role": "user", "content": 5}, "messages[1].content", "must be a string, or a list of parts"),
        ({"content": "x"}, "messages[1].role", "is required"),
        ({"role": "king", "content": "x"}, "messages[1].role", "must be 'system', 'developer'"),
        ({"role": "user", "content": [IMAGE]}, "messages[1].content[0].type", "'text'; other parts are not read"),
        ({"role": "assistant", "content": "x", "refusal": "no"}, "messages[1].refusal", "send it as content"),
        ({"role": "assistant", "function_call": {}}, "messages[1].function_call", "use tool_calls"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages[1].tool_calls", "only an assistant"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[1].tool_calls[0].function", "is required"),
        ({"role": "user", "content": "x", "spice": 1}, "messages[1].spice", "no such field"),
        ("hi", "messages", "must be"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_invalid_messages_are_refused(message: Any, param: str, why: str) -> None:
    error = refusal(USER, message)
    assert error.param == param and why in error.detail and error.detail.startswith("messages[1]")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"echo": True}, "echo"),
        ({"add_special_tokens": True}, "add_special_tokens"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"messages": []}, "messages"),
    ],
    ids=str,
)
def test_invalid_fields_of_chats_are_refused(fields: dict[str, Any], param: str) -> None:
    body = {"messages": [USER], **fields}
    error = refusal(*body.pop("messages"), **body)
    assert error.param == param and error.detail.startswith(param)
