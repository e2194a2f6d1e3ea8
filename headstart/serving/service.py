"""Requests into jobs, jobs into answers: between the routes and the engine's thread."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from headstart.api import LanguageModel
from headstart.data.chat_template import ChatTemplate, need_chat_template
from headstart.data.tokenizers import prompt_ids
from headstart.decoding.constraints import Constraint, Matcher, compiled
from headstart.decoding.settings import GenerationSettings, Penalties
from headstart.errors import UsageError
from headstart.serving.answers import Shape
from headstart.serving.bodies import LARGE, MAX_VALUES, Body, read_body
from headstart.serving.conversation import rendered
from headstart.serving.errors import ApiError
from headstart.serving.jobs import Inbox, Job, Piece
from headstart.serving.preparation import Preparation, Result
from headstart.serving.schemas import Asked, ChatRequest, CompletionRequest, Speculative
from headstart.serving.settings import ServeSettings
from headstart.serving.stream import DONE, event
from headstart.serving.waiting import until
from headstart.serving.worker import Worker

COMPLETION_TOKENS = 16
"""Where a completion names no max_tokens, as OpenAI has it; a chat then goes on to the end of the context."""

SHORT = 2000
"""Characters or tokens of prompts that are tokenized on the event loop."""
BODY_THREADS, PROMPT_THREADS, CONSTRAINT_THREADS = 2, 4, 2
"""Threads that read large bodies, that tokenize prompts and render chats, and that compile constraints; one client has
at most half of each."""
MAX_CONSTRAINT = 65536
"""Characters of a constraint, in JSON where it is a schema or a list: the largest takes about a second to compile."""


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
        self._bodies = Preparation(BODY_THREADS, BODY_THREADS // 2, worker.bound)
        self._prompts = Preparation(PROMPT_THREADS, PROMPT_THREADS // 2, worker.bound)
        self._constraints = Preparation(CONSTRAINT_THREADS, CONSTRAINT_THREADS // 2, worker.bound)
        self._preparing = 0

    @property
    def idle(self) -> bool:
        """Whether no request is prepared, waits or is written."""
        return not self._preparing and self.worker.idle

    @property
    def stuck(self) -> int:
        """How many threads still prepare requests that have ended."""
        return self._bodies.stuck + self._prompts.stuck + self._constraints.stuck

    def stop(self) -> None:
        """Answer the requests that are prepared now, and later ones, with 503."""
        self._bodies.stop()
        self._prompts.stop()
        self._constraints.stop()

    def deadline(self) -> float:
        """Return the time of the event loop by which a request that has arrived now is answered."""
        return asyncio.get_running_loop().time() + self.settings.request_timeout

    async def read(self, kind: type[Body], content: bytes, content_type: str, client: str, deadline: float) -> Body:
        """Return the request in a body, which is read in a thread where that may take long. Raises ApiError."""
        reading = partial(read_body, kind, content, content_type, MAX_VALUES + self.context)
        if len(content) <= LARGE:
            return reading()
        return await self._prepare(self._bodies.run(client, reading), deadline)

    async def whole(self, asked: CompletionRequest | ChatRequest, client: str, deadline: float) -> dict[str, Any]:
        """Return the answer to a request. Raises ApiError."""
        answer = await self._prepared(asked, client, deadline)
        return await answer.whole()

    async def events(
        self, asked: CompletionRequest | ChatRequest, client: str, deadline: float
    ) -> AsyncGenerator[bytes, None]:
        """Yield the answer to a request as it is written. Raises ApiError."""
        answer = await self._prepared(asked, client, deadline)
        async with aclosing(answer.events()) as events:
            async for each in events:
                yield each

    async def _prepared(self, asked: CompletionRequest | ChatRequest, client: str, deadline: float) -> Answer:
        """Prepare a request. Raises ApiError for what the model or the server's limits do not allow, before anything is
        made that grows with the number of texts."""
        if asked.model is not None and asked.model != self.name:
            message = f"there is no model {asked.model[:80]!r}; this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        n, bound = asked.n or 1, self.worker.bound
        texts = n * (len(asked.prompts) if isinstance(asked, CompletionRequest) else 1)
        if texts > bound:
            message = f"the request asks for {texts} texts; this server takes {bound} at once"
            raise ApiError(400, message, param="n" if n > 1 else "prompt")

        async def preparing() -> Answer:
            prompts, matcher = await self._read(asked, client)
            return self._answer(asked, client, prompts, matcher, deadline)

        return await self._prepare(preparing(), deadline)

    async def _prepare(self, work: Awaitable[Result], deadline: float) -> Result:
        """Return what `work` returns, for a request that counts as one in preparation meanwhile. Raises ApiError, also
        at the deadline."""
        self._preparing += 1
        try:
            return await until(deadline, work)
        except asyncio.TimeoutError:
            raise _late(self.settings.request_timeout) from None
        except UsageError as error:
            raise ApiError(400, str(error)) from error
        finally:
            self._preparing -= 1

    async def _read(
        self, asked: CompletionRequest | ChatRequest, client: str
    ) -> tuple[list[list[int]], Matcher | None]:
        """Token ids of the prompts, and the constraint, compiled; in threads where that may take long."""
        constraint = _constraint(asked)
        if constraint is not None and len(constraint.text) > MAX_CONSTRAINT:
            message = f"the constraint has {len(constraint.text)} characters; this server compiles {MAX_CONSTRAINT}"
            raise ApiError(400, f"{message}: make it shorter")
        if _is_short(asked):
            prompts = self._encoded(asked)
        else:
            prompts = await self._prompts.run(client, partial(self._encoded, asked))
        if constraint is None:
            return prompts, None
        compiling = partial(compiled, constraint, self.tokenizer, self.model.config.vocab_size)
        return prompts, await self._constraints.run(client, compiling)

    def _encoded(self, asked: CompletionRequest | ChatRequest) -> list[list[int]]:
        if isinstance(asked, CompletionRequest):
            texts = asked.prompts
            encode = self._encode_bare if asked.add_special_tokens is False else self._encode
            return [encode(text) if isinstance(text, str) else text for text in texts]
        if self._template is None:
            template = need_chat_template(self.model.tokenizer)
            self._turn_ends = template.turn_ends(self.model.tokenizer)
            self._template = template  # last: other threads look at it alone
        return [self.model.tokenizer.encode(rendered(asked, self._template))]

    def _encode(self, text: str) -> list[int]:
        return prompt_ids(self.model.tokenizer, text)

    def _encode_bare(self, text: str) -> list[int]:
        return self.model.tokenizer.encode(text)

    def _answer(
        self,
        asked: CompletionRequest | ChatRequest,
        client: str,
        prompts: list[list[int]],
        matcher: Matcher | None,
        deadline: float,
    ) -> Answer:
        chat = isinstance(asked, ChatRequest)
        n = asked.n or 1
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        wanted = asked.max_tokens
        if isinstance(asked, ChatRequest) and asked.max_completion_tokens is not None:
            wanted = asked.max_completion_tokens
        speculative = asked.speculative or Speculative()
        bias = tuple((int(token), value) for token, value in (asked.logit_bias or {}).items())
        settings = GenerationSettings(
            temperature=_or(asked.temperature, 1.0),
            top_k=max(0, _or(asked.top_k, 0)),
            top_p=_or(asked.top_p, 1.0),
            min_p=_or(asked.min_p, 0.0),
            heads=self._heads(asked),
            acceptance=speculative.acceptance or "match",
            penalties=Penalties(
                _or(asked.repetition_penalty, 1.0),
                _or(asked.presence_penalty, 0.0),
                _or(asked.frequency_penalty, 0.0),
                bias,
            ),
            constraint=_constraint(asked),
            logprobs=asked.alternatives,
            prompt_logprobs=asked.logprobs if isinstance(asked, CompletionRequest) and asked.echo else None,
            stop=asked.stop,
            stop_tokens=frozenset(asked.stop_token_ids or ()),
            ignore_ends=bool(asked.ignore_eos),
            keep_stop=bool(asked.include_stop_str_in_output),
        )
        # A client's prompts are hidden from those with other keys; without keys all clients share one space.
        salt = f"{client if self.settings.api_key else ''}\n{asked.cache_salt or ''}"
        ends = self._turn_ends if chat else frozenset()
        inbox = Inbox()
        jobs: list[Job] = []
        for prompt in prompts:
            tokens = self._max_tokens(len(prompt), 1 if wanted == 0 else wanted, chat)
            settings = replace(settings, max_new_tokens=tokens)
            for i in range(n):
                request = settings.request(prompt, seed=seed + i, ends=ends, cache_salt=salt, matcher=matcher)
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
            choices=n,
            echo=echo,
            silent=wanted == 0,
        )
        include = bool(asked.stream_options and asked.stream_options.include_usage)
        prompt_tokens = sum(map(len, prompts))
        late = _late(self.settings.request_timeout)
        return Answer(self.worker, jobs, inbox, shape, prompt_tokens, deadline, late, include)

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
        deadline: float,
        late: ApiError,
        include_usage: bool,
    ) -> None:
        self._worker, self._jobs, self._inbox, self._shape = worker, jobs, inbox, shape
        self._prompt_tokens, self._include_usage = prompt_tokens, include_usage
        self._deadline, self._late = deadline, late

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
        alarm = self._inbox.loop.call_at(self._deadline, self._inbox.fail, self._late)
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
                self._worker.cancel(list(left), "deadline" if self._inbox.error is self._late else "cancelled")


def _late(seconds: float) -> ApiError:
    return ApiError(504, f"not done within the {seconds:g} s that this server gives a request", code="timeout")


def _is_short(asked: Asked) -> bool:
    """Whether it is read sooner than a thread is asked to."""
    if not isinstance(asked, CompletionRequest):
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


def _or(value: Any, default: Any) -> Any:
    """A field that is null is as one that is left out."""
    return default if value is None else value
