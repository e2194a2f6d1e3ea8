"""Chat templates: write a conversation as the text that its model reads, and find the parts that the assistant wrote.

The template is the tokenizer's own (`PretrainedTokenizer.chat_template`). It is a program from a download, so it runs
in Jinja's sandbox, with the functions that transformers provides. Its clock stands still, because prepared data must
not depend on the day.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np

from headstart.data.conversations import ASSISTANT, Conversation, is_target
from headstart.data.tokenizer_source import TEMPLATE_FILE
from headstart.data.tokenizers import PretrainedTokenizer, Tokenizer
from headstart.errors import UsageError, first_line

NOW = datetime(2024, 7, 26)
"""The date that templates see. Llama's own template uses it by default."""
OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Marks around the parts that a template declares as the assistant's. Unicode reserves both; no text holds them."""
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]
"""Begin and end of a piece of text, in characters."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the special tokens that it may use, by name."""

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
        """Return the text of `messages`. Raises UsageError if the template refuses them, or exceeds its limits.

        Args:
            messages: of the conversation, in order.
            tools: descriptions of the tools that the assistant may call.
            prompt: end the text where the assistant begins to write.
            mark: put OPEN and CLOSE around the parts that the template marks as the assistant's.
            variables: further variables of the template, such as `enable_thinking`.
        """
        context: dict[str, Any] = dict(self.tokens) | dict(variables or {})
        context |= {"add_generation_prompt": prompt, "mark_answers_": mark}
        try:
            from headstart.data.template_limits import reset

            reset()
            template = _compiled(self.source)
            text: str = template.render(messages=list(messages), tools=list(tools) or None, documents=None, **context)
        except Exception as error:  # a program from elsewhere raises what it likes
            why = first_line(error)
            raise UsageError(
                f"the chat template does not take these messages ({why}); fix the messages or the template"
            ) from error
        return text

    def turn_ends(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Return the special token that the template writes after an answer.

        The set is empty if the template writes plain text there, or does not take one question and one answer.
        """
        said = [{"role": "user", "content": "x"}, {"role": ASSISTANT, "content": "y"}]
        try:
            before, behind = self.render(said[:1], prompt=True), self.render(said)
        except UsageError:
            return frozenset()
        if not behind.startswith(before):
            return frozenset()
        return _first_special(behind[len(before) :].strip().removeprefix("y"), tokenizer)

    def user_turn(self, tokenizer: Tokenizer) -> tuple[str, frozenset[int]]:
        """Return the text before the message of a user, and the special token after it.

        A model that continues this text writes a user's message (Magpie, arXiv 2406.08464). Raises UsageError if the
        template puts no text before a message, or no special token after it.
        """
        before, _, behind = self.render([{"role": "user", "content": OPEN}]).partition(OPEN)
        ends = _first_special(behind, tokenizer)
        if not before or not ends:
            what = "no text before" if not before else "no special token after"
            raise UsageError(
                f"the chat template writes {what} a user's message, so the model cannot write one; give --prompts"
            )
        return before, ends

    def answers(self, conversation: Conversation, each: bool = False) -> list[tuple[str, list[Span]]]:
        """Return the text of a conversation and the spans that the assistant wrote, with its ends of turns.

        With `each`, return one text per answer: it ends after the answer, and only the answer counts.

        A template can mark answers itself (`{% generation %}`). Otherwise an answer is the difference between the text
        that ends with it and the prompt before it. Raises UsageError if the template writes earlier turns differently
        when more follow, so that answers cannot be found.
        """
        messages, tools = conversation.messages, conversation.tools
        whole = self.render(messages, tools)
        if OPEN in whole or CLOSE in whole:
            raise UsageError("a message holds U+FDD0 or U+FDD1, which are no characters; remove them")
        numbers = [number for number, message in enumerate(messages) if is_target(message)]
        if _MARKED.search(self.source):
            if not each:
                spans = _unmarked(self.render(messages, tools, mark=True), whole)
                return [(whole, self._of_targets(conversation, spans))]
            parts = [(self.render(messages[: i + 1], tools), messages[: i + 1]) for i in numbers]
            return [(text, _unmarked(self.render(said, tools, mark=True), text)[-1:]) for text, said in parts]
        found = []
        for number in numbers:
            before = self.render(messages[:number], tools, prompt=True)
            behind = self.render(messages[: number + 1], tools)
            if not (behind.startswith(before) and (each or whole.startswith(behind))):
                raise UsageError(
                    f"the chat template writes message {number + 1}, or what is before it, differently when more "
                    "turns follow, so answers cannot be found; mark them in the template with {% generation %}, or "
                    "prepare each answer as a document (headstart prepare --each-answer)"
                )
            length = _answer_length(behind[len(before) :], messages[number]["content"])
            found.append((behind, [(len(before), len(before) + length)]))
        return found if each else [(whole, [span for _, spans in found for span in spans])]

    def _of_targets(self, conversation: Conversation, spans: list[Span]) -> list[Span]:
        """Return the marked spans that belong to messages to be predicted."""
        messages = conversation.messages
        if all(is_target(message) for message in messages if message["role"] == ASSISTANT):
            return spans
        opened = [
            self.render(messages[:count], conversation.tools, mark=True).count(OPEN)
            for count in range(len(messages) + 1)
        ]
        if opened[-1] != len(spans) or opened != sorted(opened):
            raise UsageError(
                "the chat template marks earlier answers differently when more turns follow, so no answer can be left "
                "out; fix the template"
            )
        return [
            span
            for number, message in enumerate(messages)
            if is_target(message)
            for span in spans[opened[number] : opened[number + 1]]
        ]


def _first_special(text: str, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the first token of a text if it is special; otherwise the empty set."""
    special: frozenset[int] = getattr(tokenizer, "skipped", frozenset())
    return frozenset(token for token in tokenizer.encode(text.strip())[:1] if token in special)


def load_chat_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """Return the template stored with the tokenizer; None without one."""
    if not isinstance(tokenizer, PretrainedTokenizer):
        return None
    source = tokenizer.chat_template()
    return None if source is None else ChatTemplate(source, tuple(tokenizer.special_tokens().items()))


def need_chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """Return the template stored with the tokenizer's files. Raise UsageError without one."""
    template = load_chat_template(tokenizer)
    if template is None:
        # The byte tokenizer has no files, so no template can be put next to them.
        has_files = getattr(tokenizer, "directory", None) is not None
        other = f", or put a {TEMPLATE_FILE} next to its tokenizer.json" if has_files else ""
        raise UsageError(
            f"tokenizer {tokenizer.name}: has no chat template, which conversations need; take the tokenizer of a chat "
            f"model{other}"
        )
    return template


def encode_conversation(
    conversation: Conversation, template: ChatTemplate, tokenizer: Tokenizer, each: bool = False
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Encode each text of a conversation (one, or with `each` one per answer, see `ChatTemplate.answers`).

    A token is the assistant's if any of its characters is. The end token is if the text ends with an answer and no
    special token ends that turn already. Return for each text the token ids, (N,) int64 with the end token last, and
    (N,) bool: which the assistant wrote.

    Raises UsageError if answers cannot be found, or the template refuses the messages.
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
        raise UsageError("the chat template changes what it marks as generated; let it only write there")
    return spans


def _answer_length(part: str, content: str) -> int:
    """Return how many characters of `part` the assistant wrote: all but white space after its end of turn."""
    trimmed, said = part.rstrip(), content.rstrip()
    return len(part) if said and trimmed.endswith(said) else len(trimmed)


@lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    """Return the `jinja2.Template` of a source."""
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
