"""OpenAI's `/v1/responses`, stateless: its requests as chats, and its answers, whole and as events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from headstart.serving import fields
from headstart.serving.answers import usage_of
from headstart.serving.bodies import validation_error
from headstart.serving.fields import refusal
from headstart.serving.jobs import Job, Piece
from headstart.serving.schemas import (
    MAX_MESSAGES,
    MAX_TEXT_PARTS,
    MAX_TOOLS,
    ChatRequest,
    Closed,
    FunctionName,
    Open,
    Speculative,
)
from headstart.serving.tools import CallParser, ToolFormat

STATELESS = "this server keeps no responses; send the whole conversation as input"
NEUTRAL: fields.NeutralFields = {
    "access_programs": ((), "programs are not supported"),
    "background": ((False,), "answers are not kept"),
    "background_options": ((), "answers are not kept"),
    "context_management": (([],), "conversations are not shortened"),
    "conversation": ((), STATELESS),
    "image": ((), "only text is supported"),
    "max_tool_calls": ((), "the server calls no tools itself"),
    "moderation": ((), "moderation is not supported"),
    "previous_response_id": ((), STATELESS),
    "prompt": ((), "prompts are not kept"),
    "reasoning": (({}, {"effort": "none"}, {"effort": None}), "reasoning is not supported"),
    "top_logprobs": ((0,), "log-probabilities come with /v1/chat/completions"),
    "truncation": (("disabled",), "prompts are not truncated"),
}
"""Fields of `/v1/responses` that would change the answer, as in `fields.NEUTRAL`."""
IGNORED = fields.IGNORED | {"include", "stream_options"}
NAMES = {"max_completion_tokens": "max_output_tokens", "response_format": "text.format", "messages": "input"}
"""Fields of chats, and the fields of responses that become them."""


class Part(Open):
    """Hold one part of a message."""

    neutral, ignored = {}, frozenset(("annotations", "logprobs", "prompt_cache_breakpoint"))

    type: Literal["input_text", "output_text", "text"]
    text: str


Text = str | Annotated[list[Part], Field(max_length=MAX_TEXT_PARTS, fail_fast=True)]


class Item(Open):
    """Hold one item of the input: a message, a call of a function, or the result of a call."""

    neutral, ignored = {}, frozenset(("id", "status", "phase", "namespace", "caller"))

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Text | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Text | None = None

    @model_validator(mode="after")
    def _check(self) -> Item:
        needed = {"message": ("role", "content"), "function_call": ("call_id", "name", "arguments")}
        for name in needed.get(self.type, ("call_id", "output")):
            if getattr(self, name) is None:
                raise refusal(name, f"a {self.type} needs it")
        return self

    def call(self) -> dict[str, Any]:
        """Return a call in the form of chats."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}

    def message(self) -> dict[str, Any]:
        """Return a message, or the result of a call, in the form of chats."""
        if self.type == "function_call_output":
            return {"role": "tool", "tool_call_id": self.call_id, "content": _text(self.output)}
        return {"role": self.role, "content": _text(self.content)}


def _text(content: Text | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


class FlatTool(Closed):
    """Describe a function."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="JSON schema of the arguments; null: none.")
    strict: bool | None = Field(default=None, description="Ignored: the schema holds where a call is required.")


class FlatChoice(Closed):
    """Name the function to call."""

    type: Literal["function"]
    name: str


class TextFormat(Closed):
    """Constrain the answer to JSON."""

    type: Literal["text", "json_object", "json_schema"]
    name: str = Field(default="", max_length=256)
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")

    def for_chat(self) -> dict[str, Any]:
        """Return the field `response_format` of chats."""
        given = {} if self.type != "json_schema" else {"json_schema": {"name": self.name, "schema": self.schema_}}
        return {"type": self.type, **given}


class TextOptions(Closed):
    """Control the text of the answer."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseRequest(Open):
    """Answer a conversation (`/v1/responses`)."""

    neutral, ignored = {**fields.NEUTRAL, **NEUTRAL}, IGNORED

    model: str | None = Field(default=None, max_length=512)
    input: str | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    instructions: str | None = Field(default=None, description="Message of the system before the input.")
    max_output_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stream: bool | None = False
    text: TextOptions | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    parallel_tool_calls: bool | None = True
    speculative: Speculative | None = None
    _chat: ChatRequest = PrivateAttr()

    @model_validator(mode="after")
    def _translate(self) -> ResponseRequest:
        body = self._for_chat()
        try:
            self._chat = ChatRequest.model_validate(body)
        except ValidationError as failed:
            error = validation_error(failed.errors(include_url=False, include_input=False), body)
            field, _, why = error.detail.partition(": ")
            raise refusal(NAMES.get(field, field), why) from None
        return self

    @property
    def chat(self) -> ChatRequest:
        """Return the request for a chat that has the same answer."""
        return self._chat

    def _for_chat(self) -> dict[str, Any]:
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            messages.append({"role": "user", "content": self.input})
        else:
            for item in self.input:
                if item.type != "function_call":
                    messages.append(item.message())
                    continue
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None})
                messages[-1].setdefault("tool_calls", []).append(item.call())
        shared = ("model", "temperature", "top_p", "seed", "stream", "parallel_tool_calls")
        body = {name: getattr(self, name) for name in shared} | {"messages": messages}
        body["max_completion_tokens"] = self.max_output_tokens
        if self.speculative is not None:
            body["speculative"] = self.speculative.model_dump()
        if self.text is not None and self.text.format is not None:
            body["response_format"] = self.text.format.for_chat()
        choice = self.tool_choice
        named = {"type": "function", "function": {"name": choice.name}} if isinstance(choice, FlatChoice) else choice
        functions = (tool.model_dump(exclude={"type"}, exclude_unset=True) for tool in self.tools or ())
        return body | {"tool_choice": named, "tools": [{"type": "function", "function": each} for each in functions]}


def _was_cut(job: Job) -> bool:
    return job.generation is not None and job.generation.finish_reason == "length"


class ResponseFormat:
    """Format the one output of a response: items of text and calls, each opened, extended by pieces and closed."""

    def __init__(
        self, body: ResponseRequest, model: str, seed: int, prompt_tokens: int, parser: CallParser | None, form: Any
    ) -> None:
        self._parser, self._prompt_tokens = parser, prompt_tokens
        self._new_id = ToolFormat.new_id if form is None else form.new_id
        self._sent = 0
        self._output: list[dict[str, Any]] = []
        self._open = False
        """True while the last item is open."""
        given = body.model_dump(by_alias=True, exclude_unset=True, exclude={"input", "stream", "text"})
        self._head: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()), "error": None,
            "instructions": None, "max_output_tokens": None, "metadata": {}, "parallel_tool_calls": True,
            "previous_response_id": None, "store": False, "temperature": 1.0, "tool_choice": "auto", "tools": [],
            "top_p": 1.0, "truncation": "disabled", **given, "model": model, "seed": seed,
            "text": {"format": {"type": "text"}} if body.text is None else body.text.model_dump(by_alias=True),
        }  # fmt: skip

    def whole(self, jobs: Sequence[Job], pieces: dict[Job, Piece]) -> dict[str, Any]:
        """Return the answer to a request that does not stream."""
        for _ in self._take(jobs[0], pieces[jobs[0]]):
            pass
        return self._response(jobs)

    def chunk(self, jobs: Sequence[Job], job: Job, piece: Piece) -> bytes:
        """Return the events of a piece."""
        begun = b""
        if not self._sent:
            response = {**self._head, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
            begun = b"".join(self._event(f"response.{name}", response=response) for name in ("created", "in_progress"))
        return begun + b"".join(self._event(name, **content) for name, content in self._take(job, piece))

    def end(self, jobs: Sequence[Job]) -> bytes:
        """Return the event that ends a stream."""
        response = self._response(jobs)
        return self._event(f"response.{response['status']}", response=response)

    def _event(self, kind: str, /, **content: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._sent, **content}
        self._sent += 1
        return f"event: {kind}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n".encode()

    def _response(self, jobs: Sequence[Job]) -> dict[str, Any]:
        cut = _was_cut(jobs[0])
        usage = usage_of(jobs, 1, self._prompt_tokens)
        return {
            **self._head,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._output,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": usage["completion_tokens_details"],
                "total_tokens": usage["total_tokens"],
                "speculative": usage["speculative"],
            },
        }

    def _take(self, job: Job, piece: Piece) -> Iterator[tuple[str, dict[str, Any]]]:
        """Add a piece to the output; yield the names and contents of the events that say so."""
        text, parts = (piece.text, []) if self._parser is None else self._parser.push(piece.text)
        if piece.finished and self._parser is not None:
            text += self._parser.finish()
        if text or (piece.finished and not parts and not self._output):  # an empty answer has a message too
            yield from self._say(text)
        for part in parts:
            if part.name is not None:
                yield from self._close()
                call = {"call_id": self._new_id(), "name": part.name, "arguments": ""}
                yield self._begin("fc", {"type": "function_call", **call})
            self._output[-1]["arguments"] += part.arguments
            if part.arguments:
                yield "response.function_call_arguments.delta", {**self._place, "delta": part.arguments}
        if piece.finished:
            yield from self._close("incomplete" if _was_cut(job) else "completed")

    def _say(self, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if not self._open or self._output[-1]["type"] != "message":
            yield from self._close()
            yield self._begin("msg", {"type": "message", "role": "assistant", "content": []})
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield "response.content_part.added", {**self._place, "content_index": 0, "part": dict(part)}
            self._output[-1]["content"].append(part)
        self._output[-1]["content"][0]["text"] += text
        yield "response.output_text.delta", {**self._place, "content_index": 0, "delta": text, "logprobs": []}

    @property
    def _place(self) -> dict[str, Any]:
        """Return the place of the last item, as events give it."""
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _begin(self, prefix: str, content: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Open an item."""
        item = {"id": f"{prefix}_{uuid.uuid4().hex}", "status": "in_progress", **content}
        self._output.append(item)
        self._open = True
        shown = {**item, "content": []} if "content" in item else dict(item)
        return "response.output_item.added", {"output_index": len(self._output) - 1, "item": shown}

    def _close(self, status: str = "completed") -> Iterator[tuple[str, dict[str, Any]]]:
        """Close the last item if it is open."""
        if not self._open:
            return
        self._open = False
        item = self._output[-1]
        item["status"] = status
        if item["type"] == "message":
            [part] = item["content"]
            of_part = {**self._place, "content_index": 0}
            yield "response.output_text.done", {**of_part, "text": part["text"], "logprobs": []}
            yield "response.content_part.done", {**of_part, "part": part}
        else:
            done = {**self._place, "name": item["name"], "arguments": item["arguments"]}
            yield "response.function_call_arguments.done", done
        yield "response.output_item.done", {"output_index": len(self._output) - 1, "item": item}
