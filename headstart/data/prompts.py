"""Prompts of callers and of files: text, token ids, conversations, or a list of these."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.arguments import token_ids
from headstart.data.chat_template import need_chat_template
from headstart.data.conversations import MESSAGES, SHAREGPT, Conversation, parse_conversation
from headstart.data.lines import format_of, parse_json, read_file_lines
from headstart.data.tokenizers import Tokenizer, prompt_ids
from headstart.errors import UsageError

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids (also an array or a tensor), or the messages of a conversation."""


def split_prompts(given: Any) -> tuple[list[Any], bool]:
    """Return the prompts in `given` as a list, and whether `given` is a list of prompts."""
    if hasattr(given, "ndim"):
        if given.ndim == 2 and not len(given):
            raise UsageError("there is no prompt: the array has no rows; give at least one")
        return (list(given), True) if given.ndim == 2 else ([given], False)
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence) or not given:
        return [given], False
    many = isinstance(given[0], Sequence) or getattr(given[0], "ndim", 0) == 1
    return (list(given), True) if many else ([given], False)


def encode_prompt(tokenizer: Tokenizer | None, prompt: Any) -> tuple[int, ...]:
    """Return the ids of a prompt: text after the start tokens, or a conversation up to the assistant's turn.

    Raises UsageError for another kind of prompt, for text without a tokenizer, and for messages without a chat
    template.
    """
    if isinstance(prompt, Mapping):
        raise UsageError("the prompt is one message; give a list of messages, [{'role': 'user', 'content': '...'}]")
    if not _is_chat(prompt) and not isinstance(prompt, str):
        return token_ids(prompt)
    if tokenizer is None:
        raise UsageError("this model has no tokenizer; give prompts as lists of token ids")
    return tuple(prompt_ids(tokenizer, prompt)) if isinstance(prompt, str) else chat_ids(tokenizer, prompt)


def turn_ends(tokenizer: Tokenizer | None, prompt: Any) -> frozenset[int]:
    """Return the tokens that end the answer to a conversation; an empty set for other prompts."""
    if tokenizer is None or not _is_chat(prompt):
        return frozenset()
    return need_chat_template(tokenizer).turn_ends(tokenizer)


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Any], tools: Any = None) -> tuple[int, ...]:
    """Return the ids of a conversation, written by the chat template up to the start of the assistant's turn."""
    conversation = parse_conversation(list(messages), tools, "prompt")
    rendered = need_chat_template(tokenizer).render(conversation.messages, conversation.tools, prompt=True)
    return tuple(tokenizer.encode(rendered))


SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class FilePrompt:
    """A text or a conversation of a file, and its place for error messages."""

    place: str
    text: str = ""
    conversation: Conversation | None = None
    category: str = ""
    """The kind of task that the line names, if it does."""


def read_prompt_file(file: Path) -> list[FilePrompt]:
    """Return the prompts of a file in order.

    A .jsonl file (also .gz, .zst) has "prompt", "text" or "messages" (or ShareGPT's "conversations") in each line. Any
    other file is plain text with one prompt per line. Raises UsageError, naming the prompt, for anything else.
    """
    lines = [line for _, line in read_file_lines(file)]
    if not lines:
        raise UsageError(f"{file}: holds no prompt; write one per line")
    places = (f"{file}, prompt {number}" for number in range(1, len(lines) + 1))
    if not format_of(file.name).startswith("jsonl"):
        return [FilePrompt(place, line) for place, line in zip(places, lines)]
    return [_parse(line, place) for place, line in zip(places, lines)]


def _parse(line: str, place: str) -> FilePrompt:
    try:
        record: Any = parse_json(line)
    except ValueError as error:
        raise UsageError(f"{place}: not JSON ({error}); correct that line") from error
    if SURROGATE.search(json.dumps(record, ensure_ascii=False)):
        raise UsageError(f"{place}: holds half of a surrogate pair, which is not text; correct that line")
    fields = record.keys() if isinstance(record, dict) else ()
    category = record["category"] if "category" in fields and isinstance(record["category"], str) else ""
    for field in (MESSAGES, SHAREGPT):
        if field in fields and record[field] is not None:
            conversation = parse_conversation(record[field], record.get("tools"), place)
            return FilePrompt(place, conversation=conversation, category=category)
    for field in ("prompt", "text"):
        if field in fields and isinstance(record[field], str) and record[field]:
            return FilePrompt(place, record[field], category=category)
    raise UsageError(f'{place}: no JSON object with "prompt", "text" or "messages"; correct that line')
