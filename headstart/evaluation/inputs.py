"""Read what a model is evaluated on: documents of any source as token ids, and prompts from them or from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from headstart.data.chat_template import ChatTemplate, encode_conversation, need_chat_template
from headstart.data.conversations import ASSISTANT
from headstart.data.prepare.documents import Document
from headstart.data.prepare.hub import is_dataset
from headstart.data.prepare.units import Selection, hold_conversations, plan, read
from headstart.data.prompts import FilePrompt, chat_ids, read_prompt_file, turn_ends
from headstart.data.shards import TokenShards
from headstart.data.tokenizers import Tokenizer, prompt_ids
from headstart.errors import UsageError
from headstart.evaluation.settings import PROMPTS_FILE
from headstart.formats.registry import load_config, load_model_tokenizer

LongPrompts = Literal["skip", "middle", "start"]
"""Ways to handle prompts that are too long: leave them out, cut their middle, or (for text) keep their start."""


def sizes(prompt: int | None, new: int | None, context: int | None, most: int = 256) -> tuple[int, int]:
    """Return the tokens of a prompt and of its output: those given, else `most` or what the context has room for.

    Raises UsageError if together they exceed the context (None: no limit).
    """
    length = min(most, max(1, context // 2) if context else most) if prompt is None else prompt
    after = min(most, max(1, context - length) if context else most) if new is None else new
    if context is not None and length + after > context:
        raise UsageError(
            f"--prompt-tokens {length} + --new-tokens {after}: more than the model's context {context}; ask for fewer"
        )
    return length, after


class Documents(list[list[int]]):
    """Token ids of documents.

    Attributes:
        start: the start tokens that each document begins with.
        targets: for each document (T,) bool, its tokens to predict; None: all but the start tokens.
    """

    def __init__(self, start: Sequence[int] = (), targets: list[np.ndarray] | None = None) -> None:
        super().__init__()
        self.start, self.targets = tuple(start), targets


def read_documents(sources: Sequence[str], tokenizer: Tokenizer) -> tuple[Documents, int]:
    """Return the documents of `sources`, which may be all that `headstart prepare` takes, and the bytes to predict.

    A text begins with the tokenizer's start tokens. If the sources hold conversations, the chat template writes these,
    and only the answers are to be predicted, as in training. Raises UsageError if a source cannot be read, no document
    is found, or the tokenizer has no chat template.
    """
    split = "test" if any(map(is_dataset, sources)) else "train"
    selection = Selection(split=split)
    documents, size = Documents(tokenizer.start_ids), 0
    template = None
    if hold_conversations(sources, split):
        selection = replace(selection, conversations=True, texts=True)
        template, documents.targets = need_chat_template(tokenizer), []
    for unit in plan(sources, selection, Path("\0")):
        for document in read(unit, selection):
            if isinstance(document, Document):
                ids, is_target, count = _encode_document(document, tokenizer, template)
                documents.append(ids)
                size += count
                if documents.targets is not None:
                    documents.targets.append(is_target)
    if not documents:
        raise UsageError(f"{', '.join(sources)}: hold no text; name files or folders of text")
    if any(tuple(ids[: len(documents.start)]) != documents.start for ids in documents):  # not those of a template
        documents.start = ()
    return documents, size


def _encode_document(
    document: Document, tokenizer: Tokenizer, template: ChatTemplate | None
) -> tuple[list[int], np.ndarray, int]:
    """Return token ids, (T,) bool which of them are to be predicted, and the bytes of these."""
    if document.conversation is None or template is None:
        ids = prompt_ids(tokenizer, document.text)
        return ids, np.arange(len(ids)) >= len(tokenizer.start_ids), document.bytes
    try:
        [(conversation, answered)] = encode_conversation(document.conversation, template, tokenizer)
    except UsageError as error:
        raise UsageError(f"{document.name}: {error}") from error
    answers = tokenizer.decode(conversation[answered].tolist())
    return conversation.tolist(), answered, len(answers.encode("utf-8"))


def cut_prompts(
    documents: Sequence[Sequence[int] | np.ndarray], count: int, length: int, room: int
) -> list[tuple[int, ...]]:
    """Cut `count` prompts of `length` tokens, each followed by `room` tokens, spread evenly over `documents`.

    A document gives as many pieces of length + room tokens as fit, from its middle; fewer pieces give fewer prompts.
    Each prompt begins with the start tokens of `Documents`. Raises UsageError if no document is long enough.
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
        raise UsageError(f"no document has {size} tokens ({length} of a prompt and {room} after it); ask for fewer")
    count = min(count, len(places))
    chosen = [places[i * len(places) // count] for i in range(count)]
    taken = length - len(start)
    return [(*start, *(int(t) for t in documents[number][first : first + taken]))[:length] for number, first in chosen]


@dataclass(frozen=True)
class FilePrompts:
    """Prompts that fit, as token ids, and the number of those that were too long."""

    prompts: list[tuple[int, ...]]
    skipped: int = 0
    cut: int = 0
    ends: Sequence[frozenset[int]] = ()
    """Tokens that end the answer to each prompt in addition to the model's own: a conversation's end of turn."""


def fitting_prompts(
    file: Path, tokenizer: Tokenizer, longest: int | None = None, long: LongPrompts = "skip"
) -> FilePrompts:
    """Read the prompts of a file (`read_prompt_file`) that have at most `longest` tokens.

    The chat template writes conversations, up to the answer to their last question. Longer prompts are skipped, cut in
    the middle, or cut to their start; "start" skips conversations, because their end is never cut. Raises UsageError if
    a prompt is malformed, which it names, or if none is left.
    """
    found, ends, skipped, cut = [], [], 0, 0
    for each in read_prompt_file(file):
        ids = _prompt_ids(each, tokenizer)
        if longest is not None and len(ids) > longest:
            if long == "skip" or (long == "start" and each.conversation is not None):
                skipped += 1
                continue
            cut += 1
            ids = ids[:longest] if long == "start" else cut_middle(ids, longest)
        if ids:
            found.append(ids)
            ends.append(turn_ends(tokenizer, each.conversation and each.conversation.messages))
    if not found and skipped:
        raise UsageError(
            f"{file}: all {skipped} prompts are longer than {longest} tokens; take more --prompt-tokens or fewer "
            "--new-tokens, or --long-prompts middle"
        )
    if not found:
        raise UsageError(f"{file}: holds no prompt; write one per line")
    return FilePrompts(found, skipped, cut, ends)


def cut_middle(ids: tuple[int, ...], longest: int) -> tuple[int, ...]:
    """Return the beginning and the end of token ids, `longest` in all."""
    return ids[: longest - longest // 2] + ids[len(ids) - longest // 2 :]


def prompt_limit(tokens: int | None, long: LongPrompts | None, new: int, context: int) -> tuple[int, LongPrompts]:
    """Return the most tokens of a prompt of a file, and what happens to longer ones, for a command's settings.

    The limit is `tokens`, and longer text is cut to its start. Without `tokens` the limit is what the context has room
    for, and longer prompts are left out.
    """
    return tokens or context - new, long or ("skip" if tokens is None else "start")


def read_prompts(file: Path, tokenizer: Tokenizer, length: int | None = None) -> list[tuple[int, ...]]:
    """Return the prompts of a file, text cut to its first `length` tokens."""
    return fitting_prompts(file, tokenizer, length, "start").prompts


def _prompt_ids(prompt: FilePrompt, tokenizer: Tokenizer) -> tuple[int, ...]:
    try:
        if prompt.conversation is None:
            return tuple(prompt_ids(tokenizer, prompt.text))
        messages = list(prompt.conversation.messages)
        while messages and messages[-1]["role"] == ASSISTANT:
            messages.pop()
        if messages:
            return chat_ids(tokenizer, messages, list(prompt.conversation.tools) or None)
    except UsageError as error:
        raise UsageError(f"{prompt.place}: {error}") from error
    raise UsageError(f"{prompt.place}: asks nothing; remove it")


def load_prompts(
    model: Path, *, prompts: Path | None, data: Path | None, count: int, tokens: int, room: int
) -> list[tuple[int, ...]]:
    """Return `count` prompts of `tokens` tokens, see `find_prompts`; text of a file is cut to its start."""
    return find_prompts(model, prompts, data, count, tokens, room, (tokens, "start")).prompts


def find_prompts(
    model: Path,
    prompts: Path | None,
    data: Path | None,
    count: int,
    tokens: int,
    room: int,
    limit: tuple[int, LongPrompts],
    heads: Path | None = None,
) -> FilePrompts:
    """Find at most `count` prompts for a model.

    They come from the file `prompts` or from the model directory's own (`fitting_prompts` with `limit`). Otherwise they
    are pieces of `tokens` tokens, followed by `room` more, of held-out documents in the shards folder `data` or in that
    of the run of the model (RUN/model), or of its separate `heads` (RUN/heads).
    """
    tokenizer = load_model_tokenizer(model)
    if prompts is None and data is None and (model / PROMPTS_FILE).is_file():
        prompts = model / PROMPTS_FILE
    if prompts is not None:
        if tokenizer is None:
            raise UsageError(f"{model}: has no tokenizer to read {prompts} with; give --data, prepared tokens")
        given = fitting_prompts(prompts, tokenizer, *limit)
    else:
        shards = TokenShards.open(data or _data_of_run(heads or model), "validation")
        documents = [shards.document(i) for i in range(len(shards.documents))]
        given = FilePrompts(cut_prompts(documents, count, tokens, room))
    vocab_size = load_config(model).vocab_size
    largest = max((max(p) for p in given.prompts), default=0)
    if largest >= vocab_size:
        raise UsageError(
            f"the prompts hold token {largest}, the vocabulary of {model} has {vocab_size}; give data of that model"
        )
    return replace(given, prompts=given.prompts[:count], ends=given.ends[:count])


def _data_of_run(model: Path) -> Path:
    run = model.resolve().parent
    if (run / "data" / "manifest.json").is_file():
        return run / "data"
    if (run / "config.yaml").is_file():
        from headstart.training.config import load_config as load_run_config

        path = load_run_config(run / "config.yaml").data.path
        if path is not None:
            return path
    raise UsageError(f"{model}: lies in no run with data; give --prompts FILE, or --data FOLDER of prepared tokens")
