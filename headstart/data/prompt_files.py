"""Files of prompts: a text a line, or JSON lines with texts or conversations."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.data.conversations import MESSAGES, SHAREGPT, Conversation, parse_conversation
from headstart.data.lines import format_of, parse_json, read_file_lines
from headstart.errors import UsageError

SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class FilePrompt:
    """A text, or a conversation, and where it stands: for messages."""

    place: str
    text: str = ""
    conversation: Conversation | None = None


def read_prompt_file(file: Path) -> list[FilePrompt]:
    """Return the prompts of a file in their order: .jsonl (.gz, .zst) with "prompt", "text" or "messages" (ShareGPT's
    "conversations" too) in each line, or plain text, a prompt a line.

    Raises UsageError, naming the prompt, for what is none of these.
    """
    lines = [line for _, line in read_file_lines(file)]
    if not lines:
        raise UsageError(f"{file}: holds no prompt; write one a line")
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
        raise UsageError(f"{place}: holds half of a surrogate pair, which is no text; correct that line")
    known = record.keys() if isinstance(record, dict) else ()
    for field in (MESSAGES, SHAREGPT):
        if field in known and record[field] is not None:
            return FilePrompt(place, conversation=parse_conversation(record[field], record.get("tools"), place))
    for field in ("prompt", "text"):
        if field in known and isinstance(record[field], str) and record[field]:
            return FilePrompt(place, record[field])
    raise UsageError(f'{place}: no JSON object with "prompt", "text" or "messages"; correct that line')
