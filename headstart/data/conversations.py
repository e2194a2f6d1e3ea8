"""Conversations: read lists of messages from data sets into one form.

Two forms are in use: [{"role": "user", "content": "..."}, ...], mostly in a field "messages", and
ShareGPT's [{"from": "human", "value": "..."}, ...] in a field "conversations".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from headstart.data.lines import parse_json
from headstart.errors import UsageError

MESSAGES, SHAREGPT = "messages", "conversations"
"""Names of the fields that hold conversations by default."""
ASSISTANT = "assistant"
ROLES = {
    "human": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bing": ASSISTANT,
    "bard": ASSISTANT,
    "model": ASSISTANT,
    "observation": "tool",
}
"""Names of roles in data sets, and the role that chat templates know."""


@dataclass(frozen=True)
class Conversation:
    """Messages, each with "role" and "content" (text) and further fields of the data (name, tool_calls, ...)."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[Any, ...] = ()
    """Descriptions of the tools that the assistant may call, in the form that chat templates take."""

    @property
    def text(self) -> str:
        """Return the contents of all messages without a template: to learn a vocabulary from, or to measure."""
        return "\n\n".join(message["content"] for message in self.messages)

    @property
    def identity(self) -> bytes:
        """Return bytes that two conversations share only if they are equal except for the choice of targets."""
        messages = [{key: message[key] for key in message.keys() - {"weight", "train"}} for message in self.messages]
        return json.dumps([messages, self.tools], sort_keys=True, default=str).encode()

    @property
    def answered(self) -> bool:
        """Return whether any message is to be predicted."""
        return any(map(is_target, self.messages))


def is_target(message: dict[str, Any]) -> bool:
    """Return whether a message is to be predicted: an assistant's, unless `weight: 0` or `train: false` excludes it."""
    return message["role"] == ASSISTANT and message.get("weight", 1) != 0 and message.get("train", True) is not False


def parse_conversation(value: Any, tools: Any, place: str) -> Conversation:
    """Return a list of messages, in either form, as a conversation. Raise UsageError, naming `place`, for others."""
    if not isinstance(value, list):
        raise UsageError(
            f'{place}: holds {type(value).__name__}, not a list of messages like {{"role": "user", "content": "..."}}'
        )
    messages = tuple(_message(each, f"{place}, message {number}") for number, each in enumerate(value, start=1))
    if isinstance(tools, str):
        try:
            tools = parse_json(tools)
        except ValueError:
            raise UsageError(f'{place}: "tools" is text but not JSON; write a list of tools') from None
    return Conversation(messages, tuple(tools) if isinstance(tools, list) else ())


def _message(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f'{place}: not an object; a message is {{"role": "user", "content": "..."}}')
    # Tables give every message all fields that any of them has, empty ones as null.
    message = {key: each for key, each in value.items() if each is not None}
    for names in (("role", "from"), ("content", "value")):
        if names[0] not in message and names[1] in message:
            message[names[0]] = message.pop(names[1])
    role = message.get("role")
    if not isinstance(role, str):
        raise UsageError(f'{place}: has no role; a message is {{"role": "user", "content": "..."}}')
    message["role"] = ROLES.get(role, role)
    message["content"] = _text(message.get("content", ""), place)
    if message.get("weight", 1) not in (0, 1):
        raise UsageError(f"{place}: weight {message['weight']!r}; write 1 (to be predicted) or 0 (not)")
    if not isinstance(message.get("train", True), bool):
        raise UsageError(f"{place}: train {message['train']!r}; write true (to be predicted) or false (not)")
    return message


def _text(content: Any, place: str) -> str:
    """Return the text of a message, joining its parts if it comes in parts."""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UsageError(f"{place}: its content is not text; remove what is neither text nor parts of text")
    return content
