"""Fields of requests that this server does not act on: harmless ones, and ones that would change the answer."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from pydantic_core import PydanticCustomError

HARMLESS = frozenset(
    (
        # Who asks, what is kept, and where it is computed.
        "user", "safety_identifier", "metadata", "store", "service_tier", "request_id", "priority",
        "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "guided_decoding_backend",
        # Hints that make the same answer faster, and what only counts with tools or with special tokens in texts.
        "prediction", "parallel_tool_calls", "spaces_between_special_tokens", "include_reasoning",
    )
)  # fmt: skip
"""Fields that do not change the answer. They are ignored."""

NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "allowed_token_ids": ((), "the tokens of an answer cannot be listed; use a constraint such as guided_regex"),
    "audio": ((), "there are no models for sound"),
    "bad_words": (([],), "words cannot be excluded; use logit_bias"),
    "chat_template": ((), "the template is the model's own"),
    "documents": (([],), "write them into a message"),
    "early_stopping": ((False,), "beam search is not supported"),
    "function_call": (("none", "auto"), "calls of functions are not supported"),
    "functions": (([],), "calls of functions are not supported"),
    "guided_whitespace_pattern": ((), "the spaces between the parts of JSON cannot be chosen"),
    "length_penalty": ((1, 1.0), "beam search is not supported"),
    "logits_processors": (([],), "code of a request is not run"),
    "min_tokens": ((0,), "the least length of an answer cannot be set"),
    "modalities": ((["text"],), "there are only models for text"),
    "moderation": ((), "nothing is moderated"),
    "prompt_logprobs": ((), "set echo and logprobs in /v1/completions"),
    "reasoning_effort": (("none",), "the models know no degrees of it; chat_template_kwargs reach the template"),
    "return_token_ids": ((False,), "token ids are not returned"),
    "return_tokens_as_token_ids": ((False,), "token ids are not returned"),
    "skip_special_tokens": ((True,), "special tokens are never part of the text"),
    "tool_choice": (("none", "auto"), "calls of functions are not supported"),
    "tools": (([],), "calls of functions are not supported"),
    "truncate_prompt_tokens": ((), "a prompt is read as a whole; shorten it"),
    "use_beam_search": ((False,), "beam search is not supported"),
    "verbosity": (("medium",), "the models know no degrees of it"),
    "web_search_options": ((), "nothing is searched"),
}
"""For each field that would change the answer: the values with which it does not, besides null, and the reason."""

NEUTRAL_IN_CHATS = {
    "add_special_tokens": ((False,), "the chat template writes the special tokens"),
    "echo": ((False,), "the answer is the new message alone; use /v1/completions"),
}
NEUTRAL_IN_MESSAGES: dict[str, tuple[tuple[Any, ...], str]] = {
    "annotations": (([],), "messages have text only"),
    "audio": ((), "messages have text only"),
    "function_call": ((), "use tool_calls"),
    "reasoning": (("",), "messages have text only"),
    "reasoning_content": (("",), "messages have text only"),
    "refusal": (("",), "send it as content"),
}


def refused(field: str, why: str) -> PydanticCustomError:
    """Return the error that refuses a field of a request; validators raise it."""
    return PydanticCustomError("refused", "{why}", {"field": field, "why": why})


def known_fields(
    body: Any, known: Container[str], neutral: dict[str, tuple[tuple[Any, ...], str]], harmless: Container[str] = ()
) -> Any:
    """Return a JSON object without the fields that do not matter. Raise for those that would change the answer."""
    if not isinstance(body, dict):
        return body
    kept = {}
    for name, value in body.items():
        if name in known:
            kept[name] = value
        elif name in neutral:
            values, why = neutral[name]
            if value is not None and not any(type(value) is type(each) and value == each for each in values):
                raise refused(name, f"{why}; leave the field out")
        elif name not in harmless:
            raise refused(name, "this API has no such field; leave it out")
    return kept
