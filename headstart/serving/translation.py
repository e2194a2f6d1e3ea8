"""Translate the body of a request into what the engine takes: text, a constraint, settings and a number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from headstart.data.chat_template import ChatTemplate
from headstart.decoding.constraints import Constraint
from headstart.decoding.settings import GenerationSettings, Penalties
from headstart.errors import UsageError
from headstart.serving.errors import ApiError
from headstart.serving.schemas import ChatRequest, CompletionRequest, Conversation, GenerationBody

COMPLETION_TOKENS = 16
"""Tokens of a completion without `max_tokens`, as in OpenAI's API; a chat then continues to the end of the context."""


WriteTools = Callable[[Sequence[dict[str, Any]], Sequence[dict[str, Any]]], list[dict[str, Any]]]


def render_chat(body: Conversation, template: ChatTemplate, write: WriteTools | None = None) -> str:
    """Return the text of the messages of a chat.

    `write` puts tools and calls into the content of messages, for templates that show no tools.

    Raises ApiError if the template leaves out calls of functions, and UsageError if it refuses the messages.
    """
    variables = body.chat_template_kwargs
    tools = [tool.model_dump(exclude_unset=True) for tool in body.tools or ()] if body.tool_choice != "none" else []
    prompt = not body.continue_final_message and body.add_generation_prompt is not False

    def render(calls: bool) -> str:
        messages = [message.for_template(calls) for message in body.messages]
        if write is not None:
            return template.render(write(messages, tools), prompt=prompt, variables=variables)
        return template.render(messages, tools, prompt=prompt, variables=variables)

    text = render(calls=True)
    calling = next((number for number, message in enumerate(body.messages) if message.tool_calls), None)
    if calling is not None:
        try:
            without_calls = render(calls=False)
        except UsageError:  # the template requires the calls
            without_calls = None
        if without_calls == text:
            field = f"messages[{calling}].tool_calls"
            why = "this model's chat template does not show calls of functions; leave them out, or write them as text"
            raise ApiError(400, f"{field}: {why}", param=field)
    return _cut_after(text, body.messages[-1].text) if body.continue_final_message else text


def _cut_after(text: str, last: str) -> str:
    """Return the text up to the end of the last message, as transformers does for `continue_final_message`."""
    at = text.rfind(last.strip())
    if at < 0:
        why = "the chat template changes the last message, so it cannot be continued"
        raise ApiError(400, f"continue_final_message: {why}", param="continue_final_message")
    message = last.lstrip() if text.startswith(last.lstrip(), at) else last.strip()
    return text[: at + len(message)]


def constraint_of(body: GenerationBody) -> Constraint | None:
    """Return the constraint of a request."""
    return next((make(argument) for _, make, argument in body.constraints), None)


def truncate(body: GenerationBody, prompt: list[int], context: int) -> list[int]:
    """Return the last tokens of a prompt that a request keeps."""
    most = body.truncate_prompt_tokens
    if most is None:
        return prompt
    return prompt[-(max(1, context - max(1, body.requested_tokens or 1)) if most < 0 else most) :]


def generation_settings(
    body: GenerationBody,
    all_heads: int,
    default_heads: int | None,
    shown: frozenset[int],
    constraint: Constraint | None,
) -> GenerationSettings:
    """Return the settings of a request, without its number of tokens and the seeds of its choices.

    `default_heads` decode if the request leaves it to the server's policy; `shown` are special tokens in the text.
    """
    echoed = body.logprobs if isinstance(body, CompletionRequest) and body.echo else None
    of_prompt = [count for count in (body.prompt_logprobs, echoed) if count is not None]
    chosen = body.outputs > (body.n or 1)  # by log-probability
    speculative = body.speculation
    heads = speculative.heads or (all_heads if speculative.policy == "fixed" else default_heads)
    return GenerationSettings(
        temperature=_or(body.temperature, 1.0),
        top_k=max(0, _or(body.top_k, 0)),
        top_p=_or(body.top_p, 1.0),
        min_p=_or(body.min_p, 0.0),
        heads=heads if speculative.enabled else 1,
        acceptance=speculative.acceptance or "match",
        penalties=Penalties(
            _or(body.repetition_penalty, 1.0),
            _or(body.presence_penalty, 0.0),
            _or(body.frequency_penalty, 0.0),
            tuple((int(token), value) for token, value in (body.logit_bias or {}).items()),
        ),
        constraint=constraint,
        logprobs=0 if chosen and body.alternatives is None else body.alternatives,
        prompt_logprobs=max(of_prompt, default=None),
        stop=body.stop,
        stop_tokens=frozenset(body.stop_token_ids or ()),
        ignore_ends=bool(body.ignore_eos),
        keep_stop=bool(body.include_stop_str_in_output),
        min_new_tokens=body.min_tokens or 0,
        shown=shown,
    )


def output_tokens(body: GenerationBody, prompt_tokens: int, context: int, limit: int | None) -> int:
    """Return the most tokens to generate after a prompt of so many tokens.

    Raises ApiError if the context cannot hold them, or if they are more than the server's `limit`.
    """
    room, requested = context - prompt_tokens, body.requested_tokens
    if room < 1:
        message = f"the prompt has {prompt_tokens} tokens; the context is {context}, which must also hold the answer"
        raise ApiError(400, f"{message}: shorten it", param="prompt", code="context_length_exceeded")
    if requested is None:
        return min(room if isinstance(body, ChatRequest) else COMPLETION_TOKENS, room, room if limit is None else limit)
    requested = max(1, requested)  # with 0 the engine generates a token that the answer leaves out
    if limit is not None and requested > limit:
        raise ApiError(400, f"max_tokens is {requested}; this server allows at most {limit}", param="max_tokens")
    if requested > room:
        message = f"max_tokens is {requested}, the prompt has {prompt_tokens}; together they exceed the context"
        detail = f"{message} of {context}: ask for less"
        raise ApiError(400, detail, param="max_tokens", code="context_length_exceeded")
    return requested


def _or(value: Any, default: Any) -> Any:
    """Return the default for a field that is null."""
    return default if value is None else value
