"""Run a suite: ask its questions of a model or a server, keep a record of each, and summarize them.

A prompt is decoded plainly and with drafts one right after the other, in alternating order, so that what else the
machine does meets both alike. Records hold all that the report needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from headstart.api import LanguageModel
from headstart.console import Progress, say
from headstart.data.chat_template import need_chat_template
from headstart.data.prompts import Message, chat_ids, turn_ends
from headstart.data.tokenizers import prompt_ids
from headstart.decoding.engine import Engine
from headstart.decoding.settings import GenerationSettings, Request, Rule, Sampling
from headstart.errors import UsageError
from headstart.evaluation.inputs import LongPrompts, cut_middle
from headstart.evaluation.published import published
from headstart.evaluation.records import owned, whole_lines
from headstart.evaluation.server_client import answer_of, model_at, open_stream
from headstart.evaluation.settings import SuiteSettings
from headstart.evaluation.speculation import Answer, Pair, TooLong, decode_all, summarize
from headstart.evaluation.suites import Question, Suite, spread
from headstart.fileio import appending

RECORDS = "records.jsonl"
WARM_UP = 16
"""Tokens decoded before the first timing of an engine."""


@dataclass(frozen=True)
class Prompt:
    """A prompt of one turn: messages, or text to continue without a chat template."""

    messages: tuple[Message, ...] = ()
    text: str = ""
    tools: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Reply:
    """The answers to one prompt."""

    drafted: Answer
    plain: Answer | None = None
    equal: bool = False
    cut: bool = False


class Subject(Protocol):
    """Answer prompts: a model in this process, or a server."""

    identity: Mapping[str, Any]
    """Settings that its answers depend on, as plain data."""

    def check(self, questions: Sequence[Question]) -> None:
        """Raise UsageError if it cannot answer such questions."""

    def ask(self, prompt: Prompt, temperature: float, seed: int, plain_first: bool) -> Reply:
        """Return the answers. Raise TooLong if the prompt leaves no room for an answer."""


class ModelSubject:
    """A model in this process, with one engine that drafts and a plain one."""

    def __init__(self, model: LanguageModel, settings: SuiteSettings, new_tokens: int, long: LongPrompts) -> None:
        if new_tokens >= model.config.context:
            raise UsageError(
                f"--max-new-tokens {new_tokens} leaves no room for a prompt in the context {model.config.context}; "
                "ask for fewer"
            )
        if (1 in (settings.heads, model.config.drafting_heads)) and not settings.lookup:
            raise UsageError("nothing proposes drafts: name heads with --heads-from, or take --suite.lookup 8")
        Request((0,), new_tokens, heads=settings.heads).check(model.config, model.config.context)
        self._model, self._settings, self._new, self._long = model, settings, new_tokens, long
        self._context = 0
        self._engines: tuple[Engine, Engine]
        self.identity: Mapping[str, Any] = {"new_tokens": new_tokens, "long_prompts": long}

    def check(self, questions: Sequence[Question]) -> None:
        """Raise UsageError if the model cannot answer such questions, and make engines for the longest of them."""
        if any(question.turns for question in questions) and not self._settings.raw:
            try:
                need_chat_template(self._model.tokenizer)
            except UsageError as error:
                raise UsageError(f"{error}, or continue the questions as text: --suite.raw") from error
        self._decode_with(min(self._model.config.context, 1024 + self._new))

    def ask(self, prompt: Prompt, temperature: float, seed: int, plain_first: bool) -> Reply:
        """Return the answer with drafts and the plain one."""
        tokenizer = self._model.tokenizer
        ids = (
            chat_ids(tokenizer, prompt.messages, list(prompt.tools) or None)
            if prompt.messages
            else tuple(prompt_ids(tokenizer, prompt.text))
        )
        room = self._model.config.context - self._new
        cut = len(ids) > room
        if cut and self._long == "skip":
            raise TooLong(f"{len(ids)} tokens")
        ids = cut_middle(ids, room) if cut else ids
        self._decode_with(len(ids) + self._new)
        settings = GenerationSettings(self._new, temperature, acceptance=self._settings.acceptance)
        ends = turn_ends(tokenizer, prompt.messages)
        requests = [
            GenerationSettings.with_fields(settings, {"heads": heads}).request(ids, seed=seed, ends=ends)
            for heads in (1, self._settings.heads)
        ]
        if not self._settings.plain:
            return Reply(self._decode(1, requests), cut=cut)
        first = 0 if plain_first else 1
        found = {kind: self._decode(kind, requests) for kind in (first, 1 - first)}
        return Reply(found[1], found[0], found[0].output == found[1].output, cut)

    def _decode(self, kind: int, requests: Sequence[Request]) -> Answer:
        [answer] = decode_all(self._engines[kind], [requests[kind]])
        return answer

    def _decode_with(self, positions: int) -> None:
        """Have engines with room for so many positions, and let each of them decode before it is timed."""
        if positions <= self._context:
            return
        model, settings = self._model, self._settings
        self._context = min(model.config.context, max(positions, 2 * self._context))
        # Every prompt is read whole: without `prefix_reuse` a second temperature costs what the first one did.
        alike: dict[str, Any] = {"context": self._context, "prefill_budget": None, "prefix_reuse": False}
        self._engines = (
            model.engine(1, tree=0, **alike),
            model.engine(1, lookup=settings.lookup, tree=settings.tree, **alike),
        )
        for engine, heads in zip(self._engines, (1, settings.heads)):
            rule = Rule.parse(settings.acceptance)
            warm = Request((1,) * WARM_UP, min(WARM_UP, self._context - WARM_UP), heads=heads, acceptance=rule)
            decode_all(engine, [warm])


class ServerSubject:
    """A server that has OpenAI's API."""

    def __init__(self, url: str, model: str | None, new_tokens: int) -> None:
        first = model_at(url)
        self.url, self.model, self._new = url, model or first, new_tokens
        self.identity: Mapping[str, Any] = {"new_tokens": new_tokens, "url": url}

    def check(self, questions: Sequence[Question]) -> None:
        """Accept all questions: the server reports what it cannot answer."""

    def ask(self, prompt: Prompt, temperature: float, seed: int, plain_first: bool) -> Reply:
        """Return the server's answer."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self._new,
            "temperature": temperature,
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if prompt.messages:
            body |= {"messages": list(prompt.messages), **({"tools": list(prompt.tools)} if prompt.tools else {})}
            return Reply(answer_of(open_stream(self.url, "chat/completions", body)))
        return Reply(answer_of(open_stream(self.url, "completions", body | {"prompt": prompt.text})))


def check(settings: SuiteSettings) -> None:
    """Raise UsageError for settings out of range."""
    if not settings.temperatures or len(set(settings.temperatures)) < len(settings.temperatures):
        raise UsageError("--suite.temperatures must be one or more different numbers, 0 (greedy) or above")
    for temperature in settings.temperatures:
        Sampling(temperature)
    Rule.parse(settings.acceptance)


def run_suite(
    suite: Suite,
    subject: Subject,
    settings: SuiteSettings,
    limit: int | None,
    out: Path | None,
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """Ask the questions of a suite and return the summaries; records are kept in OUT/SUITE, and runs resume from them.

    `identity` is what records depend on besides the settings. Raises UsageError for a suite that cannot be read or
    answered, and for a folder with records of other settings.
    """
    questions = suite.questions(settings.file)
    order = spread(questions)[:limit]
    subject.check([questions[number] for number in order])
    kept = {name: value for name, value in asdict(settings).items() if name not in ("temperatures", "against")}
    kept["file"] = None if settings.file is None else str(settings.file)
    other = {} if settings.against is None else _other_run(suite, settings.against)
    known: dict[tuple[str, str], dict[str, Any]] = {}
    with ExitStack() as stack:
        keep: Callable[[str], Any] = len
        if out is not None:
            folder = out / suite.name
            stack.enter_context(owned(folder, {"task": suite.name, **identity, **subject.identity, **kept}))
            known = {(line["question"], line["temperature"]): line for line in whole_lines(folder / RECORDS)}
            lines = stack.enter_context(appending(folder / RECORDS))
            keep = lambda text: (lines.write(text), lines.flush())  # noqa: E731
        asked = [(number, f"{t:g}") for number in order for t in settings.temperatures]
        done = sum((questions[number].name, t) in known for number, t in asked)
        if done:
            say(f"{suite.name}: {done} of {len(asked)} answers are there already")
        with Progress(suite.name, len(asked), unit="answers", start=done) as bar:
            for place, (number, t) in enumerate(asked):
                question = questions[number]
                if (question.name, t) in known:
                    continue
                turn = sum(divmod(place, len(settings.temperatures)))
                record = _ask(subject, question, float(t), number, settings.raw, plain_first=turn % 2 == 0)
                keep(json.dumps(record) + "\n")
                known[question.name, t] = record
                bar.advance(1)
    chosen = {t: [known[questions[number].name, t] for number, at in asked if at == t] for _, t in asked}
    return {
        "questions": len(order),
        "of": len(questions),
        "settings": {**subject.identity, **kept},
        "temperatures": {t: _summaries(suite, records, other) for t, records in chosen.items()},
        "against": None if settings.against is None else str(settings.against),
        "published": published(suite.name),
    }


def _ask(
    subject: Subject, question: Question, temperature: float, seed: int, raw: bool, plain_first: bool
) -> dict[str, Any]:
    """Ask all turns of a question, feeding back the plain answers, and return the record."""
    record: dict[str, Any] = {
        "question": question.name,
        "category": question.category,
        "temperature": f"{temperature:g}",
    }
    turns: list[dict[str, Any]] = []
    before: tuple[Message, ...] = ()
    said = ""
    for new in question.turns or ((),):
        before += new
        if raw or not question.turns:
            said += question.text or "\n\n".join(str(message["content"]) for message in new) + "\n\n"
            prompt = Prompt(text=said)
        else:
            prompt = Prompt(before, tools=question.tools)
        try:
            reply = subject.ask(prompt, temperature, seed, plain_first)
        except TooLong:
            record["skipped"] = len(question.turns or ((),)) - len(turns)
            break
        except UsageError as error:
            raise UsageError(f"question {question.name}: {error}") from error
        turn: dict[str, Any] = {"drafted": reply.drafted.record(), "cut": reply.cut}
        if reply.plain is not None:
            turn |= {"plain": reply.plain.record(), "equal": reply.equal}
        turns.append(turn)
        text = (reply.plain or reply.drafted).text
        before += ({"role": "assistant", "content": text},)
        said += f"{text}\n\n"
    return record | {"turns": turns}


def _other_run(suite: Suite, folder: Path) -> dict[tuple[str, str], Sequence[Mapping[str, Any]]]:
    """Return the turns of the records of another run, by question and temperature."""
    file = folder / suite.name / RECORDS
    found = {(line["question"], line["temperature"]): line["turns"] for line in whole_lines(file)}
    if not found:
        raise UsageError(f"{file}: holds no records; name the --out of a run of {suite.name} with --suite.against")
    return found


def _summaries(
    suite: Suite,
    records: Sequence[Mapping[str, Any]],
    other: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """Return the summaries of all records, of each group of several categories and of each category."""
    found: dict[str, Any] = {
        "skipped_prompts": sum(record.get("skipped", 0) for record in records),
        "cut_prompts": sum(turn["cut"] for record in records for turn in record["turns"]),
    }
    parts: dict[str, list[Pair]] = {"overall": []}
    groups: dict[str, str | None] = {"overall": None}
    for record in records:
        if not record["turns"]:
            continue
        category, pair = (
            record["category"],
            _pair(record["turns"], other.get((record["question"], record["temperature"]), ())),
        )
        group = suite.groups.get(category)
        for name, of in (("overall", None), (group, None), (category, group)):
            if name is not None:
                parts.setdefault(name, []).append(pair)
                groups[name] = of
    if not parts["overall"]:
        raise UsageError(
            f"{suite.name}: all prompts are longer than the model's context allows; ask for fewer --max-new-tokens, or "
            "take --long-prompts middle"
        )
    return found | {
        "parts": [{"name": name, "group": groups[name], **summarize(pairs)} for name, pairs in parts.items()]
    }


def _pair(turns: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> Pair:
    return Pair(
        [Answer(**turn["drafted"]) for turn in turns],
        [Answer(**turn["plain"]) for turn in turns if "plain" in turn],
        sum(turn.get("equal", False) for turn in turns),
        [Answer(**turn["drafted"]) for turn in other] if len(other) == len(turns) else (),
    )
