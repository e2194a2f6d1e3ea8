"""Prompts to be answered: texts that are gone on from, and conversations in which the model speaks for itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.data.conversations import ASSISTANT, MESSAGES, SHAREGPT, Conversation, parse_conversation
from headstart.errors import UsageError

ASKING = ("system", "developer", "user")
"""Roles whose messages are taken from the file of prompts."""


@dataclass(frozen=True)
class Prompt:
    """A text to go on from, or groups of messages of a conversation, each of which is answered in turn."""

    text: str = ""
    groups: tuple[tuple[dict[str, Any], ...], ...] = ()
    tools: tuple[Any, ...] = ()


def read_prompts(file: Path) -> list[Prompt]:
    """Prompts of a file: .jsonl with "prompt", "text" or "messages" (ShareGPT's "conversations" too) in each line, or
    plain text, a prompt a line.

    Of a conversation what the assistant says is left out: the model answers for itself. Raises UsageError, naming the
    line, for what is none of these.
    """
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read ({error}); give a UTF-8 file, a prompt a line") from error
    if not lines:
        raise UsageError(f"{file}: holds no prompt; write one a line")
    if file.suffix != ".jsonl":
        return [Prompt(line) for line in lines]
    return [_prompt(line, f"{file}, prompt {number}") for number, line in enumerate(lines, start=1)]


def _prompt(line: str, place: str) -> Prompt:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{place}: not JSON ({error}); mend that line") from error
    known = record.keys() if isinstance(record, dict) else ()
    for field in (MESSAGES, SHAREGPT):
        if field in known:
            return _of_conversation(parse_conversation(record[field], record.get("tools"), place), place)
    for field in ("prompt", "text"):
        if field in known and isinstance(record[field], str) and record[field]:
            return Prompt(record[field])
    raise UsageError(f'{place}: no JSON object with "prompt", "text" or "messages"; mend that line')


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
