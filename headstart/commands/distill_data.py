"""Data written by the model itself: its own continuations of prompts, to train heads on what they will have to draft.

Heads learn best from text of the distribution that they draft for, and that is the model's own (Medusa, section 2.3.2;
conversations are answered turn by turn, as there). Every answer has a seed of its own, made from its place in the file
of prompts, so the output depends neither on how many are written at once nor on where a run was stopped.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headstart.api import LanguageModel
from headstart.commands.distill_prompts import Prompt, read_prompts
from headstart.commands.ordered_lines import OrderedLines, ordered_lines
from headstart.data.chat_template import ChatTemplate, need_chat_template
from headstart.data.conversations import ASSISTANT
from headstart.data.tokenizers import Tokenizer, prompt_ids
from headstart.decoding.generation import Generation, Stats
from headstart.decoding.settings import GenerationSettings
from headstart.errors import UsageError
from headstart.fileio import sha256_of
from headstart.formats.hub import local_directory

SAMPLE_BYTES = 1 << 20
"""Read at three places of a file of weights, to tell one model from another."""

Report = Callable[[str], None]
Progress = Callable[[int, int, dict[str, Any]], None]
"""Gets prompts done, prompts in all, and numbers to show."""


@dataclass(frozen=True)
class DistillSettings:
    """What is written, beside model and prompts."""

    max_new_tokens: int = 256
    temperature: float = 0.3
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    drop_unfinished: bool = False
    """Leave out what was still going on after `max_new_tokens`."""
    chat: bool = False
    """Texts are messages of a user, which the chat template writes."""


def distill(
    model: LanguageModel,
    directory: Path,
    prompts_file: Path,
    out: Path,
    settings: DistillSettings | None = None,
    *,
    heads: int | None = None,
    slots: int = 8,
    exact: bool = True,
    progress: Progress = lambda done, total, numbers: None,
    report: Report = lambda line: None,
) -> dict[str, Any]:
    """Writes the model's continuation of every prompt to `out`, a JSON line each, in the order of the prompts.

    Texts give {"place", "prompt", "text", "finish_reason"}, the text being prompt and continuation; conversations give
    {"place", "messages", "finish_reason"}: both are what `headstart prepare` reads. The finish reason is "end",
    "length", or "context" where a later question did not fit any more. A prompt as long as the context is left out.

    Args:
        directory: of the model, or its name on the hub, to tell it from others.
        heads, slots: how many heads decode, how many texts at once; the output does not depend on them (with
            `exact=False` up to rounding).

    Returns: counts and the decoding statistics of this call.

    Raises:
        UsageError: prompts that cannot be read, a model without tokenizer or chat template, settings out of range,
            `out` written by another process, with other settings, or by someone else.
    """
    settings = settings or DistillSettings()
    if out.suffix != ".jsonl":
        raise UsageError(f"{out}: is to hold JSON lines; name a file that ends with .jsonl")
    directory = local_directory(directory)
    prompts, tokenizer = read_prompts(prompts_file, settings.chat), model.tokenizer
    template = need_chat_template(tokenizer) if any(prompt.groups for prompt in prompts) else None
    kept = {
        "model": fingerprint(directory),
        "prompts": sha256_of(prompts_file),
        "dtype": str(model.transformer.trunk.embedding.weight.dtype),
        **asdict(settings),
        # None where files of versions without them say nothing of them.
        "chat": settings.chat or None,
        "end_ids": None if tokenizer.end_ids == {tokenizer.end_id} else sorted(tokenizer.end_ids),
    }
    began = time.perf_counter()
    with ordered_lines(out, kept, len(prompts)) as lines:
        if lines.next_place:
            report(f"{out}: resuming after prompt {lines.next_place:,} of {len(prompts):,}")
        writer = _Writer(model, tokenizer, template, prompts, lines, settings, heads)
        try:
            writer.run(slots, exact, progress)
        except KeyboardInterrupt:
            report(f"stopped; {lines.next_place:,} of {len(prompts):,} are kept: the same command resumes")
            raise
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


def fingerprint(directory: Path) -> str:
    """Tells a model from others: configuration, names and sizes of its files, and a MiB at three places of weights."""
    digest = hashlib.sha256()
    for file in sorted(directory.rglob("*")):
        size = file.stat().st_size
        if file.suffix == ".safetensors":
            places = (0, max(0, size // 2 - SAMPLE_BYTES), max(0, size - SAMPLE_BYTES))
        elif file.name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            places = (0, 0, 0)
        else:
            continue
        digest.update(f"{file.relative_to(directory)} {size}\n".encode())
        with file.open("rb") as content:
            for place in places:
                content.seek(place)
                digest.update(content.read(SAMPLE_BYTES))
    return digest.hexdigest()[:24]


@dataclass
class _Text:
    """A prompt on its way: which group of its messages is answered, and all said so far."""

    place: int
    prompt: Prompt
    turn: int
    said: list[dict[str, Any]]
    rendered: str
    ids: tuple[int, ...]


class _Writer:
    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        prompts: list[Prompt],
        lines: OrderedLines,
        settings: DistillSettings,
        heads: int | None,
    ) -> None:
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._prompts, self._lines, self._settings = prompts, lines, settings
        self._generation = GenerationSettings(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            heads=heads,
        )
        self._turn_ends = frozenset() if template is None else template.turn_ends(tokenizer)
        self._on_its_way: dict[int, tuple[Generation, _Text]] = {}
        self.stats: list[Stats] = []
        self.too_long = self.unfinished = 0

    def run(self, slots: int, exact: bool, progress: Progress) -> None:
        todo = range(self._lines.next_place, len(self._prompts))
        if not todo:
            return
        context = min(self._model.config.context, max(map(self._room, todo)))
        slots = max(1, min(slots, len(todo)))
        engine = self._engine = self._model.engine(slots, context, exact, prefill_budget=None)
        waiting = iter(todo)
        done, began, tokens = todo.start, time.monotonic(), 0
        while True:
            # As many again wait as are decoded: no slot is ever empty, and results are few that wait for their turn.
            while len(self._on_its_way) < 2 * slots and (place := next(waiting, None)) is not None:
                self._ask(self._text(place, 0, []))
            if not engine.busy:
                break
            for generation, _ in engine.step():
                if not generation.finished:
                    continue
                _, text = self._on_its_way.pop(id(generation))
                self.stats.append(generation.stats)
                tokens += len(generation.tokens)
                self._take(text, generation)
            if self._lines.next_place != done:
                done = self._lines.next_place
                rate = tokens / max(time.monotonic() - began, 1e-9)
                progress(done, len(self._prompts), {"tokens/s": f"{rate:,.0f}"})
        progress(len(self._prompts), len(self._prompts), {})

    def _text(self, place: int, turn: int, said: list[dict[str, Any]]) -> _Text:
        prompt = self._prompts[place]
        if not prompt.groups:
            return _Text(place, prompt, 0, [], prompt.text, tuple(prompt_ids(self._tokenizer, prompt.text)))
        assert self._template is not None
        said = [*said, *prompt.groups[turn]]
        rendered = self._template.render(said, prompt.tools, prompt=True)
        return _Text(place, prompt, turn, said, rendered, tuple(self._tokenizer.encode(rendered)))

    def _room(self, place: int) -> int:
        """The most positions that this prompt and its answers can take up, about."""
        most = self._settings.max_new_tokens
        prompt = self._prompts[place]
        if not prompt.groups:
            return len(self._text(place, 0, []).ids) + most
        assert self._template is not None
        empty = {"role": ASSISTANT, "content": ""}
        said = [message for group in prompt.groups for message in (*group, empty)]
        written = self._template.render(said[:-1], prompt.tools, prompt=True)
        return len(self._tokenizer.encode(written)) + len(prompt.groups) * (most + 8)

    def _ask(self, text: _Text) -> None:
        if len(text.ids) >= self._engine.context:
            if text.turn == 0:
                self.too_long += 1
                self._lines.give(text.place, None)
            else:
                self._finish(text, text.said[: -len(text.prompt.groups[text.turn])], "context")
            return
        digest = hashlib.sha256(f"{self._settings.seed}\0{text.place}\0{text.turn}".encode()).digest()
        seed = int.from_bytes(digest[:8], "big", signed=True)
        generation = self._engine.submit(self._generation.request(text.ids, seed=seed, ends=self._turn_ends))
        self._on_its_way[id(generation)] = generation, text

    def _take(self, text: _Text, generation: Generation) -> None:
        """Keeps an answer, and asks what comes next in its conversation."""
        finished = generation.finish_reason == "end"
        reason, answer = "end" if finished else "length", generation.text
        if not text.prompt.groups:
            self._finish(text, [], reason, answer)
            return
        said = [*text.said, {"role": ASSISTANT, "content": self._as_content(text, answer)}]
        if finished and text.turn + 1 < len(text.prompt.groups):
            self._ask(self._text(text.place, text.turn + 1, said))
        else:
            self._finish(text, said, reason)

    def _as_content(self, text: _Text, answer: str) -> str:
        """The content of a message that the template makes this answer of; most put no space before it, some do."""
        assert self._template is not None
        for content in (answer, answer.lstrip(" ")):
            said = [*text.said, {"role": ASSISTANT, "content": content}]
            if self._template.render(said, text.prompt.tools).startswith(text.rendered + answer):
                return content
        return answer

    def _finish(self, text: _Text, said: list[dict[str, Any]], reason: str, answer: str = "") -> None:
        self.unfinished += reason == "length"
        record: dict[str, Any] | None
        if reason == "length" and self._settings.drop_unfinished:
            record = None
        elif text.prompt.groups:
            tools = {"tools": list(text.prompt.tools)} if text.prompt.tools else {}
            record = {"messages": said, **tools, "finish_reason": reason}
        else:
            prompt = text.prompt.text
            record = {"prompt": prompt, "text": prompt + answer, "finish_reason": reason}
        self._lines.give(text.place, record)
