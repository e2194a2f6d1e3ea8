"""Chat templates: a conversation as the text that its model reads, and which parts of it the assistant wrote.

The template is the tokenizer's own, `chat_template.jinja` or "chat_template" in its `tokenizer_config.json`. It is a
program out of a download, so it runs in Jinja's sandbox, with the functions that transformers gives it. Its clock
stands still: what is prepared must not depend on the day.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from headstart.data.conversations import ASSISTANT, Conversation, is_target
from headstart.data.special_tokens import CONFIG_FILE, read_json, special_tokens
from headstart.data.tokenizers import Tokenizer
from headstart.errors import UsageError
from headstart.fileio import read_bounded

TEMPLATE_FILE = "chat_template.jinja"
MAX_BYTES = 1 << 20
NOW = datetime(2024, 7, 26)
"""The day that templates are told, the one that Llama's own names where it is told none."""
OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Put around what a template says the assistant writes. Unicode keeps both for programs; no text holds them."""
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]
"""Characters of a text, begin and end."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the special tokens that it may ask for, by name."""

    source: str
    tokens: tuple[tuple[str, str], ...] = ()

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[Any] = (),
        *,
        prompt: bool = False,
        mark: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of `messages`; with `prompt` up to where the assistant begins to write. `variables`: more for the
        template, such as `enable_thinking`.

        `mark` puts OPEN and CLOSE around the parts that the template marks as the assistant's. Raises UsageError with
        what the template says of messages that it does not take.
        """
        context: dict[str, Any] = dict(self.tokens) | dict(variables or {})
        context |= {"add_generation_prompt": prompt, "mark_answers_": mark}
        try:
            from headstart.data.template_limits import reset

            reset()
            template = _compiled(self.source)
            text: str = template.render(messages=list(messages), tools=list(tools) or None, documents=None, **context)
        except Exception as error:  # a program from elsewhere raises what it likes
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(f"the chat template does not take these messages ({why}); mend them, or it") from error
        return text

    def turn_ends(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Return the special token that the template puts behind an answer: none where that is plain text, or where
        the template does not take one question and one answer."""
        said = [{"role": "user", "content": "x"}, {"role": ASSISTANT, "content": "y"}]
        try:
            before, behind = self.render(said[:1], prompt=True), self.render(said)
        except UsageError:
            return frozenset()
        if not behind.startswith(before):
            return frozenset()
        end = tokenizer.encode(behind[len(before) :].strip().removeprefix("y").strip())
        special: frozenset[int] = getattr(tokenizer, "skipped", frozenset())
        return frozenset(token for token in end[:1] if token in special)

    def answers(self, conversation: Conversation, each: bool = False) -> list[tuple[str, list[Span]]]:
        """The text of a conversation, and which characters of it the assistant wrote, its ends of turns among them.

        With `each` one text for each answer, which ends behind it and of which it alone counts.

        A template that marks them (`{% generation %}`) says so itself. Of others, an answer is what the text up to it
        has more than the prompt before it. Raises UsageError where that cannot be told, for the template writes the
        beginning of a conversation otherwise once more follows.
        """
        messages, tools = conversation.messages, conversation.tools
        whole = self.render(messages, tools)
        if OPEN in whole or CLOSE in whole:
            raise UsageError("a message holds U+FDD0 or U+FDD1, which are no characters; take them out")
        numbers = [number for number, message in enumerate(messages) if is_target(message)]
        if _MARKED.search(self.source):
            if not each:
                spans = _unmarked(self.render(messages, tools, mark=True), whole)
                return [(whole, self._of_targets(conversation, spans))]
            texts = [(self.render(messages[: i + 1], tools), messages[: i + 1]) for i in numbers]
            return [(text, _unmarked(self.render(said, tools, mark=True), text)[-1:]) for text, said in texts]
        found = []
        for number in numbers:
            before = self.render(messages[:number], tools, prompt=True)
            behind = self.render(messages[: number + 1], tools)
            if not (behind.startswith(before) and (each or whole.startswith(behind))):
                raise UsageError(
                    f"the chat template writes what is before message {number + 1} or in it otherwise once more "
                    "follows, so answers cannot be told from the rest; mark them in it with {% generation %}, or take "
                    "each answer as a document (--each-answer)"
                )
            length = _answer_length(behind[len(before) :], messages[number]["content"])
            found.append((behind, [(len(before), len(before) + length)]))
        return found if each else [(whole, [span for _, spans in found for span in spans])]

    def _of_targets(self, conversation: Conversation, spans: list[Span]) -> list[Span]:
        """Return those of the marked spans that messages to be predicted wrote."""
        messages = conversation.messages
        if all(is_target(message) for message in messages if message["role"] == ASSISTANT):
            return spans
        opened = [
            self.render(messages[:count], conversation.tools, mark=True).count(OPEN)
            for count in range(len(messages) + 1)
        ]
        if opened[-1] != len(spans) or opened != sorted(opened):
            raise UsageError(
                "the chat template marks other answers once more follows, so none can be left out; mend it"
            )
        return [
            span
            for number, message in enumerate(messages)
            if is_target(message)
            for span in spans[opened[number] : opened[number + 1]]
        ]


def load_chat_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template beside the tokenizer's files; None where there is none."""
    directory: Path | None = getattr(tokenizer, "directory", None)
    if directory is None:
        return None
    file = directory / CONFIG_FILE
    source = read_json(file).get("chat_template") if file.is_file() else None
    if (directory / TEMPLATE_FILE).exists():
        file = directory / TEMPLATE_FILE
        try:
            source = read_bounded(file, MAX_BYTES).decode("utf-8")
        except OSError as error:
            raise UsageError(f"{file}: cannot be read ({error.strerror}); allow reading it") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"{file}: not UTF-8; fetch the file again") from error
    elif isinstance(source, list):  # several, by name
        if not all(isinstance(each, dict) and {"name", "template"} <= each.keys() for each in source):
            raise UsageError(f"{file}: chat_template must be a text or a list of name and template; fetch it again")
        source = next((each["template"] for each in source if each["name"] == "default"), None)
    if source is None:
        return None
    if not isinstance(source, str) or len(source) > MAX_BYTES:
        raise UsageError(f"{file}: the chat template must be a text of at most {MAX_BYTES:,} bytes; fetch it again")
    return ChatTemplate(source, tuple(special_tokens(directory).items()))


def need_chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """As `load_chat_template`. Raises UsageError where there is none."""
    template = load_chat_template(tokenizer)
    if template is None:
        # Bytes have no files of their own, where a template would be read.
        has_files = getattr(tokenizer, "directory", None) is not None
        beside = f", or put a {TEMPLATE_FILE} beside its tokenizer.json" if has_files else ""
        raise UsageError(
            f"tokenizer {tokenizer.name}: has no chat template, which conversations need; take the tokenizer of a chat "
            f"model{beside}"
        )
    return template


def encode_conversation(
    conversation: Conversation, template: ChatTemplate, tokenizer: Tokenizer, each: bool = False
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids (N,) int64 of a conversation, the end token last, and (N,) bool: which of them the assistant wrote; of
    each of its texts, see `ChatTemplate.answers`.

    A token counts as the assistant's if any character of it is. The end token does where the text ends with an answer
    and no special token ends that turn already. Raises UsageError as `ChatTemplate.answers` does.
    """
    return [_tokens(text, spans, tokenizer) for text, spans in template.answers(conversation, each)]


def _tokens(text: str, spans: list[Span], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    ids, offsets = tokenizer.encode_with_offsets(text)  # type: ignore[attr-defined]  # templates come with such alone
    begins, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    answered = np.zeros(len(ids), dtype=bool)
    for begin, end in spans:
        answered |= (begins < end) & (ends > begin)
    if not ids or ids[-1] != tokenizer.end_id:
        special: frozenset[int] = getattr(tokenizer, "skipped", frozenset())
        answered = np.append(answered, len(answered) > 0 and answered[-1] and ids[-1] not in special)
        ids = [*ids, tokenizer.end_id]
    return np.array(ids, dtype=np.int64), answered


def _unmarked(marked: str, whole: str) -> list[Span]:
    spans, begin, length = [], 0, 0
    for piece in re.split(f"([{OPEN}{CLOSE}])", marked):
        if piece == OPEN:
            begin = length
        elif piece == CLOSE:
            spans.append((begin, length))
        else:
            length += len(piece)
    if re.sub(f"[{OPEN}{CLOSE}]", "", marked) != whole:
        raise UsageError("the chat template works on what it marks as generated; let it only write there")
    return spans


def _answer_length(part: str, content: str) -> int:
    """How much of what an answer adds to the text the assistant writes: not the space behind its end of turn."""
    trimmed, said = part.rstrip(), content.rstrip()
    return len(part) if said and trimmed.endswith(said) else len(trimmed)


@lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    """The `jinja2.Template` of a source."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension

    from headstart.data.template_limits import BoundedEnvironment, bounded_filter

    class Generation(Extension):
        """The {% generation %} ... {% endgeneration %} block of transformers."""

        tags = {"generation"}  # noqa: RUF012  # Jinja's own declaration

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_mark", [nodes.ContextReference()])
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _mark(self, context: Any, caller: Any) -> str:
            text: str = caller()
            return f"{OPEN}{text}{CLOSE}" if context.get("mark_answers_") else text

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        # Jinja's own escapes what HTML would take for markup.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = bounded_filter("tojson", tojson)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = NOW.strftime
    return environment.from_string(source)
