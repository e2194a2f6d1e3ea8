"""A text to be written, and what comes back of it: the two sides of the wall between event loop and engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from headstart.decoding.generation import Generation, OriginStream
from headstart.decoding.settings import Request


@dataclass(frozen=True)
class Piece:
    """What passes have added to one text."""

    text: str
    start: int
    """Tokens before it."""
    stop: int
    """Tokens with it."""
    parts: list[tuple[str, int]]
    """The same text by the head that drafted it, if the request asks for that."""
    tokens_per_pass: float
    """Of the text so far."""
    finished: bool

    def then(self, later: Piece) -> Piece:
        """Both as one: for readers who are slower than the engine."""
        return Piece(
            self.text + later.text,
            self.start,
            later.stop,
            self.parts + later.parts,
            later.tokens_per_pass,
            later.finished,
        )


class Inbox:
    """Where the pieces of one answer arrive. Made on the event loop, which alone touches it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._pieces: dict[Job, Piece] = {}
        self.error: Exception | None = None
        """What ended the answer."""
        self._arrived = asyncio.Event()

    def put(self, job: Job, piece: Piece) -> None:
        before = self._pieces.get(job)
        self._pieces[job] = piece if before is None else before.then(piece)
        self._arrived.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self._arrived.set()

    async def take(self) -> dict[Job, Piece]:
        """What has arrived since the last call, at least one piece. Raises what went wrong."""
        await self._arrived.wait()
        if self.error is not None:
            raise self.error
        self._arrived.clear()
        pieces, self._pieces = self._pieces, {}
        return pieces


class Job:
    """One text of an answer.

    Args:
        request: what the engine is to do.
        client: whose turn it takes.
        index: of the choice.
        inbox: of the answer.
        streams: whether pieces are wanted as they come, or all at the end.
        origins: whether it is to be told which head drafted what.
    """

    def __init__(
        self, request: Request, client: str, index: int, inbox: Inbox, *, streams: bool, origins: bool
    ) -> None:
        self.request, self.client, self.index, self.inbox = request, client, index, inbox
        self.streams, self.wants_origins = streams, origins
        self.arrived = time.perf_counter()
        self.last = self.arrived
        """When its last pass ended, or else when it arrived."""
        self.generation: Generation | None = None
        """Set once it has a slot. Its lists only grow, so the event loop may read what a piece names of them."""
        self.origin_stream: OriginStream | None = None
        self.passed = 0
        """Tokens that passes have given it."""
        self._told, self._told_at = 0, 0.0
        self._text = ""
        self._parts: list[tuple[str, int]] = []

    def piece(self, text: str, now: float, interval: float) -> Piece | None:
        """What is to be handed over after a pass that released `text` at `now`, if the last piece is `interval` seconds
        ago or the text has ended; on the engine's thread."""
        self._text += text
        if self.origin_stream is not None:
            self._parts += self.origin_stream.new()  # pass by pass, or tokens of head 1 would run together
        generation = self.generation
        assert generation is not None
        finished, count = generation.finished, len(generation.tokens)
        if not finished and (not self.streams or count == self._told or now - self._told_at < interval):
            return None
        piece = Piece(self._text, self._told, count, self._parts, generation.stats.tokens_per_pass, finished)
        self._text, self._parts, self._told, self._told_at = "", [], count, now
        return piece


def hand_out(pieces: Sequence[tuple[Job, Piece]], errors: Sequence[tuple[Job, Exception]]) -> None:
    """Puts what a step gave into the inboxes; on the event loop."""
    for job, piece in pieces:
        job.inbox.put(job, piece)
    for job, error in errors:
        job.inbox.fail(error)
