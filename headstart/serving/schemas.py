"""What clients may ask for: OpenAI's completions and chat completions, with bounds, and what Headstart adds.

Fields that cannot change the answer are ignored. Every other field is honoured or refused by name (`fields.py`).
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from headstart.decoding.settings import RULES
from headstart.serving.fields import (
    HARMLESS,
    NEUTRAL,
    NEUTRAL_IN_CHATS,
    NEUTRAL_IN_MESSAGES,
    known_fields,
    refused,
)

MAX_CHOICES = 128
MAX_BIASES = 1024
MAX_OPTIONS = 4096
MAX_STOP = 1024
MAX_FIELDS = 64
MAX_MESSAGES, MAX_TEXT_PARTS, MAX_CALLS = 8192, 4096, 128
Token = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]
Choices = Annotated[list[Text], Field(min_length=1, max_length=MAX_OPTIONS, fail_fast=True)]
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "mark_answers_")
"""Variables of a chat template that requests set by other fields, or not at all."""


class Strict(BaseModel):
    """A number is a number, not the text of one."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Closed(Strict):
    """A part of a request in which no other field may stand."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, part: Any) -> Any:
        """Refuse many unknown fields by the first one: pydantic would report each."""
        if isinstance(part, dict) and len(part) > MAX_FIELDS:
            return known_fields(part, {field.alias or name for name, field in cls.model_fields.items()}, {})
        return part


class Speculative(Closed):
    """How several tokens are decoded per pass. No setting changes the text, but a lossy `acceptance`."""

    enabled: bool = Field(default=True, description="False: plain decoding, one token per pass.")
    heads: int | None = Field(
        default=None, ge=1, description="How many heads decode, head 1 included; then always so many."
    )
    policy: Literal["auto", "fixed"] = Field(
        default="auto",
        description="Without `heads`: as many as are worth it by what was measured (auto), or all (fixed).",
    )
    acceptance: str | None = Field(
        default=None,
        pattern=f"^({'|'.join(RULES)})(:[0-9.]+)*$",
        max_length=64,
        description="Which drafts are kept: match, rejection, block, or lossy-...",
    )
    origins: bool = Field(default=False, description="Tell of each token of the answer which head drafted it.")


class StreamOptions(Closed):
    include_usage: bool | None = Field(default=False, description="A last chunk tells what the answer cost.")
    include_obfuscation: bool | None = Field(default=None, description="Ignored: chunks are not padded.")
    continuous_usage_stats: Literal[False] | None = None


class JsonSchema(Closed):
    name: str = Field(default="", max_length=256)
    description: str | None = Field(default=None, description="Ignored.")
    strict: bool | None = Field(default=None, description="Ignored: the schema always holds.")
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(Closed):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise refused("json_schema", "give the schema, as {'name': ..., 'schema': {...}}")
        return self


def _parsed_schema(schema: Any) -> Any:
    """Take a schema as JSON text too."""
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError):
        raise ValueError("must be a JSON schema, as an object or as text") from None


Schema = Annotated[dict[str, Any], BeforeValidator(_parsed_schema)]


class StructuredOutputs(Closed):
    """The present name in vLLM of the fields `guided_...`."""

    json_: Schema | None = Field(default=None, alias="json")
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: bool | None = None
    disable_any_whitespace: Literal[False] | None = None
    disable_additional_properties: Literal[False] | None = None
    disable_fallback: bool | None = Field(default=None, description="Ignored: there is one implementation.")


class Asked(Strict):
    """What both kinds of requests have."""

    model: str | None = Field(default=None, max_length=512, description="Name of the model; may be left out.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=0, lt=2**31, description="0: only with echo.")
    n: int | None = Field(default=1, ge=1, le=MAX_CHOICES, description="How many texts; the i-th has seed + i.")
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = Field(default=False, description="The stop string is part of the text.")
    stop_token_ids: Annotated[list[Token], Field(max_length=64, fail_fast=True)] | None = Field(
        default=None, description="Tokens that end the text and are part of it."
    )
    ignore_eos: bool | None = Field(default=False, description="The end token is a token like others.")
    seed: int | None = Field(
        default=None, ge=-(2**63), lt=2**63, description="Of the sampling noise; drawn where not given."
    )
    temperature: float | None = Field(default=1.0, ge=0, le=2)
    top_p: float | None = Field(default=1.0, gt=0, le=1)
    top_k: int | None = Field(default=0, ge=-1, lt=2**31, description="0 and -1: all tokens.")
    min_p: float | None = Field(default=0.0, ge=0, le=1)
    presence_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=1.0, ge=0.01, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = Field(default=None, description="The answer is JSON of this schema.")
    guided_regex: Text | None = Field(default=None, description="The whole answer matches this regular expression.")
    guided_choice: Choices | None = Field(default=None, description="The answer is one of these.")
    guided_grammar: Text | None = Field(default=None, description="A grammar in llguidance's dialect of Lark.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        default=None, description="Only requests with the same salt reuse each other's prompts."
    )
    speculative: Speculative | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, body: Any) -> Any:
        return known_fields(body, cls.model_fields, NEUTRAL, HARMLESS)

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _names_tokens(cls, bias: Any) -> Any:
        """Before each value is looked at: a hundred thousand wrong ones would be told one by one."""
        if isinstance(bias, dict):
            if len(bias) > MAX_BIASES:
                raise ValueError(f"has {len(bias)} tokens; name at most {MAX_BIASES}")
            for key in bias:
                if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10):
                    raise ValueError(f"{str(key)[:20]!r} is not a token id")
        return bias

    @model_validator(mode="after")
    def _one_constraint(self) -> Asked:
        structured, formatted = self.structured_outputs or StructuredOutputs(), self.response_format
        whole = {
            "response_format": None if formatted is None or formatted.type == "text" else formatted,
            "guided_json": self.guided_json,
            "guided_regex": self.guided_regex,
            "guided_choice": self.guided_choice,
            "guided_grammar": self.guided_grammar,
        }
        parts = (structured.json_, structured.json_object or None, structured.regex, structured.choice)
        given = [name for name, value in whole.items() if value is not None]
        given += ["structured_outputs" for part in (*parts, structured.grammar) if part is not None]
        if len(given) > 1:
            raise refused(given[1], f"an answer has one constraint, and {given[0]} is another; leave one out")
        if given and self.ignore_eos:
            raise refused("ignore_eos", f"{given[0]} ends the answer where it is satisfied; leave one out")
        # From here on there is one name for each.
        if structured.json_object:
            structured.json_ = {"type": "object"}
        self.guided_json = self.guided_json if structured.json_ is None else structured.json_
        self.guided_regex = structured.regex or self.guided_regex
        self.guided_choice = structured.choice or self.guided_choice
        self.guided_grammar = structured.grammar or self.guided_grammar
        return self


class CompletionRequest(Asked):
    """/v1/completions."""

    prompt: str | TokenIds | Texts | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    echo: bool | None = Field(default=False, description="The prompt is part of the text, and of logprobs.")
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    suffix: str | None = None
    add_special_tokens: bool | None = Field(default=True, description="The start token before a prompt of text.")

    @model_validator(mode="after")
    def _is_had(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise refused("best_of", "the best of several texts is not chosen; leave it out, or give it as n")
        if self.suffix:
            raise refused("suffix", "the models write what follows only; leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise refused("max_tokens", "0 gives no text; give at least 1, or set echo")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


class TextPart(Closed):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Any = Field(default=None, description="Ignored.")


class Function(Closed):
    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Closed):
    """A call of a function in an earlier message."""

    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = Field(default=None, description="Ignored.")
    function: Function

    def plain(self) -> dict[str, Any]:
        """Return the call as chat templates take it: arguments are an object, not its JSON, where they can be."""
        arguments = self.function.arguments
        if isinstance(arguments, str):
            with suppress(ValueError, RecursionError):
                parsed = json.loads(arguments)
                arguments = parsed if isinstance(parsed, dict) else arguments
        called = {"type": self.type, "function": {"name": self.function.name, "arguments": arguments}}
        return called if self.id is None else {"id": self.id, **called}


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_TEXT_PARTS, fail_fast=True)] | None = None
    name: str | None = Field(default=None, max_length=256)
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, message: Any) -> Any:
        return known_fields(message, cls.model_fields, NEUTRAL_IN_MESSAGES)

    @model_validator(mode="after")
    def _fits_its_role(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise refused("content", f"only an assistant's may be null; give the text of this {self.role} message")
        if self.tool_calls and self.role != "assistant":
            raise refused("tool_calls", f"only an assistant calls functions, not a {self.role}; leave it out")
        return self

    @property
    def text(self) -> str:
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)

    def plain(self, calls: bool = True) -> dict[str, Any]:
        """Return the message as chat templates take it, with `calls` of functions or without."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.text}
        for name in ("name", "tool_call_id"):
            if getattr(self, name) is not None:
                message[name] = getattr(self, name)
        if self.tool_calls and calls:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]
        return message


class ChatRequest(Asked):
    """/v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    add_generation_prompt: bool | None = Field(default=None, description="False: without the start of an answer.")
    continue_final_message: bool | None = Field(default=None, description="The answer continues the last message.")
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="Variables of the chat template.")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, body: Any) -> Any:
        return known_fields(body, cls.model_fields, {**NEUTRAL, **NEUTRAL_IN_CHATS}, HARMLESS)

    @model_validator(mode="after")
    def _is_had(self) -> ChatRequest:
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(self, name) == 0:
                raise refused(name, "0 gives no text; give at least 1")
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs", "it needs logprobs, set to true")
        taken = next((name for name in self.chat_template_kwargs or () if name in RESERVED), None)
        if taken is not None:
            raise refused(f"chat_template_kwargs.{taken}", "the template gets this from other fields; leave it out")
        if self.continue_final_message and self.add_generation_prompt:
            raise refused("continue_final_message", "it needs add_generation_prompt false, or left out")
        last = self.messages[-1]
        if self.continue_final_message and not (last.role == "assistant" and last.text.strip()):
            raise refused("continue_final_message", "the last message must be an assistant's, and not empty")
        return self

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def finite(logprob: float) -> float:
    """JSON knows no infinity; others write this number too."""
    return logprob if math.isfinite(logprob) else -9999.0
