"""Calls of functions: the forms in which models write them, a grammar that requires them, and their parser.

Each form is one class and a line of `TOOL_FORMATS`. A model's chat template says which one the model has learnt.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from headstart.decoding.constraints import JSON_LAYOUT, Constraint

MOST_CALLS = 128
"""Most calls in an answer that must call functions."""
_STEP = re.compile(r'\\.?|["{}\[\]:,]', re.DOTALL)
"""Characters of JSON that change the state of `_CallReader`, and escapes."""
Function = tuple[str, dict[str, Any]]
"""Name of a function, and the JSON schema of its arguments."""


@dataclass
class CallPart:
    """A piece of a call: the first one has the function's name, all have the next piece of the arguments in JSON."""

    index: int
    name: str | None
    arguments: str


class ToolFormat:
    """The form of calls: `opening` once, then JSON objects between `before` and `after`, then `ending`."""

    name: ClassVar[str]
    mark: ClassVar[str]
    """Beginning of calls in the text of an answer."""
    opening: ClassVar[str] = ""
    before: ClassVar[str] = ""
    after: ClassVar[str] = ""
    separator: ClassVar[str]
    """Text between two calls."""
    ending: ClassVar[str] = ""
    arguments: ClassVar[str] = "arguments"
    """Field of the JSON object that holds the arguments."""
    bare: ClassVar[bool] = False
    """True: an object at the beginning of an answer is a call without the mark."""
    several: ClassVar[bool] = True
    """True: an answer may have several calls."""

    @staticmethod
    def fits(template: str) -> bool:
        """Return whether the source of a chat template has this form."""
        raise NotImplementedError

    @staticmethod
    def new_id() -> str:
        """Return a name for a call, for which later messages give its result."""
        return f"call_{secrets.token_hex(12)}"

    @property
    def marks(self) -> tuple[str, ...]:
        """Return the pieces of text that may be special tokens."""
        return tuple(filter(None, (self.mark, self.after.strip())))

    def constraint(
        self,
        functions: Sequence[Function],
        most: int,
        special: Callable[[str], int | None],
        answer: dict[str, Any] | None = None,
    ) -> Constraint:
        """Return the constraint of one to `most` calls of functions.

        `special` returns the id of a special token, None for other text. With the JSON schema of an `answer`, that may
        stand instead of calls.
        """
        pattern = "|".join(map(re.escape, self.marks))

        def literal(text: str) -> str:
            ids = ((part, special(part)) for part in re.split(f"({pattern})", text) if part)
            return " ".join(json.dumps(part) if token is None else f"<[{token}]>" for part, token in ids)

        again = f"({literal(self.separator)} call){{0,{most - 1}}}" if most > 1 and self.several else ""
        rules = [f"calls: {literal(self.opening)} call {again} {literal(self.ending)}"]
        rules.append(f"call: {literal(self.before)} function {literal(self.after)}")
        rules.append("function: " + " | ".join(f"f{i}" for i in range(len(functions))))
        for i, (name, schema) in enumerate(functions):
            head = f'{{"name": {json.dumps(name)}, "{self.arguments}": '
            rules += [f'f{i}: {json.dumps(head)} a{i} "}}"', f"a{i}: %json {_with_layout(schema)}"]
        if answer is not None:
            rules.append(f"answer: %json {_with_layout(answer)}")
        return Constraint.lark("\n".join([f"start: calls{' | answer' if answer is not None else ''}", *rules]))


def _with_layout(schema: dict[str, Any]) -> str:
    own = schema.get("x-guidance")
    return json.dumps({**schema, "x-guidance": {**JSON_LAYOUT, **(own if isinstance(own, dict) else {})}})


class Hermes(ToolFormat):
    """Objects in tags of their own: Hermes, Qwen 2.5 and 3, SmolLM3."""

    name = "hermes"
    mark = "<tool_call>"
    before, after, separator = "<tool_call>\n", "\n</tool_call>", "\n"

    @staticmethod
    def fits(template: str) -> bool:
        """Return whether a template has the tag, and no other form of calls in it."""
        return "<tool_call>" in template and "<function=" not in template


class Llama(ToolFormat):
    """One object with `parameters`, with or without a mark before it: Llama 3.1 to 3.3."""

    name = "llama"
    mark, bare, several = "<|python_tag|>", True, False
    separator, arguments = "; ", "parameters"

    @staticmethod
    def fits(template: str) -> bool:
        """Return whether a template names the mark's environment, and asks for parameters."""
        return "parameters" in template and ("ipython" in template.lower() or "<|python_tag|>" in template)


class Mistral(ToolFormat):
    """A list of objects after a special token: Mistral 7B v0.3, Nemo, Large."""

    name = "mistral"
    mark = "[TOOL_CALLS]"
    opening, separator, ending = "[TOOL_CALLS] [", ", ", "]"

    @staticmethod
    def fits(template: str) -> bool:
        """Return whether a template has the token, and names no arguments outside JSON."""
        return "[TOOL_CALLS]" in template and "[ARGS]" not in template

    @staticmethod
    def new_id() -> str:
        """Return nine letters and digits, which Mistral's templates require."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


TOOL_FORMATS: tuple[type[ToolFormat], ...] = (Hermes, Mistral, Llama)


def choose_format(template: str) -> ToolFormat | None:
    """Return the form of calls in a chat template's source; None if it is unknown."""
    return next((kind() for kind in TOOL_FORMATS if kind.fits(template)), None)


def written_out(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages in which tools, calls and results are text in the form of `Hermes`.

    Chat templates that show no tools take these.
    """
    listed = "\n".join(json.dumps(tool) for tool in tools)
    form = '<tool_call>\n{"name": NAME, "arguments": {...}}\n</tool_call>'
    about = f"You can call these functions:\n<tools>\n{listed}\n</tools>\nTo call one, write:\n{form}"
    first = [messages[0]["content"]] if messages[0]["role"] == "system" else []
    written = [{"role": "system", "content": "\n\n".join([*first, about])}] if tools else list(messages[: len(first)])
    for message in messages[len(first) :]:
        content = message["content"]
        if message["role"] == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if written and written[-1].get("tool"):  # templates want turns to alternate
                written[-1]["content"] += f"\n{content}"
                continue
            message = {"role": "user", "tool": True}
        for call in message.get("tool_calls", ()):
            function = {key: call["function"][key] for key in ("name", "arguments")}
            content = "\n".join([*filter(None, [content]), "<tool_call>", json.dumps(function), "</tool_call>"])
        written.append({**message, "content": content})
    return [{key: value for key, value in each.items() if key not in ("tool_calls", "tool")} for each in written]


class _CallReader:
    """Read the JSON object of a call, piece by piece, in a time linear in its length."""

    def __init__(self, form: ToolFormat) -> None:
        self._of_arguments = {form.arguments, "arguments"}
        self.name: str | None = None
        self.done = False
        self._depth, self._quoted, self._escaped = 0, False, False
        self._key: str | None = None
        self._part: list[str] = []
        self._arguments: list[str] = []
        self._begun = False
        """True once the arguments have begun."""

    def read(self, text: str, at: int) -> int:
        """Read from `at` to the end of the object or of the text; return where that is. Raises ValueError."""
        start, scan = at, at + self._escaped
        self._escaped = False
        for step in _STEP.finditer(text, scan):
            char, place = step[0], step.start()
            if char[0] == "\\":
                self._escaped = len(char) == 1  # the next piece has its other half
            elif char == '"':
                self._quoted = not self._quoted
            elif not self._quoted:
                inner = self._depth == 1
                self._depth += (char in "{[") - (char in "}]")
                if self._depth == 1 and char == "{":
                    start = place + 1
                elif inner and (self._depth == 0 or char in ",:"):
                    self._keep(text[start:place])
                    start = place + 1
                    self._end_part(is_key=char == ":")
                    if self._depth == 0:
                        self.done = True
                        return start
        self._keep(text[start:])
        return len(text)

    def take_arguments(self) -> str:
        """Return the arguments that were read since the last call; an object that has none has `{}`."""
        text = "".join(self._arguments)
        self._arguments = []
        if self.done and not self._begun:
            self._begun = True
            return "{}"
        return text

    def _keep(self, part: str) -> None:
        if self._key in self._of_arguments:
            part = part if self._begun else part.lstrip()
            self._begun = self._begun or bool(part)
            self._arguments.append(part)
        elif self._key in (None, "name"):
            self._part.append(part)

    def _end_part(self, is_key: bool) -> None:
        if is_key:
            if self._key is not None:
                raise ValueError("two keys without a value")
            self._key = json.loads("".join(self._part))
        else:
            if self._key == "name":
                self.name = str(json.loads("".join(self._part)))
            self._key = None
        self._part = []


class CallParser:
    """Split the text of one answer into content and parts of calls, as it arrives.

    What is not a call of one of `names` is content. White space next to calls is left out, so that a template writes
    the same text for the message again.
    """

    def __init__(self, form: ToolFormat, names: Collection[str]) -> None:
        self._form, self._names = form, frozenset(names)
        self.calls = 0
        """Number of calls so far."""
        self._state: Callable[[str, int], Iterator[str | CallPart]] = self._begin if form.bare else self._outside
        self._at = 0
        self._held = ""
        """End of the text so far that may begin a mark."""
        self._blank: list[str] = []
        """White space that is content if more content follows."""
        self._raw: list[str] = []
        """Text since the mark of a call, up to the function's name: it is content if no call follows."""
        self._reader = _CallReader(form)
        self._named = False
        """True once the name of the present call is known."""
        self._after_call = False
        """True if the last thing was a call."""

    def push(self, text: str) -> tuple[str, list[CallPart]]:
        """Take the next piece of the text; return the content and the parts of calls that it completes."""
        text, self._held, self._at = self._held + text, "", 0
        found: list[str | CallPart] = []
        while self._at < len(text):
            found += self._state(text, self._at)
        return _joined(found)

    def finish(self) -> str:
        """Return the content that is left at the end of the text."""
        held = self._held
        if self._state == self._between:
            self._raw.append(held)
            held = ""
        left = [*self._give_up(), *self._say(held)]
        return "".join([*left, *([] if self.calls else self._blank)])

    def _begin(self, text: str, at: int) -> Iterator[str | CallPart]:
        """Look for an object at the beginning of the answer."""
        place = len(text) - len(text[at:].lstrip())
        self._blank.append(text[at:place])
        self._at = place
        if place < len(text):
            self._state = self._between if text[place] == "{" else self._outside
        yield from ()

    def _outside(self, text: str, at: int) -> Iterator[str | CallPart]:
        """Look for the mark of a call, in content."""
        mark = self._form.mark
        place = text.find(mark, at)
        if place >= 0:
            yield from self._say(text[at:place])
            self._raw, self._blank = [*self._blank, mark], []
            self._state, self._at = self._between, place + len(mark)
            return
        most = min(len(mark) - 1, len(text) - at)
        kept = next((size for size in range(most, 0, -1) if mark.startswith(text[len(text) - size :])), 0)
        self._held, self._at = text[len(text) - kept :], len(text)
        yield from self._say(text[at : len(text) - kept])

    def _between(self, text: str, at: int) -> Iterator[str | CallPart]:
        """Look for the next object of a call, or the end of the calls."""
        closing = self._form.after.strip()
        char = text[at]
        if char == "{":
            self._reader, self._named, self._state = _CallReader(self._form), False, self._inside
        elif closing and text.startswith(closing, at):
            self._at, self._state = at + len(closing), self._outside
            if self._raw and not self._after_call:
                self._raw.append(closing)
            yield from self._give_up()
        elif closing and closing.startswith(text[at:]):
            self._held, self._at = text[at:], len(text)
        elif char.isspace() or char in "[],;":
            self._raw.append(char)
            self._at = at + 1
        else:
            self._state = self._outside
            yield from self._give_up()

    def _inside(self, text: str, at: int) -> Iterator[str | CallPart]:
        """Read the object of a call."""
        reader = self._reader
        try:
            self._at = reader.read(text, at)
            refused = reader.name not in self._names if reader.name is not None else reader.done
        except (ValueError, RecursionError, TypeError):
            self._at, refused = len(text), True
        if not self._named:
            self._raw.append(text[at : self._at])
        if refused:
            self._state = self._outside
            yield from self._give_up()
        elif reader.name is not None:
            name = None if self._named else reader.name
            if not self._named:
                self._named, self._after_call, self._raw, self._blank = True, True, [], []
                self.calls += 1
            arguments = reader.take_arguments()
            if name is not None or arguments:
                yield CallPart(self.calls - 1, name, arguments)
            if reader.done:
                self._state = self._between

    def _say(self, text: str) -> Iterator[str]:
        """Yield content, and keep white space at its end until more follows."""
        text = text.lstrip() if self._after_call else text
        body = text.rstrip()
        if body:
            yield "".join(self._blank) + body
            self._blank, self._after_call = [], False
        self._blank.append(text[len(body) :])

    def _give_up(self) -> Iterator[str]:
        """Yield as content what looked like a call."""
        raw, self._raw = "".join(self._raw), []
        if raw.strip(" \n[],;") or not self.calls:
            yield from self._say(raw)


def _joined(found: Sequence[str | CallPart]) -> tuple[str, list[CallPart]]:
    """Return the content, and one part for each call."""
    parts: list[CallPart] = []
    for each in found:
        if isinstance(each, CallPart):
            if parts and parts[-1].index == each.index:
                parts[-1].arguments += each.arguments
            else:
                parts.append(each)
    return "".join(each for each in found if isinstance(each, str)), parts
