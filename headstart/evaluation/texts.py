"""Texts to evaluate on: documents of any source as token ids, and prompts out of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from headstart.data.documents import Document
from headstart.data.hub_datasets import is_dataset
from headstart.data.tokenizers import Tokenizer, prompt_ids
from headstart.data.units import Selection, plan, read
from headstart.errors import UsageError

PROMPTS_FILE = "prompts.jsonl"
"""Prompts that a model directory carries: texts that it was not trained on."""


def sizes(prompt: int | None, new: int | None, context: int | None, most: int = 256) -> tuple[int, int]:
    """Tokens of a prompt and tokens written after it: as asked for, else `most` of each or what the context has room
    for. Raises UsageError for more than the context (None: any)."""
    length = min(most, max(1, context // 2) if context else most) if prompt is None else prompt
    after = min(most, max(1, context - length) if context else most) if new is None else new
    if context is not None and length + after > context:
        raise UsageError(
            f"--prompt-tokens {length} + --new-tokens {after}: more than the model's context {context}; ask for fewer"
        )
    return length, after


class Documents(list[list[int]]):
    """Token ids of documents, each behind the start tokens that the model knows texts by."""

    def __init__(self, start: Sequence[int] = ()) -> None:
        super().__init__()
        self.start = tuple(start)


def read_documents(sources: Sequence[str], tokenizer: Tokenizer) -> tuple[Documents, int]:
    """Return token ids of every document of `sources`, which are what `headstart prepare` takes, behind the start token
    that the model knows texts by, and the UTF-8 bytes of all.

    Raises UsageError for what cannot be read, and where there is no document.
    """
    selection = Selection(split="test" if any(map(is_dataset, sources)) else "train")
    documents, size = Documents(tokenizer.start_ids), 0
    for unit in plan(sources, selection, Path("\0")):
        for document in read(unit, selection):
            if isinstance(document, Document):
                documents.append(prompt_ids(tokenizer, document.text))
                size += document.bytes
    if not documents:
        raise UsageError(f"{', '.join(sources)}: hold no text; name files or folders of text")
    return documents, size


def cut_prompts(
    documents: Sequence[Sequence[int] | np.ndarray], count: int, length: int, room: int
) -> list[tuple[int, ...]]:
    """`count` prompts of `length` tokens that go on for `room` tokens more, spread evenly over `documents`.

    Documents are cut into pieces of length + room, from the middle of what is left over; fewer pieces give fewer
    prompts. Each prompt begins with the start tokens of `Documents`, its first ones. Raises UsageError where no
    document is long enough.
    """
    start = documents.start if isinstance(documents, Documents) else ()
    size = length + room - len(start)
    places = []
    for number, document in enumerate(documents):
        pieces = (len(document) - len(start)) // size if size > 0 else 0
        first = len(start) + (len(document) - len(start) - pieces * size) // 2
        places += [(number, first + piece * size) for piece in range(pieces)]
    if not places:
        size += len(start)
        raise UsageError(f"no document has {size} tokens ({length} to read and {room} to go on for); ask for fewer")
    count = min(count, len(places))
    chosen = [places[i * len(places) // count] for i in range(count)]
    taken = length - len(start)
    return [(*start, *(int(t) for t in documents[number][first : first + taken]))[:length] for number, first in chosen]


def read_prompts(file: Path, tokenizer: Tokenizer, length: int | None = None) -> list[tuple[int, ...]]:
    """Prompts of a file, cut to their first `length` tokens: .jsonl with "prompt" or "text" in each line, or text, a
    prompt a line. Raises UsageError, naming the line, for what is not that."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read ({error}); give a UTF-8 text file, a prompt a line") from error
    texts = lines
    if file.suffix == ".jsonl":
        texts = []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                texts.append(str(record["prompt"] if "prompt" in record else record["text"]))
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f'{file}, prompt {number}: no JSON object with "prompt" or "text"; mend that line'
                ) from error
    found = [tuple(ids) for ids in (prompt_ids(tokenizer, text)[:length] for text in texts) if ids]
    if not found:
        raise UsageError(f"{file}: holds no prompt; write one a line")
    return found
