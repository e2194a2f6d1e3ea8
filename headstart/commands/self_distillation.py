"""Let a model answer prompts, and write its answers as data to train its heads on.

Heads learn best from text of the distribution that they draft for, which is the model's own (Medusa, section 2.3.2). As
there, conversations are answered turn by turn. Each answer has a seed made of the place of its prompt in the file, so
the output depends neither on how many answers are decoded together nor on where a run was stopped.

The prompts can be the model's own as well: it continues the text that its chat template writes before a user's message
(Magpie, arXiv 2406.08464).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from headstart.api import LanguageModel
from headstart.commands.ordered_lines import OrderedLines, ordered_lines
from headstart.data.chat_template import ChatTemplate, need_chat_template
from headstart.data.conversations import ASSISTANT, Conversation
from headstart.data.lines import read_records
from headstart.data.prepare.duplicates import copies, digest_of, keys_of, near_copies
from headstart.data.prompts import read_prompt_file
from headstart.data.tokenizers import prompt_ids
from headstart.decoding.beam_search import search_beams
from headstart.decoding.generation import Generation, Stats
from headstart.decoding.settings import GenerationSettings
from headstart.errors import UsageError
from headstart.fileio import sha256_of, write_text
from headstart.formats.hub import SUFFIX, local_path
from headstart.formats.registry import format_at

SAMPLE_BYTES = 1 << 20
"""Bytes read at each of three places of a weight file, to tell one model from another."""
QUESTION_ROLES = ("system", "developer", "user")
"""Roles whose messages are taken from the file of prompts."""

Report = Callable[[str], None]
Progress = Callable[..., None]
"""Receives the number of prompts done, the number of all, and as keywords numbers to show."""


@dataclass(frozen=True)
class DistillSettings:
    """Settings of a distillation: prompts, decoding, output file."""

    prompts: Path
    """File of prompts, see `read_prompts`."""
    out: Path
    """The .jsonl file to write."""
    generation: GenerationSettings = field(default_factory=lambda: GenerationSettings(256, 0.3))
    """Length, sampling and heads of an answer; its seed is the seed of the whole file."""
    chat: bool = False
    """True: prompts that are text are messages of a user, which the chat template writes."""
    drop_unfinished: bool = False
    """True: answers cut off at `max_new_tokens` are left out."""
    beams: int = 1
    """Continuations kept by a beam search for the most probable answer (1: sample the answer)."""
    slots: int = 8
    """Number of answers decoded together; the output does not depend on it."""
    exact: bool = True
    """True: the output is bit-identical for every number of heads and slots; False: equal up to rounding."""
    prompts_key: str | None = None
    """Identity of the prompts, of which more can be added later (None: a hash of the file)."""


@dataclass(frozen=True)
class Prompt:
    """A text to continue, a conversation whose questions the model answers in turn, or the start of a question."""

    text: str = ""
    opens_question: bool = False
    """True: `text` is what the chat template writes before a user's message, and the output is that message."""
    questions: tuple[tuple[dict[str, Any], ...], ...] = ()
    """Messages before each answer; empty for a text."""
    tools: tuple[Any, ...] = ()


def read_prompts(file: Path, as_chat: bool = False) -> list[Prompt]:
    """Read a file of prompts.

    A .jsonl file has "prompt", "text" or "messages" (or ShareGPT's "conversations") in each line; any other file is
    text with a prompt in each line. Messages of the assistant are left out: the model answers for itself. With
    `as_chat` a text is the message of a user. Raises UsageError, naming the line, for anything else.
    """
    prompts = []
    for found in read_prompt_file(file):
        if found.conversation is not None:
            prompts.append(_parse_conversation(found.conversation, found.place))
        elif as_chat:
            prompts.append(Prompt(questions=(({"role": "user", "content": found.text},),)))
        else:
            prompts.append(Prompt(found.text))
    return prompts


def _parse_conversation(conversation: Conversation, place: str) -> Prompt:
    questions: list[list[dict[str, Any]]] = [[]]
    for message in conversation.messages:
        if message["role"] == ASSISTANT:
            if message.get("tool_calls"):
                raise UsageError(f"{place}: the assistant calls a tool, which nothing answers here; leave it out")
            if questions[-1]:
                questions.append([])
        elif message["role"] in QUESTION_ROLES:
            questions[-1].append(message)
        else:
            roles = f"{', '.join(QUESTION_ROLES)} and {ASSISTANT}"
            raise UsageError(f"{place}: holds a message of {message['role']}; the roles here are {roles}")
    asked = tuple(tuple(messages) for messages in questions if messages)
    if not asked:
        raise UsageError(f"{place}: asks nothing; leave it out")
    return Prompt(questions=asked, tools=conversation.tools)


def distill(
    model: LanguageModel,
    directory: Path,
    settings: DistillSettings,
    *,
    progress: Progress = lambda done, total, **numbers: None,
    report: Report = lambda line: None,
) -> dict[str, Any]:
    """Write the model's answer to every prompt to `settings.out`, a JSON line each, in the order of the prompts.

    A text gives {"place", "prompt", "text", "finish_reason"}, where "text" is prompt and answer; a conversation gives
    {"place", "messages", "finish_reason"}. `headstart prepare` reads both. The finish reason is "end", "length", or
    "context" if a later question did not fit. A prompt as long as the context is left out.

    `directory` is the model's, or its name on the hub, and tells it from other models. The result holds counts and
    decoding statistics of this call. Raises UsageError for prompts that cannot be read, a model without tokenizer or
    chat template, settings out of range, or `settings.out` written by another process, with other settings, or by
    another program.
    """
    out = settings.out
    if out.suffix != ".jsonl":
        raise UsageError(f"{out}: must hold JSON lines; name a file that ends with .jsonl")
    prompts = read_prompts(settings.prompts, settings.chat)
    template = need_chat_template(model.tokenizer) if any(prompt.questions for prompt in prompts) else None
    ends = frozenset() if template is None else template.turn_ends(model.tokenizer)
    key = settings.prompts_key or sha256_of(settings.prompts)
    recorded = _recorded_settings(model, local_path(directory), settings) | {"prompts": key}
    began = time.perf_counter()
    writer = _Writer(model, template, prompts, ends, settings)
    lines = _write(writer, out, recorded, progress, report)
    numbers = Stats.summed(writer.stats).summary()
    return {
        "out": str(out),
        "prompts": len(prompts),
        "written": lines.written,
        "too_long": writer.too_long,
        "unfinished": writer.unfinished,
        "tokens": numbers["tokens"],
        "tokens_per_pass": numbers["tokens_per_pass"],
        "seconds": round(time.perf_counter() - began, 3),
    }


def write_self_prompts(
    model: LanguageModel,
    directory: Path,
    settings: DistillSettings,
    count: int,
    *,
    progress: Progress = lambda done, total, **numbers: None,
    report: Report = lambda line: None,
) -> int:
    """Let the model write `count` messages of users; write those that differ to `settings.prompts`, and count them.

    Messages without an end are left out, and those that equal an earlier one except for case and white space, or nearly
    equal one (`headstart.data.prepare.duplicates`). A larger count continues the file of a smaller one. Raises
    UsageError for a model without chat template, and as `distill` does.
    """
    template = need_chat_template(model.tokenizer)
    opening, ends = template.user_turn(model.tokenizer)
    prompts = [Prompt(opening, opens_question=True)] * count
    drawn = settings.out.with_name(f".{settings.out.name}.distilling") / "drawn.jsonl"
    settings = replace(settings, drop_unfinished=True)
    writer = _Writer(model, template, prompts, ends, settings)
    _write(writer, drawn, _recorded_settings(model, local_path(directory), settings), progress, report)
    questions = [record["prompt"] for record in read_records(drawn)]
    plain = [" ".join(question.casefold().split()).encode() for question in questions]
    double = copies(np.array([digest_of(text) for text in plain], dtype=np.uint64))
    double |= near_copies(np.array([keys_of(text) for text in plain], dtype=np.uint64).reshape(len(plain), -1))
    kept = [
        json.dumps({"prompt": question}, ensure_ascii=False) + "\n"
        for question, found in zip(questions, double)
        if not found
    ]
    if not kept:
        raise UsageError(f"the model wrote no message of a user with an end in {count:,} attempts; give --prompts")
    write_text(settings.prompts, "".join(kept))
    return len(kept)


def _write(writer: _Writer, out: Path, recorded: Mapping[str, Any], progress: Progress, report: Report) -> OrderedLines:
    """Write the answers that `out` does not have yet, and return its lines."""
    total = len(writer.prompts)
    with ordered_lines(out, recorded, total) as lines:
        if lines.next_place:
            report(f"{out}: resuming after prompt {lines.next_place:,} of {total:,}")
        try:
            writer.run(lines, progress)
        except KeyboardInterrupt:
            report(f"stopped; {lines.next_place:,} of {total:,} are kept: the same command resumes")
            raise
    return lines


def _recorded_settings(model: LanguageModel, directory: Path, settings: DistillSettings) -> dict[str, Any]:
    """Return what the answers depend on; a file is only ever continued with the same."""
    generation, tokenizer = settings.generation, model.tokenizer
    return {
        "model": fingerprint(directory),
        "dtype": str(model.transformer.dtype),
        "max_new_tokens": generation.max_new_tokens,
        "temperature": generation.temperature,
        "top_k": generation.top_k,
        "top_p": generation.top_p,
        "min_p": generation.min_p,
        "seed": generation.seed,
        "beams": None if settings.beams == 1 else settings.beams,
        "drop_unfinished": settings.drop_unfinished,
        # None if files of earlier versions do not record it.
        "chat": settings.chat or None,
        "end_ids": None if tokenizer.end_ids == {tokenizer.end_id} else sorted(tokenizer.end_ids),
    }


def fingerprint(path: Path) -> str:
    """Return a key of a model: a hash of its configuration, its file names and sizes, and samples of its weights."""
    digest = hashlib.sha256()
    for file in format_at(path).files(path):
        size = file.stat().st_size
        if file.suffix in (".safetensors", SUFFIX):
            places = (0, max(0, size // 2 - SAMPLE_BYTES), max(0, size - SAMPLE_BYTES))
        elif file.name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            places = (0, 0, 0)
        else:
            continue
        digest.update(f"{file.relative_to(path if path.is_dir() else path.parent)} {size}\n".encode())
        with file.open("rb") as content:
            for place in places:
                content.seek(place)
                digest.update(content.read(SAMPLE_BYTES))
    return digest.hexdigest()[:24]


@dataclass
class _Pending:
    """A prompt whose answer is due."""

    place: int
    prompt: Prompt
    turn: int
    """Index of the question to answer."""
    messages: list[dict[str, Any]]
    """The conversation so far, the question included; empty for a text."""
    rendered: str
    ids: tuple[int, ...]


class _Writer:
    """Decodes the answers to prompts, many at once, and hands them to lines."""

    def __init__(
        self,
        model: LanguageModel,
        template: ChatTemplate | None,
        prompts: list[Prompt],
        ends: frozenset[int],
        settings: DistillSettings,
    ) -> None:
        self._model, self._tokenizer, self._template = model, model.tokenizer, template
        self._turn_ends, self._settings = ends, settings
        self._running: dict[int, tuple[Generation, _Pending]] = {}
        self.prompts = prompts
        self.stats: list[Stats] = []
        self.too_long = self.unfinished = 0

    def run(self, lines: OrderedLines, progress: Progress) -> None:
        """Answer the prompts that have no line yet."""
        self._lines = lines
        todo = range(self._lines.next_place, len(self.prompts))
        if not todo:
            return
        context = min(self._model.config.context, max(map(self._room, todo)))
        slots = max(1, min(self._settings.slots, len(todo)))
        engine = self._engine = self._model.engine(slots, context, self._settings.exact, prefill_budget=None)
        waiting = iter(todo)
        done, began, tokens = todo.start, time.monotonic(), 0
        progress(done, len(self.prompts))  # what an earlier run wrote does not count for the time left
        while True:
            # Twice as many are submitted as are decoded: no slot is ever empty, and few finished answers wait to be
            # written in order.
            while len(self._running) < 2 * slots and (place := next(waiting, None)) is not None:
                self._submit(self._pending(place, 0, []))
                if self._settings.beams > 1:
                    progress(self._lines.next_place, len(self.prompts))
            if not engine.busy:
                break
            for generation, _ in engine.step():
                if not generation.finished:
                    continue
                _, pending = self._running.pop(id(generation))
                self.stats.append(generation.stats)
                tokens += len(generation.tokens)
                self._take(pending, generation.text, generation.finish_reason == "end")
            if self._lines.next_place != done:
                done = self._lines.next_place
                rate = tokens / max(time.monotonic() - began, 1e-9)
                progress(done, len(self.prompts), **{"tokens/s": f"{rate:,.0f}"})
        progress(len(self.prompts), len(self.prompts))

    def _pending(self, place: int, turn: int, messages: list[dict[str, Any]]) -> _Pending:
        """Return question `turn` of a prompt, after the `messages` before it."""
        prompt = self.prompts[place]
        if not prompt.questions:
            encode = self._tokenizer.encode if prompt.opens_question else partial(prompt_ids, self._tokenizer)
            return _Pending(place, prompt, 0, [], prompt.text, tuple(encode(prompt.text)))
        assert self._template is not None
        messages = [*messages, *prompt.questions[turn]]
        rendered = self._template.render(messages, prompt.tools, prompt=True)
        return _Pending(place, prompt, turn, messages, rendered, tuple(self._tokenizer.encode(rendered)))

    def _room(self, place: int) -> int:
        """Return about the most positions that a prompt and its answers take up."""
        longest = self._settings.generation.max_new_tokens
        prompt = self.prompts[place]
        if not prompt.questions:
            return len(self._pending(place, 0, []).ids) + longest
        assert self._template is not None
        empty = {"role": ASSISTANT, "content": ""}
        messages = [message for question in prompt.questions for message in (*question, empty)]
        rendered = self._template.render(messages[:-1], prompt.tools, prompt=True)
        return len(self._tokenizer.encode(rendered)) + len(prompt.questions) * (longest + 8)

    def _submit(self, pending: _Pending) -> None:
        if len(pending.ids) >= self._engine.context:
            if pending.turn == 0:
                self.too_long += 1
                self._lines.give(pending.place, None)
            else:
                question = pending.prompt.questions[pending.turn]
                self._finish(pending, pending.messages[: -len(question)], "context")
            return
        generation = self._settings.generation
        if self._settings.beams > 1:
            self._take(pending, *self._search(pending))
            return
        digest = hashlib.sha256(f"{generation.seed}\0{pending.place}\0{pending.turn}".encode()).digest()
        seed = int.from_bytes(digest[:8], "big", signed=True)
        running = self._engine.submit(generation.request(pending.ids, seed=seed, ends=self._turn_ends))
        self._running[id(running)] = running, pending

    def _search(self, pending: _Pending) -> tuple[str, bool]:
        """Return the answer that a beam search finds by whole passes, without a cache, and whether it has an end."""
        transformer, tokenizer = self._model.transformer, self._tokenizer

        def logits_of(tokens_BT: Tensor) -> Tensor:
            latent = transformer.latents(tokens_BT.to(transformer.device), [1])[1]
            return transformer.unembedding(latent[:, -1])

        new = min(self._settings.generation.max_new_tokens, self._engine.context - len(pending.ids))
        ends = self._turn_ends | tokenizer.end_ids
        tokens, finished = search_beams(logits_of, pending.ids, self._settings.beams, new, ends)
        length = len(tokens) + finished
        self.stats.append(Stats(tokens=len(tokens), ends=int(finished), passes=length))
        before = tokenizer.decode(list(pending.ids))
        return tokenizer.decode([*pending.ids, *tokens]).removeprefix(before), finished

    def _take(self, pending: _Pending, answer: str, finished: bool) -> None:
        """Keep an answer, and submit the next question of its conversation."""
        reason = "end" if finished else "length"
        if not pending.prompt.questions:
            self._finish(pending, [], reason, answer)
            return
        messages = [*pending.messages, {"role": ASSISTANT, "content": self._as_content(pending, answer)}]
        if finished and pending.turn + 1 < len(pending.prompt.questions):
            self._submit(self._pending(pending.place, pending.turn + 1, messages))
        else:
            self._finish(pending, messages, reason)

    def _as_content(self, pending: _Pending, answer: str) -> str:
        """Return the content of the message that the template renders as `answer`: some templates put a space first."""
        assert self._template is not None
        for content in (answer, answer.lstrip(" ")):
            messages = [*pending.messages, {"role": ASSISTANT, "content": content}]
            if self._template.render(messages, pending.prompt.tools).startswith(pending.rendered + answer):
                return content
        return answer

    def _finish(self, pending: _Pending, messages: list[dict[str, Any]], reason: str, answer: str = "") -> None:
        """Hand the line of a prompt over."""
        self.unfinished += reason == "length"
        record: dict[str, Any] | None
        if reason == "length" and self._settings.drop_unfinished:
            record = None
        elif pending.prompt.questions:
            tools = {"tools": list(pending.prompt.tools)} if pending.prompt.tools else {}
            record = {"messages": messages, **tools, "finish_reason": reason}
        elif pending.prompt.opens_question:
            record = {"prompt": answer.strip()} if answer.strip() else None
        else:
            prompt = pending.prompt.text
            record = {"prompt": prompt, "text": prompt + answer, "finish_reason": reason}
        self._lines.give(pending.place, record)
