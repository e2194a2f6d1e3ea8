"""Answers in OpenAI's shapes, whole and in chunks, with what Headstart adds."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from headstart.data.pieces import TextOffsets, piece_bytes, piece_name
from headstart.data.tokenizers import Tokenizer
from headstart.decoding.generation import Generation, Stats
from headstart.serving.jobs import Job, Piece
from headstart.serving.schemas import finite

FINISHED = {"end": "stop", "stop": "stop", "stuck": "stop", "length": "length"}
"""OpenAI's word for each of our reasons; `finish_detail` has ours."""


class Shape:
    """Of the answer to one request.

    Args:
        chat: of which kind it is.
        model: what clients call it.
        seed: of the first choice of each prompt.
        tokenizer: None for a model without: its texts are empty, `token_ids` tell what it wrote.
        logprobs: whether log-probabilities are told.
        origins: whether it is told which head drafted which token.
        choices: how many of each prompt.
        echo: what stands before the text of each choice; none without echo.
        silent: nothing but the echo is returned, though the engine writes one token.
    """

    def __init__(
        self,
        *,
        chat: bool,
        model: str,
        seed: int,
        tokenizer: Tokenizer | None,
        logprobs: bool,
        origins: bool,
        choices: int = 1,
        echo: Sequence[str] = (),
        silent: bool = False,
    ) -> None:
        self.chat, self.tokenizer, self.logprobs, self.origins, self.echo = chat, tokenizer, logprobs, origins, echo
        self.silent = silent
        self.choices = choices
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": name, "created": int(time.time()), "model": model, "seed": seed}
        self._begun: set[Job] = set()
        self._offsets: dict[Job, TextOffsets] = {}

    def whole(self, jobs: Sequence[Job], pieces: dict[Job, Piece], prompt_tokens: int) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        choices = []
        for job in jobs:
            choice = self._choice(job, pieces[job])
            if self.chat:
                choice["message"] = {"role": "assistant", "content": choice.pop("text"), "refusal": None}
            choices.append(choice)
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage(jobs, prompt_tokens)}

    def chunk(self, job: Job, piece: Piece) -> dict[str, Any]:
        """Of a stream."""
        first = job not in self._begun
        choice = self._choice(job, piece)
        if self.chat:
            role = {"role": "assistant"} if first else {}
            choice["delta"] = {**role, "content": choice.pop("text")}
        return {**self._head, "object": self._chunk_kind, "choices": [choice]}

    def usage_chunk(self, jobs: Sequence[Job], prompt_tokens: int) -> dict[str, Any]:
        """The last one of a stream, where it is asked for."""
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": self._usage(jobs, prompt_tokens)}

    def _usage(self, jobs: Sequence[Job], prompt_tokens: int) -> dict[str, Any]:
        told = usage(jobs, prompt_tokens, self.choices)
        return told | {"completion_tokens": 0, "total_tokens": prompt_tokens} if self.silent else told

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _choice(self, job: Job, piece: Piece) -> dict[str, Any]:
        generation = job.generation
        assert generation is not None
        first = job not in self._begun
        self._begun.add(job)
        reason = generation.finish_reason if piece.finished else None
        if self.silent:
            piece, reason = replace(piece, text="", stop=piece.start, parts=[]), reason and "length"
        text = self.echo[job.index] + piece.text if self.echo and first else piece.text
        choice: dict[str, Any] = {"index": job.index, "text": text, "logprobs": None, "finish_reason": None}
        if reason is not None:
            choice |= {"finish_reason": FINISHED[reason], "finish_detail": reason}
        if self.tokenizer is None:
            choice["token_ids"] = generation.tokens[piece.start : piece.stop]
        if self.logprobs:
            choice["logprobs"] = self._logprobs(job, generation, piece, bool(self.echo) and first)
        if self.origins:
            tokens = [{"text": part, "head": head} for part, head in piece.parts]
            choice["speculative"] = {"tokens": tokens, "tokens_per_pass": round(piece.tokens_per_pass, 3)}
        return choice

    def _logprobs(self, job: Job, generation: Generation, piece: Piece, echoed: bool) -> dict[str, Any]:
        """Return the log-probabilities of a piece, behind those of the prompt where it is `echoed`."""
        span = slice(piece.start, piece.stop)
        of_tokens: list[tuple[int, float | None, list[tuple[int, float]] | None]] = []
        if echoed:  # nothing predicts the first token
            scores = [None, *generation.prompt_logprobs], [None, *generation.prompt_top_logprobs]
            of_tokens += zip(job.request.prompt, *scores)
        of_tokens += zip(generation.tokens[span], generation.logprobs[span], generation.top_logprobs[span])
        if self.chat:
            content = []
            for token, own, best in of_tokens:
                assert own is not None and best is not None  # chats are not echoed
                top = [self._token(other, logprob) for other, logprob in best]
                content.append({**self._token(token, own), "top_logprobs": top})
            return {"content": content, "refusal": None}
        return {
            "tokens": [self._name(token) for token, _, _ in of_tokens],
            "token_logprobs": [None if own is None else finite(own) for _, own, _ in of_tokens],
            "top_logprobs": [
                None if best is None else {self._name(t): finite(lp) for t, lp in best} for _, _, best in of_tokens
            ],
            "text_offset": self._places(job, generation.tokens[span], echoed),
        }

    def _places(self, job: Job, tokens: Sequence[int], echoed: bool) -> list[int]:
        """Return where tokens begin in the text of a choice, behind those of its prompt where it is `echoed`."""
        prompt = job.request.prompt if echoed else ()
        if self.tokenizer is None:
            return [0] * (len(prompt) + len(tokens))
        if job not in self._offsets:
            start = len(self.echo[job.index]) if self.echo else 0
            self._offsets[job] = TextOffsets(
                self.tokenizer, job.request.prompt, start, keep_space=job.request.constraint is not None
            )
        before = TextOffsets(self.tokenizer, ())
        return [before.push(token) for token in prompt] + [self._offsets[job].push(token) for token in tokens]

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._name(token), "logprob": finite(logprob), "bytes": self._bytes(token)}

    def _bytes(self, token: int) -> list[int] | None:
        """None for a token that is not part of the text."""
        content = b"" if self.tokenizer is None else piece_bytes(self.tokenizer, token)
        return list(content) if content else None

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self.tokenizer is None else piece_name(self.tokenizer, token)


def usage(jobs: Sequence[Job], prompt_tokens: int, choices: int) -> dict[str, Any]:
    """What the texts cost; `prompt_tokens`: of the different prompts, each with so many choices.

    Tokens are cached where every choice of a prompt found them: the first one to be admitted read the others."""
    parts = [job.generation.stats for job in jobs if job.generation is not None]
    reused = [0 if job.generation is None else job.generation.stats.prompt_tokens_reused for job in jobs]
    cached = sum(min(reused[i : i + choices]) for i in range(0, len(jobs), choices))
    stats = Stats.summed(parts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": stats.tokens,
        "total_tokens": prompt_tokens + stats.tokens,
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
