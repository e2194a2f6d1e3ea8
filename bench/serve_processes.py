"""Run the server and its clients of the serving benchmark, each in a process of its own.

Run as a file, this is the client process. A line of its input is {"port", "path", "bodies", "concurrency", "seconds",
"timeout"}: `concurrency` clients send the bodies, once each, or again and again for `seconds`. The answer is a line
{"answers": [[number of the body, status, body, sent, times, end], ...]} in seconds of a monotonic clock that all
processes share; `times` are those of the events of a stream.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.errors import UsageError

TIMED_OUT, BROKEN = 0, -1
"""Values of `Answer.status` for no answer in time, and for an answer that cannot be read."""
EVENT = b"data: {"
"""Begin of every event of a stream but the last."""


@dataclass(frozen=True)
class Answer:
    """The answer to one request."""

    number: int
    """Number of the request's body."""
    status: int
    body: str
    sent: float
    times: list[float]
    """Arrival times of the events of a stream."""
    end: float

    @property
    def first(self) -> float:
        """Arrival time of the first event."""
        return self.times[0]

    @property
    def events(self) -> list[dict[str, Any]]:
        """Events of a stream."""
        lines = [line[6:] for line in self.body.splitlines() if line.startswith("data: {")]
        return [json.loads(line) for line in lines]

    @property
    def text(self) -> str:
        """Text of its one choice."""
        if not self.times:
            return str(json.loads(self.body)["choices"][0]["text"])
        return "".join(choice["text"] for event in self.events for choice in event["choices"])

    @property
    def usage(self) -> dict[str, Any]:
        """Usage at the end of a stream whose request includes it."""
        found: dict[str, Any] = self.events[-1]["usage"]
        return found


class ServerProcess:
    """`headstart serve` on a free port; use it in a `with`."""

    def __init__(self, model: Path, threads: int, *flags: str) -> None:
        command = [sys.executable, "-m", "headstart", "serve", str(model), "--port", "0", "--threads", str(threads)]
        self._process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        printed = ""
        for line in self._process.stderr:
            printed = line.strip() or printed
            if found := re.search(r"listening on http://[^:]+:(\d+)", line):
                self.port = int(found[1])
                break
        else:
            raise UsageError(f"headstart serve did not start ({printed}); try it by itself")
        self._process.stderr.readline()  # the line with an example request

    @property
    def resident_bytes(self) -> int:
        """Resident memory of the server."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8")
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return 1024 * int(found[1])

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


class ClientProcess:
    """Clients of a server; use it in a `with`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(
        self,
        port: int,
        bodies: list[dict[str, Any]],
        concurrency: int,
        *,
        seconds: float | None = None,
        timeout: float = 120.0,
    ) -> list[Answer]:
        """Send the bodies to /v1/completions, or to the path that a body names, and return all answers."""
        job = {"port": port, "path": "/v1/completions", "bodies": bodies, "concurrency": concurrency}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({**job, "seconds": seconds, "timeout": timeout}) + "\n")
        self._process.stdin.flush()
        return [Answer(*each) for each in json.loads(self._process.stdout.readline())["answers"]]

    def __enter__(self) -> ClientProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


async def _send(port: int, path: str, body: bytes, timeout: float) -> list[Any]:
    """Return [status, body, sent, times, end] of one request."""
    sent = time.monotonic()
    times: list[float] = []
    try:
        raw, times = await asyncio.wait_for(_exchange(port, path, body), timeout)
        status, content = _parse(raw)
    except asyncio.TimeoutError:
        status, content = TIMED_OUT, ""
    except (OSError, ValueError, IndexError) as error:
        status, content = BROKEN, repr(error)
    return [status, content, sent, times, time.monotonic()]


async def _exchange(port: int, path: str, body: bytes) -> tuple[bytes, list[float]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = [f"POST {path} HTTP/1.1", "Host: localhost", "Connection: close", "Content-Type: application/json"]
        writer.write("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
        pieces: list[bytes] = []
        times: list[float] = []
        tail = b""
        while piece := await reader.read(1 << 16):
            pieces.append(piece)
            # A mark may be cut in two.
            times += [time.monotonic()] * (tail + piece).count(EVENT)
            tail = piece[1 - len(EVENT) :]
        return b"".join(pieces), times
    finally:
        writer.close()


def _parse(raw: bytes) -> tuple[int, str]:
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


async def _run_job(job: dict[str, Any]) -> list[list[Any]]:
    bodies: list[tuple[str, bytes]] = [
        (body["path"], body["text"].encode("latin-1")) if "path" in body else (job["path"], json.dumps(body).encode())
        for body in job["bodies"]
    ]
    seconds = job["seconds"]
    end = None if seconds is None else time.monotonic() + seconds
    turns: Iterator[int] = iter(range(len(bodies))) if end is None else itertools.cycle(range(len(bodies)))
    answers: list[list[Any]] = []

    async def client() -> None:
        for i in turns:
            if end is not None and time.monotonic() > end:
                return
            path, body = bodies[i]
            answers.append([i, *await _send(job["port"], path, body, job["timeout"])])
            if answers[-1][1] == 429:  # a well-behaved client; the server names at least a second
                await asyncio.sleep(1.0)

    await asyncio.gather(*(client() for _ in range(job["concurrency"])))
    return answers


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps({"answers": asyncio.run(_run_job(json.loads(line)))}), flush=True)
