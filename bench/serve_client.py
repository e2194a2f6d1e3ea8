"""Clients of the serving benchmark, in a process of their own: bodies in, what came back and when out, a line each.

Run as a file it needs Python alone. A line on standard input is {"port", "path", "bodies", "concurrency", "seconds",
"limit"}: bodies are asked for by `concurrency` clients, once each, or round and round for `seconds`. The answer is a
line {"answers": [[number of the body, status, body, sent, events, end], ...]} in seconds of a monotonic clock that all
processes share; "events" are when each event of a stream came.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

HANG, BROKEN = 0, -1
"""Instead of a status: no answer within the limit, or none that can be read."""
EVENT = b"data: {"
"""Begins an event that is not the end of all."""


async def ask(port: int, path: str, body: bytes, limit: float) -> list[Any]:
    """[status, body, sent, events, end] of one request."""
    began = time.monotonic()
    events: list[float] = []
    try:
        raw, events = await asyncio.wait_for(_exchange(port, path, body), limit)
        status, content = _parsed(raw)
    except asyncio.TimeoutError:
        status, content = HANG, ""
    except (OSError, ValueError, IndexError) as error:
        status, content = BROKEN, repr(error)
    return [status, content, began, events, time.monotonic()]


async def _exchange(port: int, path: str, body: bytes) -> tuple[bytes, list[float]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", "Content-Type: application/json"]
        writer.write("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
        pieces: list[bytes] = []
        events: list[float] = []
        tail = b""
        while piece := await reader.read(1 << 16):
            pieces.append(piece)
            # A mark may be cut in two.
            events += [time.monotonic()] * (tail + piece).count(EVENT)
            tail = piece[1 - len(EVENT) :]
        return b"".join(pieces), events
    finally:
        writer.close()


def _parsed(raw: bytes) -> tuple[int, str]:
    head, _, body = raw.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    if b"transfer-encoding: chunked" in head.lower():
        pieces = []
        while body:
            size, _, body = body.partition(b"\r\n")
            count = int(size, 16)
            pieces.append(body[:count])
            body = body[count + 2 :]
        body = b"".join(pieces)
    return status, body.decode("utf-8", "replace")


async def run(job: dict[str, Any]) -> list[list[Any]]:
    """All of a job."""
    bodies: list[tuple[str, bytes]] = [
        (body["path"], body["text"].encode("latin-1")) if "path" in body else (job["path"], json.dumps(body).encode())
        for body in job["bodies"]
    ]
    seconds = job.get("seconds")
    end = None if seconds is None else time.monotonic() + seconds
    turns: Iterator[int] = iter(range(len(bodies))) if end is None else itertools.cycle(range(len(bodies)))
    answers: list[list[Any]] = []

    async def client() -> None:
        for i in turns:
            if end is not None and time.monotonic() > end:
                return
            path, body = bodies[i]
            answers.append([i, *await ask(job["port"], path, body, job["limit"])])
            if answers[-1][1] == 429:  # a well-behaved client; the server names at least a second
                await asyncio.sleep(1.0)

    await asyncio.gather(*(client() for _ in range(job["concurrency"])))
    return answers


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps({"answers": asyncio.run(run(json.loads(line)))}), flush=True)
