"""Turn requests into jobs of the engine's thread, and jobs into answers."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from headstart.api import LanguageModel
from headstart.data.pieces import piece_name
from headstart.data.tokenizers import prompt_ids
from headstart.decoding.constraints import Constraint, Matcher, compiled
from headstart.errors import UsageError
from headstart.serving.answers import Answer, AnswerFormat, Format
from headstart.serving.bodies import LARGE, MAX_VALUES, Body, read_body
from headstart.serving.chats import Chats
from headstart.serving.errors import ApiError
from headstart.serving.jobs import Inbox, Job
from headstart.serving.preparation import Preparation
from headstart.serving.responses import ResponseFormat, ResponseRequest
from headstart.serving.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationBody,
    TokenizeRequest,
)
from headstart.serving.settings import ServeSettings
from headstart.serving.translation import constraint_of, generation_settings, output_tokens, truncate
from headstart.serving.waiting import Deadline, Result
from headstart.serving.worker import Worker

SHORT = 2000
"""Most characters or tokens of prompts that are tokenized on the event loop."""
BODY_THREADS, PROMPT_THREADS, CONSTRAINT_THREADS = 2, 4, 2
"""Numbers of threads that read large bodies, that tokenize prompts and render chats, and that compile constraints; one
client has at most half of each."""
MAX_CONSTRAINT = 65536
"""Most characters of a constraint, in JSON if it is a schema or a list: the largest takes about a second to compile."""


class Service:
    """Answer requests with one model."""

    def __init__(self, model: LanguageModel, worker: Worker, name: str, settings: ServeSettings) -> None:
        self.model, self.worker, self.name, self.settings = model, worker, name, settings
        self.tokenizer = model._tokenizer
        self.context = settings.context or model.config.context
        end = frozenset[int]() if self.tokenizer is None else frozenset([self.tokenizer.end_id])
        self._special: frozenset[int] = getattr(self.tokenizer, "skipped", end)
        self.draining = False
        """True from the first signal on: new requests are refused."""
        self._chats: Chats | None = None
        self._bodies = Preparation(BODY_THREADS, BODY_THREADS // 2, worker.bound)
        self._prompts = Preparation(PROMPT_THREADS, PROMPT_THREADS // 2, worker.bound)
        self._constraints = Preparation(CONSTRAINT_THREADS, CONSTRAINT_THREADS // 2, worker.bound)
        self._preparing = 0

    @property
    def idle(self) -> bool:
        """Return whether no request is prepared, waits or is decoded."""
        return not self._preparing and self.worker.idle

    @property
    def stuck(self) -> int:
        """Return the number of threads that still prepare requests that have ended."""
        return self._bodies.stuck + self._prompts.stuck + self._constraints.stuck

    def stop(self) -> None:
        """Answer the requests that are prepared now, and later ones, with 503."""
        for preparation in (self._bodies, self._prompts, self._constraints):
            preparation.stop()

    def deadline(self) -> Deadline:
        """Return the deadline of a request that arrives now."""
        seconds = self.settings.request_timeout
        message = f"not done within the {seconds:g} s that this server gives a request"
        return Deadline.after(seconds, ApiError(504, message, code="timeout"))

    async def read(self, kind: type[Body], content: bytes, content_type: str, client: str, deadline: Deadline) -> Body:
        """Return the request in a body, and read a large body in a thread. Raises ApiError."""
        reading = partial(read_body, kind, content, content_type, MAX_VALUES + self.context)
        if len(content) <= LARGE:
            return reading()
        return await self._count(self._bodies.run(client, reading), deadline)

    async def convert(
        self, body: TokenizeRequest | DetokenizeRequest, client: str, deadline: Deadline
    ) -> dict[str, Any]:
        """Return the tokens of a text or conversation, or the text of tokens. Raises ApiError."""
        self._check_model(body.model)
        if isinstance(body, DetokenizeRequest):
            work = partial(self._detokenize, body)
        else:
            work = partial(self._tokenize, body)
        return await self._count(self._prompts.run(client, work), deadline)

    def _tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        if body.prompt is None:
            tokens = self._need_chats().encode(body)
        else:
            tokens = self._encode_text(body.prompt, body.add_special_tokens is False)
        names = [piece_name(self.model.tokenizer, token) for token in tokens] if body.return_token_strs else None
        return {"count": len(tokens), "max_model_len": self.context, "tokens": tokens, "token_strs": names}

    def _detokenize(self, body: DetokenizeRequest) -> dict[str, Any]:
        size = self.model.config.vocab_size
        beyond = next((token for token in body.tokens if token >= size), None)
        if beyond is not None:
            raise ApiError(400, f"tokens: {beyond} is none of this model's {size} tokens; leave it out", param="tokens")
        return {"prompt": self.model.tokenizer.decode(body.tokens)}

    async def whole(self, body: GenerationBody | ResponseRequest, client: str, deadline: Deadline) -> dict[str, Any]:
        """Return the answer to a request. Raises ApiError."""
        answer = await self._prepare(body, client, deadline)
        return await answer.whole()

    async def events(
        self, body: GenerationBody | ResponseRequest, client: str, deadline: Deadline
    ) -> AsyncGenerator[bytes, None]:
        """Yield the answer to a request as it is generated. Raises ApiError."""
        answer = await self._prepare(body, client, deadline)
        async with aclosing(answer.events()) as events:
            async for each in events:
                yield each

    async def _prepare(self, request: GenerationBody | ResponseRequest, client: str, deadline: Deadline) -> Answer:
        """Prepare the answer to a request.

        Raises ApiError for what the model or the server's limits do not allow, before anything is made whose size grows
        with the number of outputs.
        """
        body = request.chat if isinstance(request, ResponseRequest) else request
        self._check_model(body.model)
        n, bound = body.outputs, self.worker.bound
        outputs = n * (len(body.prompts) if isinstance(body, CompletionRequest) else 1)
        if outputs > bound:
            message = f"the request asks for {outputs} outputs; this server takes {bound} at once"
            raise ApiError(400, message, param="n" if n > 1 else "prompt")

        async def prepare() -> Answer:
            return self._answer(request, body, client, await self._read_prompts(body, client), deadline)

        return await self._count(prepare(), deadline)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            message = f"there is no model {name[:80]!r}; this server has {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _count(self, work: Awaitable[Result], deadline: Deadline) -> Result:
        """Return what `work` returns, and count its request as one in preparation meanwhile. Raises ApiError."""
        self._preparing += 1
        try:
            return await deadline.limit(work)
        except UsageError as error:
            raise ApiError(400, str(error)) from error
        finally:
            self._preparing -= 1

    async def _read_prompts(
        self, body: GenerationBody, client: str
    ) -> tuple[list[list[int]], Constraint | None, Matcher | None]:
        """Return the token ids of the prompts, and the constraint with its compiled form.

        Work that may take long runs in threads.
        """
        if isinstance(body, CompletionRequest) and sum(map(len, body.prompts)) <= SHORT:
            prompts = self._encode(body)
        else:
            prompts = await self._prompts.run(client, partial(self._encode, body))
        tools = body if isinstance(body, ChatRequest) and body.used_tools else None
        constraint = constraint_of(body) if tools is None else self._need_chats().constraint(tools)
        if constraint is None:
            return prompts, None, None
        if len(constraint.text) > MAX_CONSTRAINT:
            message = f"the constraint has {len(constraint.text)} characters; this server compiles {MAX_CONSTRAINT}"
            raise ApiError(400, f"{message}: make it shorter")
        if tools is None:
            compiling = partial(compiled, constraint, self.tokenizer, self.model.config.vocab_size)
        else:
            compiling = partial(self._need_chats().compiled, tools, constraint)
        return prompts, constraint, await self._constraints.run(client, compiling)

    def _encode(self, body: GenerationBody) -> list[list[int]]:
        """Return the token ids of the prompts."""
        if isinstance(body, ChatRequest):
            prompts = [self._need_chats().encode(body)]
        else:
            bare = body.add_special_tokens is False
            prompts = [p if not isinstance(p, str) else self._encode_text(p, bare) for p in body.prompts]
        return [truncate(body, prompt, self.context) for prompt in prompts]

    def _encode_text(self, text: str, bare: bool) -> list[int]:
        """Return the token ids of a text, with the start token unless it is `bare`."""
        return self.model.tokenizer.encode(text) if bare else prompt_ids(self.model.tokenizer, text)

    def _need_chats(self) -> Chats:
        """Return what reads conversations. Raises UsageError for a model without a chat template."""
        if self._chats is None:
            self._chats = Chats(self.model.tokenizer, self.model.config.vocab_size)
        return self._chats

    def _answer(
        self,
        asked: GenerationBody | ResponseRequest,
        body: GenerationBody,
        client: str,
        read: tuple[list[list[int]], Constraint | None, Matcher | None],
        deadline: Deadline,
    ) -> Answer:
        """Return the answer whose jobs generate each choice of each prompt."""
        prompts, constraint, matcher = read
        chats = self._need_chats() if isinstance(body, ChatRequest) else None
        shown = self._special if body.skip_special_tokens is False else frozenset[int]()
        if chats is not None and isinstance(body, ChatRequest) and body.used_tools:
            shown |= chats.shown
        settings = generation_settings(body, self.model.config.heads, self.settings.heads, shown, constraint)
        seed = secrets.randbits(32) if body.seed is None else body.seed
        # Clients with other keys cannot find out a client's prompts; without keys all clients share one space.
        apart = self.settings.api_key and not self.settings.share_prefixes
        salt = f"{client if apart else ''}\n{body.cache_salt or ''}"
        ends = chats.turn_ends if chats is not None else frozenset[int]()
        inbox, choices = Inbox(), body.outputs
        jobs: list[Job] = []
        for prompt in prompts:
            tokens = output_tokens(body, len(prompt), self.context, self.settings.max_tokens)
            settings = replace(settings, max_new_tokens=tokens)
            for i in range(choices):
                request = settings.request(prompt, seed=seed + i, ends=ends, cache_salt=salt, matcher=matcher)
                streams, origins = bool(body.stream), body.speculation.origins
                jobs.append(Job(request, client, len(jobs), inbox, streams=streams, origins=origins))
        echo: list[str] = []
        if isinstance(body, CompletionRequest) and body.echo:
            decode = self.model.tokenizer.decode
            whole = body.truncate_prompt_tokens is None
            before = [p if whole and isinstance(p, str) else decode(ids) for p, ids in zip(body.prompts, prompts)]
            echo = [text for text in before for _ in range(choices)]
        form: Format
        if isinstance(asked, ResponseRequest) and chats is not None:
            form = ResponseFormat(asked, self.name, seed, len(prompts[0]), chats.parser(asked.chat), chats.form)
        else:
            form = AnswerFormat(body, self.name, seed, self.tokenizer, sum(map(len, prompts)), echo, chats)
        return Answer(self.worker, jobs, form, deadline)
