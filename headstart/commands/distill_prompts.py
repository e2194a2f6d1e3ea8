"""Prompts to be answered: texts that are gone on from, and conversations in which the model speaks for itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.data.conversations import ASSISTANT, Conversation
from headstart.data.prompt_files import read_prompt_file
from headstart.errors import UsageError

ASKING = ("system", "developer", "user")
"""Roles whose messages are taken from the file of prompts."""


@dataclass(frozen=True)
class Prompt:
    """A text to go on from, or groups of messages of a conversation, each of which is answered in turn."""

    text: str = ""
    groups: tuple[tuple[dict[str, Any], ...], ...] = ()
    tools: tuple[Any, ...] = ()


def read_prompts(file: Path, as_chat: bool = False) -> list[Prompt]:
    """Prompts of a file: .jsonl with "prompt", "text" or "messages" (ShareGPT's "conversations" too) in each line, or
    plain text, a prompt a line.

    Of a conversation what the assistant says is left out: the model answers for itself. With `as_chat` a text is the
    message of a user. Raises UsageError, naming the line, for what is none of these.
    """
    prompts = []
    for found in read_prompt_file(file):
        if found.conversation is not None:
            prompts.append(_of_conversation(found.conversation, found.place))
        elif as_chat:
            prompts.append(Prompt(groups=(({"role": "user", "content": found.text},),)))
        else:
            prompts.append(Prompt(found.text))
    return prompts


def _of_conversation(conversation: Conversation, place: str) -> Prompt:
    groups: list[list[dict[str, Any]]] = [[]]
    for message in conversation.messages:
        if message["role"] == ASSISTANT:
            if message.get("tool_calls"):
                raise UsageError(f"{place}: the assistant calls a tool, which nobody answers here; leave such out")
            if groups[-1]:
                groups.append([])
        elif message["role"] in ASKING:
            groups[-1].append(message)
        else:
            raise UsageError(f"{place}: holds a message of {message['role']}; take {', '.join(ASKING)} and {ASSISTANT}")
    asked = tuple(tuple(group) for group in groups if group)
    if not asked:
        raise UsageError(f"{place}: asks nothing; take it out")
    return Prompt(groups=asked, tools=conversation.tools)
