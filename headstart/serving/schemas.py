"""Define the bodies of requests: OpenAI's completions and chat completions, with bounds and Headstart's own fields.

Fields that cannot change the answer are ignored. Every other field is supported or refused by name (`fields.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from headstart.decoding.constraints import Constraint
from headstart.decoding.settings import RULES
from headstart.serving import fields
from headstart.serving.fields import refusal

MAX_CHOICES = 128
MAX_BIASES = 1024
MAX_OPTIONS = 4096
MAX_STOP = 1024
MAX_FIELDS = 64
MAX_MESSAGES, MAX_TEXT_PARTS, MAX_CALLS, MAX_TOOLS = 8192, 4096, 128, 128
Token = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Strings = Annotated[list[str], Field(min_length=1, fail_fast=True)]
NonEmpty = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]
Choices = Annotated[list[NonEmpty], Field(min_length=1, max_length=MAX_OPTIONS, fail_fast=True)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
ANY_OBJECT = {"type": "object"}
"""JSON schema of any object."""
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "mark_answers_")
"""Variables of a chat template that requests set with other fields, or not at all."""


class Strict(BaseModel):
    """Accept numbers as numbers only, not as strings."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Closed(Strict):
    """Refuse every field that is not declared."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_many(cls, part: Any) -> Any:
        """Refuse a part with many fields by its first unknown one; pydantic would report each."""
        if isinstance(part, dict) and len(part) > MAX_FIELDS:
            return fields.select_fields(part, {field.alias or name for name, field in cls.model_fields.items()}, {})
        return part


class Open(Strict):
    """Ignore fields that cannot change the answer, and refuse other fields that are not declared."""

    neutral: ClassVar[fields.NeutralFields] = fields.NEUTRAL
    ignored: ClassVar[frozenset[str]] = fields.IGNORED

    @model_validator(mode="before")
    @classmethod
    def _select(cls, body: Any) -> Any:
        return fields.select_fields(body, cls.model_fields, cls.neutral, cls.ignored)


class Speculative(Closed):
    """Control speculative decoding. Only a lossy `acceptance` changes the output."""

    enabled: bool = Field(default=True, description="False: plain decoding, one token per pass.")
    heads: int | None = Field(
        default=None, ge=1, description="Number of heads that decode in every pass, head 1 included."
    )
    policy: Literal["auto", "fixed"] = Field(
        default="auto", description="Number of heads without `heads`: auto, as many as pay by measurement; fixed, all."
    )
    acceptance: str | None = Field(
        default=None,
        pattern=f"^({'|'.join(RULES)})(:[0-9.]+)*$",
        max_length=64,
        description="Rule that accepts drafts: match, rejection, block, or lossy-...",
    )
    origins: bool = Field(default=False, description="Name the head that drafted each token of the answer.")


class StreamOptions(Closed):
    """Control the chunks of a stream."""

    include_usage: bool | None = Field(default=False, description="Send a last chunk with the usage.")
    include_obfuscation: bool | None = Field(default=None, description="Ignored: chunks are not padded.")
    continuous_usage_stats: bool | None = Field(default=False, description="Send the usage so far with each chunk.")


class JsonSchema(Closed):
    """Hold a JSON schema and its name."""

    name: str = Field(default="", max_length=256)
    description: str | None = Field(default=None, description="Ignored.")
    strict: bool | None = Field(default=None, description="Ignored: the schema always holds.")
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(Closed):
    """Constrain the answer to JSON, as OpenAI's API does, or to a grammar."""

    type: Literal["text", "json_object", "json_schema", "grammar"]
    json_schema: JsonSchema | None = None
    grammar: NonEmpty | None = Field(default=None, description="Grammar in llguidance's Lark, or in GBNF.")

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise refusal("json_schema", "give the schema, as {'name': ..., 'schema': {...}}")
        if (self.grammar is None) == (self.type == "grammar"):
            raise refusal("grammar", "give the grammar with type 'grammar', and with no other type")
        return self

    @property
    def schema_to_follow(self) -> dict[str, Any] | None:
        """Return the JSON schema of the answer; None: any text."""
        if self.type == "json_schema" and self.json_schema is not None:
            return self.json_schema.schema_
        return ANY_OBJECT if self.type == "json_object" else None


def _parse_schema(schema: Any) -> Any:
    """Parse a schema that is given as JSON text."""
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError):
        raise ValueError("must be a JSON schema, as an object or as text") from None


Schema = Annotated[dict[str, Any], BeforeValidator(_parse_schema)]


class StructuredOutputs(Closed):
    """Constrain the answer, under the present name in vLLM of the fields `guided_...`."""

    json_: Schema | None = Field(default=None, alias="json")
    regex: NonEmpty | None = None
    choice: Choices | None = None
    grammar: NonEmpty | None = None
    json_object: bool | None = None
    disable_any_whitespace: Literal[False] | None = None
    disable_additional_properties: Literal[False] | None = None
    disable_fallback: bool | None = Field(default=None, description="Ignored: there is one implementation.")


class RequestBody(Open):
    """Hold the fields of both kinds of requests."""

    model: str | None = Field(default=None, max_length=512, description="Name of the model; optional.")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=0, lt=2**31, description="Most tokens to generate; 0 with echo.")
    n: int | None = Field(default=1, ge=1, le=MAX_CHOICES, description="Number of choices; the i-th has seed + i.")
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = Field(default=False, description="Include the stop string in the text.")
    stop_token_ids: Annotated[list[Token], Field(max_length=64, fail_fast=True)] | None = Field(
        default=None, description="Tokens that end the output and are part of it."
    )
    ignore_eos: bool | None = Field(default=False, description="Treat the end token like others.")
    min_tokens: int | None = Field(
        default=0, ge=0, lt=2**31, description="Tokens before which nothing ends the output."
    )
    skip_special_tokens: bool | None = Field(default=True, description="False: the text shows special tokens.")
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(
        default=None, description="Keep this many last tokens of the prompt; -1: as many as fit."
    )
    prompt_logprobs: int | None = Field(
        default=None, ge=0, le=20, description="Number of most probable tokens to report for each token of the prompt."
    )
    timings_per_token: bool | None = Field(default=False, description="Send the times so far with each chunk.")
    seed: int | None = Field(
        default=None, ge=-(2**63), lt=2**63, description="Seed of the sampling noise; random by default."
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
    guided_json: Schema | None = Field(default=None, description="JSON schema of the answer.")
    guided_regex: NonEmpty | None = Field(default=None, description="Regular expression that the whole answer matches.")
    guided_choice: Choices | None = Field(default=None, description="Strings of which the answer is one.")
    guided_grammar: NonEmpty | None = Field(default=None, description="Grammar in llguidance's dialect of Lark.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        default=None, description="Only requests with the same salt reuse each other's prompts."
    )
    speculative: Speculative | None = None

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _check_tokens(cls, bias: Any) -> Any:
        """Check the keys before pydantic checks each value and reports each error."""
        if isinstance(bias, dict):
            if len(bias) > MAX_BIASES:
                raise ValueError(f"has {len(bias)} tokens; give at most {MAX_BIASES}")
            for key in bias:
                if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10):
                    raise ValueError(f"{str(key)[:20]!r} is not a token id")
        return bias

    @model_validator(mode="after")
    def _check_constraints(self) -> RequestBody:
        if self.truncate_prompt_tokens == 0:
            raise refusal("truncate_prompt_tokens", "0 leaves no prompt; give at least 1, or -1")
        if self.prompt_logprobs is not None and self.stream:
            raise refusal("prompt_logprobs", "a stream does not hold them; leave out one of them")
        given = [name for name, _, _ in self.constraints]
        if len(given) > 1:
            raise refusal(given[1], f"an answer has one constraint, and {given[0]} is another; leave one out")
        for name in ("ignore_eos", "min_tokens"):
            if given and getattr(self, name):
                raise refusal(name, f"{given[0]} ends the answer when it is satisfied; leave one out")
        if self.requested_tokens is not None and (self.min_tokens or 0) > self.requested_tokens:
            raise refusal(
                "min_tokens", f"{self.min_tokens} is more than max_tokens, {self.requested_tokens}; ask for fewer"
            )
        return self

    @property
    def constraints(self) -> list[tuple[str, Callable[[Any], Constraint], Any]]:
        """Return the constraints that are set: their field, the function that makes one, and its argument."""
        structured, formatted = self.structured_outputs or StructuredOutputs(), self.response_format
        options: list[tuple[str, Callable[[Any], Constraint], Any]] = [
            ("response_format", Constraint.json_schema, None if formatted is None else formatted.schema_to_follow),
            ("response_format", Constraint.lark, None if formatted is None else formatted.grammar),
            ("guided_json", Constraint.json_schema, self.guided_json),
            ("guided_regex", Constraint.regex, self.guided_regex),
            ("guided_choice", Constraint.choice, self.guided_choice),
            ("guided_grammar", Constraint.lark, self.guided_grammar),
            ("structured_outputs", Constraint.json_schema, structured.json_),
            ("structured_outputs", Constraint.json_schema, ANY_OBJECT if structured.json_object else None),
            ("structured_outputs", Constraint.regex, structured.regex),
            ("structured_outputs", Constraint.choice, structured.choice),
            ("structured_outputs", Constraint.lark, structured.grammar),
        ]
        return [option for option in options if option[2] is not None]

    @property
    def speculation(self) -> Speculative:
        """Return the field `speculative`, or its defaults."""
        return self.speculative or Speculative()

    @property
    def requested_tokens(self) -> int | None:
        """Return the requested number of tokens; None: the server's default."""
        return self.max_tokens

    @property
    def outputs(self) -> int:
        """Return the number of outputs to generate for each prompt."""
        return self.n or 1


class CompletionRequest(RequestBody):
    """Continue a prompt (`/v1/completions`)."""

    neutral = {**fields.NEUTRAL, **fields.NEUTRAL_IN_COMPLETIONS}

    prompt: str | TokenIds | Strings | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    echo: bool | None = Field(default=False, description="Include the prompt in the text and in logprobs.")
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = Field(
        default=None,
        ge=1,
        le=MAX_CHOICES,
        description="Outputs per prompt: the n most probable per token are returned.",
    )
    suffix: str | None = None
    add_special_tokens: bool | None = Field(default=True, description="Put the start token before a prompt of text.")

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise refusal("best_of", f"{self.best_of} outputs do not hold the n best, {self.n}; ask for more")
        if self.outputs > (self.n or 1) and self.stream:
            raise refusal("best_of", "the best outputs are known at the end only; leave out stream, or best_of")
        if self.suffix:
            raise refusal("suffix", "text before a suffix is not supported; leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise refusal("max_tokens", "0 gives no text; give at least 1, or set echo")
        return self

    @property
    def outputs(self) -> int:
        """Return the number of outputs to generate for each prompt."""
        return self.best_of or self.n or 1

    @property
    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, each as text or token ids."""
        prompt = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)

    @property
    def alternatives(self) -> int | None:
        """Return the number of most probable tokens to report for each token; None: no log-probabilities."""
        return self.logprobs


class TextPart(Closed):
    """Hold one part of a message."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Any = Field(default=None, description="Ignored.")


class Function(Closed):
    """Name a function and its arguments."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Closed):
    """Record a call of a function in an earlier message."""

    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = Field(default=None, description="Ignored.")
    function: Function

    def for_template(self) -> dict[str, Any]:
        """Return the call as chat templates take it, with arguments as an object if they are JSON of one."""
        arguments = self.function.arguments
        if isinstance(arguments, str):
            with suppress(ValueError, RecursionError):
                parsed = json.loads(arguments)
                arguments = parsed if isinstance(parsed, dict) else arguments
        called = {"type": self.type, "function": {"name": self.function.name, "arguments": arguments}}
        return called if self.id is None else {"id": self.id, **called}


class Message(Open):
    """Hold one message of a chat."""

    neutral, ignored = fields.NEUTRAL_IN_MESSAGES, frozenset[str]()

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_TEXT_PARTS, fail_fast=True)] | None = None
    name: str | None = Field(default=None, max_length=256)
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_role(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise refusal("content", f"only an assistant's may be null; give the text of this {self.role} message")
        if self.role == "tool" and self.tool_call_id is None:
            raise refusal("tool_call_id", "name the call that this message is the result of")
        if self.tool_calls and self.role != "assistant":
            raise refusal("tool_calls", f"only an assistant calls functions, not a {self.role}; leave it out")
        return self

    @property
    def text(self) -> str:
        """Return the content as one string."""
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)

    def for_template(self, calls: bool) -> dict[str, Any]:
        """Return the message as chat templates take it, with or without `calls` of functions."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.text}
        for name in ("name", "tool_call_id"):
            if getattr(self, name) is not None:
                message[name] = getattr(self, name)
        if self.tool_calls and calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return message


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class FunctionDefinition(Closed):
    """Describe a function."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="JSON schema of the arguments; null: none.")
    strict: bool | None = Field(default=None, description="Ignored: the schema holds where a call is required.")

    @property
    def schema_(self) -> dict[str, Any]:
        """Return the JSON schema of the arguments, an object."""
        nothing = {"properties": {}, "additionalProperties": False}
        return {"type": "object", **(nothing if self.parameters is None else self.parameters)}


class Tool(Closed):
    """Describe a tool."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Closed):
    """Name a function."""

    name: str


class NamedTool(Closed):
    """Name the tool to call."""

    type: Literal["function"]
    function: NamedFunction


class Conversation(Open):
    """Hold the fields from which a chat template makes a text."""

    messages: Messages
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        default=None, description="Whether the answer calls functions: as the model likes, must, or one by name."
    )
    add_generation_prompt: bool | None = Field(default=None, description="False: no start of an answer.")
    continue_final_message: bool | None = Field(default=None, description="Continue the last message.")
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="Variables of the chat template.")

    @model_validator(mode="after")
    def _check_template(self) -> Conversation:
        names = [tool.function.name for tool in self.tools or ()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise refusal("tools", f"two functions have the name {twice!r}; give each its own")
        if self.must_call and not names:
            raise refusal("tool_choice", "there are no tools to call; give tools, or leave it out")
        if self.named_tool is not None and self.named_tool not in names:
            shown = ", ".join(names)[:200]
            raise refusal("tool_choice", f"there is no tool {self.named_tool[:64]!r}; tools has {shown}")
        taken = next((name for name in self.chat_template_kwargs or () if name in RESERVED), None)
        if taken is not None:
            raise refusal(f"chat_template_kwargs.{taken}", "other fields set this variable; leave it out")
        if self.continue_final_message and self.add_generation_prompt:
            raise refusal("continue_final_message", "it needs add_generation_prompt false, or left out")
        if self.continue_final_message:
            last = self.messages[-1]
            if last.role != "assistant" or not last.text.strip():
                raise refusal("continue_final_message", "the last message must be an assistant's, and not empty")
        return self

    @property
    def named_tool(self) -> str | None:
        """Return the name of the function that must be called."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def must_call(self) -> bool:
        """Return whether the answer must call a function."""
        return self.tool_choice == "required" or self.named_tool is not None

    @property
    def used_tools(self) -> list[Tool]:
        """Return the tools that the answer may call."""
        if self.tool_choice == "none":
            return []
        return [tool for tool in self.tools or () if self.named_tool in (None, tool.function.name)]


class ChatRequest(RequestBody, Conversation):
    """Answer a conversation (`/v1/chat/completions`)."""

    neutral = {**fields.NEUTRAL, **fields.NEUTRAL_IN_CHATS}

    parallel_tool_calls: bool | None = Field(default=True, description="False: a required call is the only one.")

    max_completion_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(self, name) == 0:
                raise refusal(name, "0 gives no text; give at least 1")
        if self.top_logprobs is not None and not self.logprobs:
            raise refusal("top_logprobs", "it needs logprobs, set to true")
        given = next((name for name, _, _ in self.constraints), None)
        formatted = self.response_format if given == "response_format" else None
        if self.used_tools and given is not None and (formatted is None or formatted.grammar is not None):
            raise refusal(given, "it does not allow calls of functions; leave out tools, or use a JSON schema")
        for name in ("ignore_eos", "min_tokens"):
            if self.must_call and getattr(self, name):
                raise refusal(name, "a required call ends the answer; leave one out")
        return self

    @property
    def requested_tokens(self) -> int | None:
        """Return the requested number of tokens, under its present name first."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """Return the number of most probable tokens to report for each token; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(Conversation):
    """Return the tokens of a text or of a conversation (`/tokenize`), as vLLM does."""

    stream: ClassVar[bool] = False

    model: str | None = Field(default=None, max_length=512)
    prompt: str | None = None
    messages: Messages | None = None  # type: ignore[assignment]
    add_special_tokens: bool | None = Field(default=True, description="Put the start token before a text.")
    return_token_strs: bool | None = Field(default=False, description="Return the text of each token too.")

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise refusal("prompt", "give either a prompt or messages")
        return self


class DetokenizeRequest(Open):
    """Return the text of tokens (`/detokenize`), as vLLM does."""

    stream: ClassVar[bool] = False

    model: str | None = Field(default=None, max_length=512)
    tokens: Annotated[list[Token], Field(fail_fast=True)]


GenerationBody = CompletionRequest | ChatRequest
"""The body of a request that generates text."""
