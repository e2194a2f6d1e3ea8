"""Answer requests in OpenAI's format, whole and in chunks, with Headstart's own fields."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from headstart.data.pieces import TextOffsets, piece_bytes, piece_name
from headstart.data.tokenizers import Tokenizer
from headstart.decoding.generation import Generation, Stats
from headstart.serving.jobs import Job, Piece
from headstart.serving.schemas import ChatRequest, GenerationBody
from headstart.serving.stream import DONE, event
from headstart.serving.waiting import Deadline
from headstart.serving.worker import Worker

FINISH_REASONS = {"end": "stop", "stop": "stop", "stuck": "stop", "length": "length"}
"""OpenAI's name of each finish reason; `finish_detail` has Headstart's."""


class AnswerFormat:
    """Format the answer to one request; a model without `tokenizer` answers with `token_ids` and empty text.

    `seed` is that of the first choice of each prompt; `echo` holds the text to put before each choice, if asked for.
    """

    def __init__(
        self,
        body: GenerationBody,
        model: str,
        seed: int,
        tokenizer: Tokenizer | None,
        prompt_tokens: int,
        echo: Sequence[str] = (),
    ) -> None:
        self._chat, self._tokenizer, self._echo = isinstance(body, ChatRequest), tokenizer, echo
        self._logprobs, self._origins = body.alternatives is not None, body.speculation.origins
        self._choices, self._prompt_tokens = body.n or 1, prompt_tokens
        self._echo_only = body.requested_tokens == 0  # the engine still generates one token
        name = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": name, "created": int(time.time()), "model": model, "seed": seed}
        self._begun: set[Job] = set()
        self._offsets: dict[Job, TextOffsets] = {}

    def whole(self, jobs: Sequence[Job], pieces: dict[Job, Piece]) -> dict[str, Any]:
        """Return the answer to a request that does not stream."""
        choices = []
        for job in jobs:
            choice = self._choice(job, pieces[job])
            if self._chat:
                choice["message"] = {"role": "assistant", "content": choice.pop("text"), "refusal": None}
            choices.append(choice)
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage(jobs)}

    def chunk(self, job: Job, piece: Piece) -> dict[str, Any]:
        """Return the chunk of a stream for a piece of one choice."""
        role = {} if job in self._begun else {"role": "assistant"}
        choice = self._choice(job, piece)
        if self._chat:
            choice["delta"] = {**role, "content": choice.pop("text")}
        return {**self._head, "object": self._chunk_kind, "choices": [choice]}

    def usage_chunk(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """Return the last chunk of a stream, for requests with `include_usage`."""
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": self._usage(jobs)}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _choice(self, job: Job, piece: Piece) -> dict[str, Any]:
        generation = job.generation
        assert generation is not None
        first = job not in self._begun
        self._begun.add(job)
        reason = generation.finish_reason if piece.finished else None
        if self._echo_only:
            piece, reason = replace(piece, text="", stop=piece.start, parts=[]), reason and "length"
        text = self._echo[job.index] + piece.text if self._echo and first else piece.text
        choice: dict[str, Any] = {"index": job.index, "text": text, "logprobs": None, "finish_reason": None}
        if reason is not None:
            choice |= {"finish_reason": FINISH_REASONS[reason], "finish_detail": reason}
        if self._tokenizer is None:
            choice["token_ids"] = generation.tokens[piece.start : piece.stop]
        if self._logprobs:
            choice["logprobs"] = self._format_logprobs(job, generation, piece, bool(self._echo) and first)
        if self._origins:
            tokens = [{"text": part, "head": head} for part, head in piece.parts]
            choice["speculative"] = {"tokens": tokens, "tokens_per_pass": round(piece.tokens_per_pass, 3)}
        return choice

    def _format_logprobs(self, job: Job, generation: Generation, piece: Piece, echoed: bool) -> dict[str, Any]:
        """Return the log-probabilities of a piece, after those of the prompt if it is `echoed`."""
        span = slice(piece.start, piece.stop)
        of_tokens: list[tuple[int, float | None, list[tuple[int, float]] | None]] = []
        if echoed:  # nothing predicts the first token
            scores = [None, *generation.prompt_logprobs], [None, *generation.prompt_top_logprobs]
            of_tokens += zip(job.request.prompt, *scores)
        of_tokens += zip(generation.tokens[span], generation.logprobs[span], generation.top_logprobs[span])
        if self._chat:
            content = []
            for token, own, best in of_tokens:
                assert own is not None and best is not None  # a chat is not echoed
                top = [self._format_token(other, logprob) for other, logprob in best]
                content.append({**self._format_token(token, own), "top_logprobs": top})
            return {"content": content, "refusal": None}
        return {
            "tokens": [self._name(token) for token, _, _ in of_tokens],
            "token_logprobs": [None if own is None else _finite(own) for _, own, _ in of_tokens],
            "top_logprobs": [
                None if best is None else {self._name(t): _finite(lp) for t, lp in best} for _, _, best in of_tokens
            ],
            "text_offset": self._places(job, generation.tokens[span], echoed),
        }

    def _places(self, job: Job, tokens: Sequence[int], echoed: bool) -> list[int]:
        """Return the positions of tokens in the text of a choice, after those of its prompt if it is `echoed`."""
        prompt = job.request.prompt if echoed else ()
        if self._tokenizer is None:
            return [0] * (len(prompt) + len(tokens))
        if job not in self._offsets:
            start, constrained = len(self._echo[job.index]) if self._echo else 0, job.request.constraint is not None
            self._offsets[job] = TextOffsets(self._tokenizer, job.request.prompt, start, keep_space=constrained)
        before = TextOffsets(self._tokenizer, ())
        return [before.push(token) for token in prompt] + [self._offsets[job].push(token) for token in tokens]

    def _format_token(self, token: int, logprob: float) -> dict[str, Any]:
        content = b"" if self._tokenizer is None else piece_bytes(self._tokenizer, token)
        of_text = list(content) if content else None  # None for a token that is not part of the text
        return {"token": self._name(token), "logprob": _finite(logprob), "bytes": of_text}

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._tokenizer is None else piece_name(self._tokenizer, token)

    def _usage(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """Return the cost of all choices.

        A prompt counts once. Its cached tokens are those that every choice of it found in a cache, for the first
        choice reads the prompt for the others.
        """
        of_jobs = [job.generation.stats if job.generation is not None else Stats() for job in jobs]
        stats = Stats.summed([job.generation.stats for job in jobs if job.generation is not None])
        reused = [each.prompt_tokens_reused for each in of_jobs]
        cached = sum(min(reused[i : i + self._choices]) for i in range(0, len(jobs), self._choices))
        completion_tokens = 0 if self._echo_only else stats.tokens
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
            "speculative": {
                "drafted": sum(stats.drafted) + stats.looked_up,
                "accepted": sum(stats.accepted) + stats.looked_up_accepted,
                "passes": stats.passes,
                "tokens_per_pass": round(stats.tokens_per_pass, 3),
                "per_position": [
                    {"head": k, "drafted": drafted, "accepted": accepted}
                    for k, (drafted, accepted) in enumerate(zip(stats.drafted, stats.accepted), start=2)
                ],
            },
        }


def _finite(logprob: float) -> float:
    """Return a number that JSON can express; other servers also send -9999 for minus infinity."""
    return logprob if math.isfinite(logprob) else -9999.0


class Answer:
    """Run the jobs of one request, which share an inbox, and return or stream their output."""

    def __init__(self, worker: Worker, jobs: Sequence[Job], form: AnswerFormat, deadline: Deadline) -> None:
        self._worker, self._jobs, self._format, self._deadline = worker, jobs, form, deadline

    async def whole(self) -> dict[str, Any]:
        """Return the whole answer."""
        done: dict[Job, Piece] = {}
        async with aclosing(self._pieces()) as arriving:
            async for pieces in arriving:
                done |= pieces
        return self._format.whole(self._jobs, done)

    async def events(self, include_usage: bool) -> AsyncGenerator[bytes, None]:
        """Yield the answer as it is generated, and the usage at the end if that is requested."""
        async with aclosing(self._pieces()) as arriving:
            async for pieces in arriving:
                yield b"".join(event(self._format.chunk(job, piece)) for job, piece in pieces.items())
        if include_usage:
            yield event(self._format.usage_chunk(self._jobs))
        yield DONE

    async def _pieces(self) -> AsyncGenerator[dict[Job, Piece], None]:
        """Yield pieces until all jobs are done; cancel the jobs that are left when this generator ends."""
        inbox, late = self._jobs[0].inbox, self._deadline.error
        alarm = inbox.loop.call_at(self._deadline.time, inbox.fail, late)
        left = set(self._jobs)
        try:
            self._worker.submit(self._jobs)
            while left:
                pieces = await inbox.take()
                left -= {job for job, piece in pieces.items() if piece.finished}
                yield pieces
        finally:
            alarm.cancel()
            if left:
                self._worker.cancel(list(left), "deadline" if inbox.error is late else "cancelled")
