"""Read conversations with the chat template of a model, and find what it says of tools."""

from __future__ import annotations

from functools import partial
from typing import Any

from headstart.data.chat_template import need_chat_template
from headstart.data.tokenizers import Tokenizer
from headstart.decoding.constraints import Constraint, Matcher, compiled
from headstart.errors import UsageError
from headstart.serving.errors import ApiError
from headstart.serving.schemas import ChatRequest, Conversation
from headstart.serving.tools import MOST_CALLS, CallParser, Hermes, ToolFormat, choose_format, written_out
from headstart.serving.translation import render_chat

PROBE = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
"""A tool that shows whether a template writes tools."""


class Chats:
    """Read conversations with the chat template of a tokenizer. Raises UsageError for a tokenizer without one."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self.template = need_chat_template(tokenizer)
        self.turn_ends = self.template.turn_ends(tokenizer)
        special: frozenset[int] = getattr(tokenizer, "skipped", frozenset())
        self._special = {tokenizer.piece(token): token for token in special}
        said = [{"role": "user", "content": "x"}]
        try:
            self._shows_tools = self.template.render(said, [PROBE]) != self.template.render(said)
        except UsageError:
            self._shows_tools = False
        self.form: ToolFormat | None = choose_format(self.template.source) if self._shows_tools else Hermes()
        """Form of the model's calls; None if it is unknown."""
        marks = self.form.marks if self.form is not None else ()
        self.shown = frozenset(self._special[mark] for mark in marks if mark in self._special)
        """Special tokens that are part of calls."""

    def encode(self, body: Conversation) -> list[int]:
        """Return the token ids of a conversation. Raises UsageError and ApiError."""
        if body.used_tools and self.form is None:
            why = "this model's chat template has calls in a form that this server does not read; leave tools out"
            raise ApiError(400, f"tools: {why}", param="tools")
        write = None if self._shows_tools or not body.tools else written_out
        return self._tokenizer.encode(render_chat(body, self.template, write))

    def parser(self, body: ChatRequest) -> CallParser | None:
        """Return the parser of an answer; None for one without tools."""
        names = [tool.function.name for tool in body.used_tools]
        return CallParser(self.form, names) if names and self.form is not None else None

    def constraint(self, body: ChatRequest) -> Constraint | None:
        """Return the constraint of an answer that must call functions, or else be of a form."""
        schema = None if body.response_format is None else body.response_format.schema_to_follow
        if self.form is None or not (body.must_call or (body.used_tools and schema is not None)):
            return None
        functions = [(tool.function.name, tool.function.schema_) for tool in body.used_tools]
        most = 1 if body.parallel_tool_calls is False or body.named_tool else MOST_CALLS
        return self.form.constraint(functions, most, self._special.get, None if body.must_call else schema)

    def compiled(self, body: ChatRequest, constraint: Constraint) -> Matcher:
        """Return the compiled constraint of an answer. Raises ApiError that names the tool that is wrong."""
        compile_one = partial(compiled, tokenizer=self._tokenizer, vocab_size=self._vocab_size)
        try:
            return compile_one(constraint)
        except UsageError:
            for i, tool in enumerate(body.tools or ()):
                if tool in body.used_tools:
                    self._check(compile_one, f"tools[{i}].function.parameters", tool.function.schema_)
            raise

    @staticmethod
    def _check(compile_one: Any, field: str, schema: dict[str, Any]) -> None:
        try:
            compile_one(Constraint.json_schema(schema))
        except UsageError as error:
            raise ApiError(400, f"{field}: {error}", param=field) from error
