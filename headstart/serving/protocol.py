"""What clients may ask for: OpenAI's completions and chat completions, with bounds, and what Headstart adds.

Fields that nobody here knows are ignored, as other servers of this API do: clients send those of newer versions of it.
Known ones that would change the answer, and that are not had, are refused in a line.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from headstart.decoding.acceptance import DEFAULTS

MAX_CHOICES = 128
MAX_BIASES = 1024
Token = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
Text = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    """A number is a number, not the text of one."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Speculative(Strict):
    """How several tokens are decoded per pass. No setting changes the text, but a lossy `acceptance`."""

    model_config = ConfigDict(strict=True, extra="forbid")

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
        pattern=f"^({'|'.join(DEFAULTS)})(:[0-9.]+)*$",
        max_length=64,
        description="Which drafts are kept: match, rejection, block, or lossy-...",
    )
    origins: bool = Field(default=False, description="Tell of each token of the answer which head drafted it.")


class StreamOptions(Strict):
    include_usage: bool = Field(default=False, description="A last chunk tells what the answer cost.")


class JsonSchema(Strict):
    name: str = Field(default="", max_length=256)
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("json_schema: give the schema, as {'name': ..., 'schema': {...}}")
        return self


class Asked(Strict):
    """What both kinds of requests have."""

    model: str | None = Field(default=None, max_length=512, description="Name of the model; may be left out.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    n: int | None = Field(default=1, ge=1, le=MAX_CHOICES, description="How many texts; the i-th has seed + i.")
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
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
    guided_json: dict[str, Any] | None = Field(default=None, description="The answer is JSON of this schema.")
    guided_regex: Text | None = Field(default=None, description="The whole answer matches this regular expression.")
    guided_choice: Annotated[list[Text], Field(min_length=1, fail_fast=True)] | None = Field(
        default=None, description="The answer is one of these."
    )
    guided_grammar: Text | None = Field(default=None, description="A grammar in llguidance's dialect of Lark.")
    speculative: Speculative | None = None

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _names_tokens(cls, bias: Any) -> Any:
        """Before each value is looked at: a hundred thousand wrong ones would be told one by one."""
        if isinstance(bias, dict):
            if len(bias) > MAX_BIASES:
                raise ValueError(f"{len(bias)} tokens; name at most {MAX_BIASES}")
            for key in bias:
                if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10):
                    raise ValueError(f"{str(key)[:20]!r} is no token id")
        return bias

    @model_validator(mode="after")
    def _one_constraint(self) -> Asked:
        formatted = self.response_format is not None and self.response_format.type != "text"
        given = (self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        if formatted + sum(each is not None for each in given) > 1:
            raise ValueError("response_format and guided_json, _regex, _choice, _grammar: give one of them")
        return self


class CompletionRequest(Asked):
    """/v1/completions."""

    prompt: str | TokenIds | Texts | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    echo: bool | None = False
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    suffix: str | None = None

    @model_validator(mode="after")
    def _is_had(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of: texts are not chosen among; leave it out, or give it as n")
        if self.suffix:
            raise ValueError("suffix: these models write what follows only; leave it out")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo: log-probabilities are had of what is written, not of the prompt; take one of them")
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


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = Field(default=None, max_length=256)

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content} | ({} if self.name is None else {"name": self.name})


class ChatRequest(Asked):
    """/v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Any] | None = None
    functions: list[Any] | None = None

    @model_validator(mode="after")
    def _is_had(self) -> ChatRequest:
        if self.tools or self.functions:
            raise ValueError("tools: calls of functions are not had here; leave them out")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: set logprobs to true beside it")
        return self

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def finite(logprob: float) -> float:
    """JSON knows no infinity; others write this number too."""
    return logprob if math.isfinite(logprob) else -9999.0
