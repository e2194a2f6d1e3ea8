"""Answer requests in OpenAI's format, whole and in chunks, with Headstart's own fields."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from headstart.data.pieces import TextOffsets, piece_bytes, piece_name
from headstart.data.tokenizers import Tokenizer
from headstart.decoding.generation import Generation, Stats
from headstart.serving.chats import Chats
from headstart.serving.jobs import Job, Piece
from headstart.serving.schemas import ChatRequest, GenerationBody
from headstart.serving.stream import DONE, event
from headstart.serving.tools import CallParser, ToolFormat
from headstart.serving.waiting import Deadline
from headstart.serving.worker import Worker

FINISH_REASONS = {"end": "stop", "stop": "stop", "stuck": "stop", "length": "length"}
"""OpenAI's name of each finish reason; `finish_detail` has Headstart's."""


class AnswerFormat:
    """Format the answer to one request; a model without `tokenizer` answers with `token_ids` and empty text.

    `seed` is that of the first choice of each prompt; `echo` holds the text to put before each choice, if asked for;
    `chats` parses calls of functions.
    """

    def __init__(
        self,
        body: GenerationBody,
        model: str,
        seed: int,
        tokenizer: Tokenizer | None,
        prompt_tokens: int,
        echo: Sequence[str] = (),
        chats: Chats | None = None,
    ) -> None:
        self._chat, self._tokenizer, self._echo = isinstance(body, ChatRequest), tokenizer, echo
        self._logprobs, self._of_prompt = body.alternatives, body.prompt_logprobs
        self._origins, self._special = body.speculation.origins, body.skip_special_tokens is False
        self._choices, self._outputs, self._prompt_tokens = body.n or 1, body.outputs, prompt_tokens
        options = body.stream_options
        self._ends_with_usage = bool(options and options.include_usage)
        self._always_usage = bool(options and options.continuous_usage_stats)
        self._always_timings = body.timings_per_token
        self._echo_only = body.requested_tokens == 0  # the engine still generates one token
        name = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": name, "created": int(time.time()), "model": model, "seed": seed}
        self._parser: Callable[[], CallParser | None] = lambda: None
        self._new_id = chats.form.new_id if chats is not None and chats.form is not None else ToolFormat.new_id
        if isinstance(body, ChatRequest) and chats is not None:
            self._parser = partial(chats.parser, body)
        self._begun: dict[Job, CallParser | None] = {}
        self._offsets: dict[Job, TextOffsets] = {}

    def whole(self, jobs: Sequence[Job], pieces: dict[Job, Piece]) -> dict[str, Any]:
        """Return the answer to a request that does not stream."""
        choices = []
        for index, job in enumerate(self._best(jobs)):
            choice = {**self._choice(job, pieces[job]), "index": index}
            if self._chat:
                message = choice.pop("delta")
                for call in message.get("tool_calls", ()):
                    del call["index"]
                choice["message"] = {"role": "assistant", **message, "refusal": None}
            elif self._of_prompt is not None:
                choice["prompt_logprobs"] = self._format_prompt(job)
            choices.append(choice)
        kind = "chat.completion" if self._chat else "text_completion"
        answer = {**self._head, "object": kind, "choices": choices, "usage": self._usage(jobs)}
        if self._chat and self._of_prompt is not None:
            answer["prompt_logprobs"] = self._format_prompt(jobs[0])
        return {**answer, "timings": self._timings(jobs)}

    def chunk(self, jobs: Sequence[Job], job: Job, piece: Piece) -> bytes:
        """Return the events of a stream for a piece of one of the `jobs`."""
        role = {} if job in self._begun else {"role": "assistant"}
        choice = self._choice(job, piece)
        if self._chat:
            delta = choice["delta"]
            if not (role or any(delta.values()) or piece.finished or self._logprobs is not None or self._origins):
                return b""  # it may be part of a call
            choice["delta"] = {**role, **delta}
        costs: dict[str, Any] = {"usage": self._usage(jobs)} if self._always_usage else {}
        if self._always_timings:
            costs["timings"] = self._timings(jobs)
        return event({**self._head, "object": self._chunk_kind, "choices": [choice], **costs})

    def end(self, jobs: Sequence[Job]) -> bytes:
        """Return the events that end a stream."""
        if not self._ends_with_usage:
            return DONE
        costs = {"usage": self._usage(jobs), "timings": self._timings(jobs)}
        return event({**self._head, "object": self._chunk_kind, "choices": [], **costs}) + DONE

    def _best(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the outputs of each prompt that are choices: those with the most probable tokens on average."""
        if self._outputs == self._choices:
            return list(jobs)

        def mean(job: Job) -> float:
            scores = job.generation.logprobs if job.generation is not None else []
            return sum(scores) / max(1, len(scores))

        groups = [jobs[i : i + self._outputs] for i in range(0, len(jobs), self._outputs)]
        return [job for group in groups for job in sorted(group, key=mean, reverse=True)[: self._choices]]

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _choice(self, job: Job, piece: Piece) -> dict[str, Any]:
        generation = job.generation
        assert generation is not None
        first = job not in self._begun
        if first:
            self._begun[job] = self._parser()
        reason = generation.finish_reason if piece.finished else None
        if self._echo_only:
            piece, reason = replace(piece, text="", stop=piece.start, parts=[]), reason and "length"
        text = self._echo[job.index] + piece.text if self._echo and first else piece.text
        choice: dict[str, Any] = {"index": job.index, "text": text, "logprobs": None, "finish_reason": None}
        parser = self._begun[job]
        if self._chat:
            choice["delta"] = {"content": choice.pop("text")} if parser is None else self._parse(parser, piece)
        if reason is not None:
            choice |= {"finish_reason": FINISH_REASONS[reason], "finish_detail": reason}
            if parser is not None and parser.calls and reason != "length":
                choice["finish_reason"] = "tool_calls"
        if self._tokenizer is None:
            choice["token_ids"] = generation.tokens[piece.start : piece.stop]
        if self._logprobs is not None:
            choice["logprobs"] = self._format_logprobs(job, generation, piece, bool(self._echo) and first)
        if self._origins:
            tokens = [{"text": part, "head": head} for part, head in piece.parts]
            choice["speculative"] = {"tokens": tokens, "tokens_per_pass": round(piece.tokens_per_pass, 3)}
        return choice

    def _parse(self, parser: CallParser, piece: Piece) -> dict[str, Any]:
        """Return the content and the calls that a piece completes."""
        content, parts = parser.push(piece.text)
        if piece.finished:
            content += parser.finish()
        message: dict[str, Any] = {"content": content or None}
        calls = []
        for part in parts:
            function = {"arguments": part.arguments}
            if part.name is None:
                calls.append({"index": part.index, "function": function})
            else:
                named = {"name": part.name, **function}
                calls.append({"index": part.index, "id": self._new_id(), "type": "function", "function": named})
        return message | {"tool_calls": calls} if calls else message

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
                None if best is None else {self._name(t): _finite(lp) for t, lp in best[: self._logprobs]}
                for _, _, best in of_tokens
            ],
            "text_offset": self._places(job, generation.tokens[span], echoed),
        }

    def _places(self, job: Job, tokens: Sequence[int], echoed: bool) -> list[int]:
        """Return the positions of tokens in the text of a choice, after those of its prompt if it is `echoed`."""
        prompt = job.request.prompt if echoed else ()
        if self._tokenizer is None:
            return [0] * (len(prompt) + len(tokens))
        if job not in self._offsets:
            start, stream = len(self._echo[job.index]) if self._echo else 0, job.request.text_stream(self._tokenizer)
            self._offsets[job] = TextOffsets(self._tokenizer, (), start, stream)
        before = TextOffsets(self._tokenizer, ())
        return [before.push(token) for token in prompt] + [self._offsets[job].push(token) for token in tokens]

    def _format_prompt(self, job: Job) -> list[dict[str, Any] | None]:
        """Return the log-probabilities of a prompt's tokens, as vLLM does: by token id, None for the first."""
        generation, count = job.generation, self._of_prompt
        assert generation is not None and count is not None
        of_tokens: list[dict[str, Any] | None] = [None]
        own, best = generation.prompt_logprobs, generation.prompt_top_logprobs
        for token, logprob, others in zip(job.request.prompt[1:], own, best):
            ranks = {other: rank for rank, (other, _) in enumerate(others, start=1)}
            shown = {token: logprob, **dict(others[:count])}
            of_tokens.append(
                {
                    str(each): {"logprob": _finite(score), "rank": ranks.get(each), "decoded_token": self._name(each)}
                    for each, score in shown.items()
                }
            )
        return of_tokens

    def _format_token(self, token: int, logprob: float) -> dict[str, Any]:
        content = b"" if self._tokenizer is None else piece_bytes(self._tokenizer, token)
        if not content and self._special:
            content = self._name(token).encode()
        of_text = list(content) if content else None  # None for a token that is not part of the text
        return {"token": self._name(token), "logprob": _finite(logprob), "bytes": of_text}

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._tokenizer is None else piece_name(self._tokenizer, token)

    def _usage(self, jobs: Sequence[Job]) -> dict[str, Any]:
        return usage_of(jobs, self._outputs, self._prompt_tokens, counted=not self._echo_only)

    def _timings(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """Return the times of all choices, as llama.cpp does."""
        stats = Stats.summed([job.generation.stats for job in jobs if job.generation is not None])
        read = sum(len(job.request.prompt) for job in jobs if job.generation is not None) - stats.prompt_tokens_reused
        timings: dict[str, Any] = {"cache_n": stats.prompt_tokens_reused}
        seconds = stats.prefill_seconds, max(0.0, stats.seconds - stats.prefill_seconds)
        for name, count, took in (("prompt", read, seconds[0]), ("predicted", stats.tokens, seconds[1])):
            timings |= {f"{name}_n": count, f"{name}_ms": round(1000 * took, 3)}
            timings[f"{name}_per_token_ms"] = round(1000 * took / count, 3) if count else 0.0
            timings[f"{name}_per_second"] = round(count / took, 3) if took else 0.0
        drafted, accepted = _drafts(stats)
        return {**timings, "draft_n": drafted, "draft_n_accepted": accepted}


def usage_of(jobs: Sequence[Job], outputs: int, prompt_tokens: int, counted: bool = True) -> dict[str, Any]:
    """Return the cost of all outputs, with so many for each prompt; without tokens of outputs unless `counted`.

    A prompt counts once. Its cached tokens are those that every output of it found in a cache, for the first output
    reads the prompt for the others.
    """
    of_jobs = [job.generation.stats if job.generation is not None else Stats() for job in jobs]
    stats = Stats.summed([job.generation.stats for job in jobs if job.generation is not None])
    reused = [each.prompt_tokens_reused for each in of_jobs]
    cached = sum(min(reused[i : i + outputs]) for i in range(0, len(jobs), outputs))
    completion_tokens = stats.tokens if counted else 0
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": 0},
        "speculative": _speculative(stats),
    }


def _drafts(stats: Stats) -> tuple[int, int]:
    """Return the numbers of drafts of heads and lookup that were fed, and that were accepted."""
    return sum(stats.drafted) + stats.looked_up, sum(stats.accepted) + stats.looked_up_accepted


def _speculative(stats: Stats) -> dict[str, Any]:
    """Return what speculation gained, with vLLM's names where it has one."""
    drafted, accepted = _drafts(stats)
    committed = sum(i * count for i, count in enumerate(stats.accepted_counts, start=1))
    return {
        "drafted": drafted,
        "accepted": accepted,
        "passes": stats.passes,
        "tokens_per_pass": round(stats.tokens_per_pass, 3),
        "mean_acceptance_length": round(committed / stats.passes, 3) if stats.passes else 0.0,
        "draft_acceptance_rate": round(accepted / drafted, 3) if drafted else 0.0,
        "acceptance_histogram": stats.accepted_counts,
        "per_position": [
            {"head": k, "drafted": drafted, "accepted": accepted}
            for k, (drafted, accepted) in enumerate(zip(stats.drafted, stats.accepted), start=2)
        ],
    }


def _finite(logprob: float) -> float:
    """Return a number that JSON can express; other servers also send -9999 for minus infinity."""
    return logprob if math.isfinite(logprob) else -9999.0


class Format(Protocol):
    """Format the answer to a request."""

    def whole(self, jobs: Sequence[Job], pieces: dict[Job, Piece]) -> dict[str, Any]:
        """Return the answer to a request that does not stream."""

    def chunk(self, jobs: Sequence[Job], job: Job, piece: Piece) -> bytes:
        """Return the events of a stream for a piece of one of the `jobs`."""

    def end(self, jobs: Sequence[Job]) -> bytes:
        """Return the events that end a stream."""


class Answer:
    """Run the jobs of one request, which share an inbox, and return or stream their output."""

    def __init__(self, worker: Worker, jobs: Sequence[Job], form: Format, deadline: Deadline) -> None:
        self._worker, self._jobs, self._format, self._deadline = worker, jobs, form, deadline

    async def whole(self) -> dict[str, Any]:
        """Return the whole answer."""
        done: dict[Job, Piece] = {}
        async with aclosing(self._pieces()) as arriving:
            async for pieces in arriving:
                done |= pieces
        return self._format.whole(self._jobs, done)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the answer as it is generated."""
        async with aclosing(self._pieces()) as arriving:
            async for pieces in arriving:
                events = b"".join(self._format.chunk(self._jobs, job, piece) for job, piece in pieces.items())
                if events:
                    yield events
        yield self._format.end(self._jobs)

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
