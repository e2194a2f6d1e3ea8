"""List the fields of requests that this server ignores, and those that it refuses."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from pydantic_core import PydanticCustomError

IGNORED = frozenset(
    (
        # The user, what is stored, and where the answer is computed.
        "user", "safety_identifier", "metadata", "store", "service_tier", "request_id", "priority",
        "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "guided_decoding_backend",
        # Hints for speed, and fields without effect.
        "prediction", "spaces_between_special_tokens", "include_reasoning",
    )
)  # fmt: skip
"""Fields that do not change the answer."""

NeutralFields = Mapping[str, tuple[tuple[Any, ...], str]]

NEUTRAL: NeutralFields = {
    "allowed_token_ids": ((), "tokens cannot be allowed one by one; use a constraint such as guided_regex"),
    "audio": ((), "audio is not supported"),
    "bad_words": (([],), "words cannot be excluded; use logit_bias"),
    "chat_template": ((), "the template is the model's own"),
    "documents": (([],), "write them into a message"),
    "early_stopping": ((False,), "beam search is not supported"),
    "function_call": (("none", "auto"), "use tools and tool_choice"),
    "functions": (([],), "use tools and tool_choice"),
    "guided_whitespace_pattern": ((), "the spaces between the parts of JSON cannot be chosen"),
    "length_penalty": ((1, 1.0), "beam search is not supported"),
    "logits_processors": (([],), "code in a request is not run"),
    "modalities": ((["text"],), "only text is supported"),
    "moderation": ((), "moderation is not supported"),
    "reasoning_effort": (("none",), "not supported; use chat_template_kwargs if the chat template knows it"),
    "return_token_ids": ((False,), "token ids are not returned"),
    "return_tokens_as_token_ids": ((False,), "token ids are not returned"),
    "use_beam_search": ((False,), "beam search is not supported"),
    "verbosity": (("medium",), "not supported"),
    "web_search_options": ((), "web search is not supported"),
}
"""Fields that would change the answer: values that do not, in addition to null, and the reason to refuse others."""

NEUTRAL_IN_COMPLETIONS: NeutralFields = {
    "parallel_tool_calls": ((False, True), "completions call no functions; use /v1/chat/completions"),
    "tool_choice": (("none", "auto"), "completions call no functions; use /v1/chat/completions"),
    "tools": (([],), "completions call no functions; use /v1/chat/completions"),
}
NEUTRAL_IN_CHATS: NeutralFields = {
    "add_special_tokens": ((False,), "the chat template writes the special tokens"),
    "echo": ((False,), "the answer is the new message alone; use /v1/completions"),
}
NEUTRAL_IN_MESSAGES: NeutralFields = {
    "annotations": (([],), "messages have text only"),
    "audio": ((), "messages have text only"),
    "function_call": ((), "use tool_calls"),
    "reasoning": (("",), "messages have text only"),
    "reasoning_content": (("",), "messages have text only"),
    "refusal": (("",), "send it as content"),
}


def refusal(field: str, why: str) -> PydanticCustomError:
    """Return the error that refuses a field of a request, for validators to raise."""
    return PydanticCustomError("refused", "{why}", {"field": field, "why": why})


def select_fields(body: Any, known: Container[str], neutral: NeutralFields, ignored: Container[str] = ()) -> Any:
    """Return a JSON object with its known fields only. Raise an error for a field that would change the answer."""
    if not isinstance(body, dict):
        return body
    selected = {}
    for name, value in body.items():
        if name in known:
            selected[name] = value
        elif name in neutral:
            values, why = neutral[name]
            if value is not None and not any(type(value) is type(each) and value == each for each in values):
                raise refusal(name, f"{why}; leave the field out")
        elif name not in ignored:
            raise refusal(name, "this API has no such field; leave it out")
    return selected
