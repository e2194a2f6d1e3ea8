"""Carry requests to the engine's thread and their output back to the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from headstart.decoding.generation import Generation, OriginStream
from headstart.decoding.settings import Request


@dataclass(frozen=True)
class Piece:
    """The output that one or several passes have added to a job."""

    text: str
    start: int
    """Number of tokens before this piece."""
    stop: int
    """Number of tokens up to the end of this piece."""
    parts: list[tuple[str, int]]
    """The text in parts with the head that drafted each, if the request asks for origins."""
    tokens_per_pass: float
    """Average over the output so far."""
    finished: bool
    """True for the last piece."""

    def merge(self, following: Piece) -> Piece:
        """Return this piece and the `following` one as one, for readers that are slower than the engine."""
        return Piece(
            self.text + following.text,
            self.start,
            following.stop,
            self.parts + following.parts,
            following.tokens_per_pass,
            following.finished,
        )


@dataclass
class Record:
    """Collect what a request came to, for logs and traces."""

    request_id: str
    jobs: list[Job] = field(default_factory=list)


RECORD: ContextVar[Record | None] = ContextVar("record", default=None)
"""The record of the request that this task answers."""


class Inbox:
    """Collect the pieces of one answer; only the event loop uses it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._pieces: dict[Job, Piece] = {}
        self.error: Exception | None = None
        """The error that ended the answer."""
        self._arrived = asyncio.Event()

    def put(self, job: Job, piece: Piece) -> None:
        """Add a piece."""
        before = self._pieces.get(job)
        self._pieces[job] = piece if before is None else before.merge(piece)
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        """End the answer with an error."""
        self.error = error
        self._arrived.set()

    async def take(self) -> dict[Job, Piece]:
        """Wait for pieces and return all of them. Raises the error that ended the answer."""
        await self._arrived.wait()
        if self.error is not None:
            raise self.error
        self._arrived.clear()
        pieces, self._pieces = self._pieces, {}
        return pieces


class Job:
    """Generate choice number `index` of an answer for a client, whose turn it takes.

    `streams`: pieces are sent to the inbox as they come, else one piece at the end. `origins`: pieces name the heads
    that drafted them.
    """

    def __init__(
        self, request: Request, client: str, index: int, inbox: Inbox, *, streams: bool, origins: bool
    ) -> None:
        self.request, self.client, self.index, self.inbox = request, client, index, inbox
        self.streams, self.wants_origins = streams, origins
        record = RECORD.get()
        self.request_id = record.request_id if record else ""
        if record is not None:
            record.jobs.append(self)
        self.arrived = time.perf_counter()
        self.last = self.arrived
        """Time of the end of its last pass, or of its arrival."""
        self.generation: Generation | None = None
        """The generation, once the job has a slot. Its lists only grow, so the event loop may read a piece's tokens."""
        self.origin_stream: OriginStream | None = None
        self.passed = 0
        """Number of tokens that the worker has counted."""
        self._sent, self._sent_at = 0, 0.0
        self._text = ""
        self._parts: list[tuple[str, int]] = []

    def phases(self, now: float) -> dict[str, tuple[float, float]]:
        """Return from when to when the job has waited, read its prompt and decoded, on the clock of `arrived`."""
        if self.generation is None:
            return {"queue": (self.arrived, now)}
        stats = self.generation.stats
        started = self.last - stats.seconds
        read = started + stats.prefill_seconds
        return {"queue": (self.arrived, started), "prompt": (started, read), "decode": (read, self.last)}

    def piece(self, text: str, now: float, interval: float) -> Piece | None:
        """Add the text that a pass released at `now`, and return the next piece, on the engine's thread.

        Returns None if the last piece was sent less than `interval` seconds ago and the output continues.
        """
        self._text += text
        if self.origin_stream is not None:
            self._parts += self.origin_stream.new()  # pass by pass, or tokens of head 1 would be joined
        generation = self.generation
        assert generation is not None
        finished, count = generation.finished, len(generation.tokens)
        if not finished and (not self.streams or count == self._sent or now - self._sent_at < interval):
            return None
        piece = Piece(self._text, self._sent, count, self._parts, generation.stats.tokens_per_pass, finished)
        self._text, self._parts, self._sent, self._sent_at = "", [], count, now
        return piece


def deliver(pieces: Sequence[tuple[Job, Piece]], errors: Sequence[tuple[Job, Exception]]) -> None:
    """Put the pieces and errors of a pass into the inboxes, on the event loop."""
    for job, piece in pieces:
        job.inbox.put(job, piece)
    for job, error in errors:
        job.inbox.fail(error)
