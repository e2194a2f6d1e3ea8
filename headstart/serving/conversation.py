"""From the messages of a chat to the text that the model reads."""

from __future__ import annotations

from typing import Any

from headstart.data.chat_template import ChatTemplate
from headstart.errors import UsageError
from headstart.serving.errors import ApiError
from headstart.serving.schemas import ChatRequest


def rendered(asked: ChatRequest, template: ChatTemplate) -> str:
    """Return the text of a request's messages.

    Raises ApiError where the template leaves calls of functions out, and UsageError for what it does not take at all.
    """
    variables = asked.chat_template_kwargs
    prompt = not asked.continue_final_message and asked.add_generation_prompt is not False
    text = template.render([message.plain() for message in asked.messages], prompt=prompt, variables=variables)
    calling = next((number for number, message in enumerate(asked.messages) if message.tool_calls), None)
    if calling is not None:
        plain = [message.plain(calls=False) for message in asked.messages]
        if _or_none(template, plain, prompt, variables) == text:
            why = "this model's chat template does not show calls of functions; leave them out, or write them as text"
            raise ApiError(400, f"messages[{calling}].tool_calls: {why}", param=f"messages[{calling}].tool_calls")
    return _continued(text, asked.messages[-1].text) if asked.continue_final_message else text


def _or_none(
    template: ChatTemplate, messages: list[dict[str, Any]], prompt: bool, variables: dict[str, Any] | None
) -> str | None:
    try:
        return template.render(messages, prompt=prompt, variables=variables)
    except UsageError:  # without its calls the conversation is not one that the template takes
        return None


def _continued(text: str, last: str) -> str:
    """Return the text up to the end of the last message, as transformers does for `continue_final_message`."""
    at = text.rfind(last.strip())
    if at < 0:
        why = "the chat template changes the last message, so it cannot be continued"
        raise ApiError(400, f"continue_final_message: {why}", param="continue_final_message")
    kept = last.lstrip() if text.startswith(last.lstrip(), at) else last.strip()
    return text[: at + len(kept)]
