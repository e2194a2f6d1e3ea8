"""Requests into jobs, jobs into answers: between the routes and the engine's thread."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from headstart.api import LanguageModel
from headstart.data.chat_template import ChatTemplate, need_chat_template
from headstart.data.tokenizers import prompt_ids
from headstart.decoding.acceptance import Rule
from headstart.decoding.constraints import Constraint, compiled
from headstart.decoding.generation import Request
from headstart.decoding.penalties import Penalties
from headstart.decoding.sampling import Sampling
from headstart.errors import UsageError
from headstart.serving.answers import Shape
from headstart.serving.conversation import rendered
from headstart.serving.errors import ApiError
from headstart.serving.jobs import Inbox, Job, Piece
from headstart.serving.protocol import Asked, ChatRequest, CompletionRequest, Speculative
from headstart.serving.settings import ServeSettings
from headstart.serving.stream import DONE, event
from headstart.serving.worker import Worker

COMPLETION_TOKENS = 16
"""Where a completion names no max_tokens, as OpenAI has it; a chat then goes on to the end of the context."""

SHORT = 2000
"""Characters or tokens of prompts that are tokenized on the event loop."""


class Service:
    """Answers requests with one model."""

    def __init__(self, model: LanguageModel, worker: Worker, name: str, settings: ServeSettings) -> None:
        self.model, self.worker, self.name, self.settings = model, worker, name, settings
        self.tokenizer = model._tokenizer
        self.context = settings.context or model.config.context
        self.draining = False
        """No new requests are taken."""
        self._template: ChatTemplate | None = None
        self._turn_ends: frozenset[int] = frozenset()

    async def prepare(self, asked: CompletionRequest | ChatRequest, client: str) -> Answer:
        """Raises ApiError for what the model or the server's limits do not allow."""
        if asked.model is not None and asked.model != self.name:
            message = f"there is no model {asked.model[:80]!r}; this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        try:
            if _is_short(asked):
                prompts, constraint = self._read(asked)
            else:  # rendering, tokenizing and compiling take as long as the request makes them
                prompts, constraint = await asyncio.to_thread(self._read, asked)
            return self._answer(asked, client, prompts, constraint)
        except UsageError as error:
            raise ApiError(400, str(error)) from error

    def _read(self, asked: CompletionRequest | ChatRequest) -> tuple[list[list[int]], Constraint | None]:
        """Token ids of the prompts, and the constraint, compiled."""
        constraint = _constraint(asked)
        if constraint is not None:
            compiled(constraint, self.tokenizer, self.model.config.vocab_size)
        if isinstance(asked, CompletionRequest):
            texts = asked.prompts
            encode = self._encode_bare if asked.add_special_tokens is False else self._encode
            return [encode(text) if isinstance(text, str) else text for text in texts], constraint
        if self._template is None:
            template = need_chat_template(self.model.tokenizer)
            self._turn_ends = template.turn_ends(self.model.tokenizer)
            self._template = template  # last: other threads look at it alone
        return [self.model.tokenizer.encode(rendered(asked, self._template))], constraint

    def _encode(self, text: str) -> list[int]:
        return prompt_ids(self.model.tokenizer, text)

    def _encode_bare(self, text: str) -> list[int]:
        return self.model.tokenizer.encode(text)

    def _answer(
        self,
        asked: CompletionRequest | ChatRequest,
        client: str,
        prompts: list[list[int]],
        constraint: Constraint | None,
    ) -> Answer:
        chat = isinstance(asked, ChatRequest)
        n = asked.n or 1
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        wanted = asked.max_tokens
        if isinstance(asked, ChatRequest) and asked.max_completion_tokens is not None:
            wanted = asked.max_completion_tokens
        speculative = asked.speculative or Speculative()
        rule = Rule.parse(speculative.acceptance or "match")
        bias = tuple((int(token), value) for token, value in (asked.logit_bias or {}).items())
        penalties = Penalties(
            _or(asked.repetition_penalty, 1.0),
            _or(asked.presence_penalty, 0.0),
            _or(asked.frequency_penalty, 0.0),
            bias,
        )
        inbox = Inbox()
        jobs: list[Job] = []
        for prompt in prompts:
            tokens = self._max_tokens(len(prompt), 1 if wanted == 0 else wanted, chat)
            for i in range(n):
                sampling = Sampling(
                    _or(asked.temperature, 1.0),
                    max(0, _or(asked.top_k, 0)),
                    _or(asked.top_p, 1.0),
                    _or(asked.min_p, 0.0),
                    seed + i,
                )
                request = Request(
                    prompt=tuple(prompt),
                    max_new_tokens=tokens,
                    sampling=sampling,
                    heads=self._heads(asked),
                    acceptance=rule,
                    penalties=penalties,
                    constraint=constraint,
                    logprobs=asked.alternatives,
                    prompt_logprobs=asked.logprobs if isinstance(asked, CompletionRequest) and asked.echo else None,
                    stop=_stops(asked.stop),
                    ends=self._turn_ends if chat else frozenset(),
                )
                streams, origins = bool(asked.stream), speculative.origins
                jobs.append(Job(request, client, len(jobs), inbox, streams=streams, origins=origins))
        echo: list[str] = []
        if isinstance(asked, CompletionRequest) and asked.echo:
            texts = [p if isinstance(p, str) else self.model.tokenizer.decode(p) for p in asked.prompts]
            echo = [text for text in texts for _ in range(n)]
        shape = Shape(
            chat=chat,
            model=self.name,
            seed=seed,
            tokenizer=self.tokenizer,
            logprobs=asked.alternatives is not None,
            origins=speculative.origins,
            echo=echo,
            silent=wanted == 0,
        )
        include = bool(asked.stream_options and asked.stream_options.include_usage)
        prompt_tokens = sum(map(len, prompts))
        return Answer(self.worker, jobs, inbox, shape, prompt_tokens, self.settings.request_timeout, include)

    def _heads(self, asked: Asked) -> int | None:
        speculative = asked.speculative or Speculative()
        if not speculative.enabled:
            return 1
        if speculative.heads is not None:
            return speculative.heads
        return self.model.config.heads if speculative.policy == "fixed" else self.settings.heads

    def _max_tokens(self, prompt: int, wanted: int | None, chat: bool) -> int:
        """Of a prompt of so many tokens. Raises ApiError where it is too long for what is wanted."""
        most, room = self.settings.max_tokens, self.context - prompt
        if room < 1:
            message = f"the prompt has {prompt} tokens; the context is {self.context}, which must also hold the answer"
            raise ApiError(400, f"{message}: shorten it", param="prompt", code="context_length_exceeded")
        if wanted is None:
            return min(room if chat else COMPLETION_TOKENS, room, room if most is None else most)
        if most is not None and wanted > most:
            raise ApiError(400, f"max_tokens is {wanted}; this server writes at most {most}", param="max_tokens")
        if wanted > room:
            message = f"max_tokens is {wanted}, the prompt has {prompt}; the context is {self.context} together"
            raise ApiError(400, f"{message}: ask for less", param="max_tokens", code="context_length_exceeded")
        return wanted


class Answer:
    """Jobs on their way to one client."""

    def __init__(
        self,
        worker: Worker,
        jobs: Sequence[Job],
        inbox: Inbox,
        shape: Shape,
        prompt_tokens: int,
        seconds: float,
        include_usage: bool,
    ) -> None:
        self._worker, self._jobs, self._inbox, self._shape = worker, jobs, inbox, shape
        self._prompt_tokens, self._include_usage = prompt_tokens, include_usage
        self._seconds = seconds

    async def whole(self) -> dict[str, Any]:
        """All of it."""
        done: dict[Job, Piece] = {}
        async with aclosing(self._pieces()) as arriving:
            async for pieces in arriving:
                done |= pieces
        return self._shape.whole(self._jobs, done, self._prompt_tokens)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """As it is written."""
        async with aclosing(self._pieces()) as arriving:
            async for pieces in arriving:
                yield b"".join(event(self._shape.chunk(job, piece)) for job, piece in pieces.items())
        if self._include_usage:
            yield event(self._shape.usage_chunk(self._jobs, self._prompt_tokens))
        yield DONE

    async def _pieces(self) -> AsyncGenerator[dict[Job, Piece], None]:
        """Until all jobs are done; whatever ends this ends them."""
        message = f"not done within the {self._seconds:g} s that this server gives a request"
        late = ApiError(504, message, code="timeout")
        alarm = self._inbox.loop.call_later(self._seconds, self._inbox.fail, late)
        left = set(self._jobs)
        try:
            self._worker.submit(self._jobs)
            while left:
                pieces = await self._inbox.take()
                left -= {job for job, piece in pieces.items() if piece.finished}
                yield pieces
        finally:
            alarm.cancel()
            if left:
                self._worker.cancel(list(left), "deadline" if self._inbox.error is late else "cancelled")


def _is_short(asked: Asked) -> bool:
    """Whether it is read sooner than a thread is asked to."""
    if not isinstance(asked, CompletionRequest) or _constraint(asked) is not None:
        return False
    return sum(map(len, asked.prompts)) <= SHORT


def _constraint(asked: Asked) -> Constraint | None:
    formatted = asked.response_format
    if formatted is not None and formatted.type == "json_object":
        return Constraint.json_schema({"type": "object"})
    if formatted is not None and formatted.json_schema is not None and formatted.type == "json_schema":
        return Constraint.json_schema(formatted.json_schema.schema_ or {})
    if asked.guided_json is not None:
        return Constraint.json_schema(asked.guided_json)
    if asked.guided_regex is not None:
        return Constraint.regex(asked.guided_regex)
    if asked.guided_choice is not None:
        return Constraint.choice(asked.guided_choice)
    return None if asked.guided_grammar is None else Constraint.lark(asked.guided_grammar)


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def _or(value: Any, default: Any) -> Any:
    """A field that is null is as one that is left out."""
    return default if value is None else value
