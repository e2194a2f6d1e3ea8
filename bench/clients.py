"""Load a server that has OpenAI's API: start one, send requests from several clients at once, and time what arrives."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench.processes import last_line
from headstart.errors import UsageError


@dataclass(frozen=True)
class Answer:
    """The answer to one streamed request, with times of a clock that all answers share."""

    sent: float
    times: list[float]
    """Arrival times of the events."""
    events: list[dict[str, Any]]
    end: float

    @property
    def pieces(self) -> list[float]:
        """Arrival times of the events that hold text."""
        return [at for at, event in zip(self.times, self.events) if any(c.get("text") for c in event["choices"])]

    @property
    def usage(self) -> dict[str, Any]:
        """Usage at the end of the stream; empty if the server sends none."""
        return next((event["usage"] for event in reversed(self.events) if event.get("usage")), {})

    @property
    def tokens(self) -> int:
        """Tokens that the server reports, or else the number of pieces."""
        return int(self.usage.get("completion_tokens", len(self.pieces)))


def send(url: str, bodies: Sequence[dict[str, Any]], clients: int, timeout: float = 600.0) -> list[Answer]:
    """Send each body to URL/completions as a streamed request, `clients` at a time, and return the answers in order.

    A client sends its next request when its last stream has ended. Raises UsageError if an answer is no stream of text.
    """
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(partial(_send, url, timeout), bodies))


def _send(url: str, timeout: float, body: dict[str, Any]) -> Answer:
    at, lines, times = urlsplit(url), list[bytes](), list[float]()
    kind = http.client.HTTPSConnection if at.scheme == "https" else http.client.HTTPConnection
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    content, sent = json.dumps(body), time.monotonic()
    try:
        with contextlib.closing(kind(at.netloc, timeout=timeout)) as connection:
            connection.request("POST", f"{at.path}/completions", content, headers)
            response = connection.getresponse()
            for line in response:
                if line.startswith(b"data: {"):
                    times.append(time.monotonic())
                lines.append(line)
        answer = Answer(sent, times, [json.loads(x[6:]) for x in lines if x.startswith(b"data: {")], time.monotonic())
        if response.status == 200 and answer.pieces:
            return answer
        problem = f"status {response.status}, {b''.join(lines).decode('utf-8', 'replace')}"
    except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
        problem = repr(error)
    raise UsageError(f"{url}: no stream of text: {' '.join(problem.split())[:200]}; try the request by itself")


def model_at(url: str) -> str:
    """Return the name of the first model of a server. Raises UsageError if nothing answers."""
    try:
        at = urlsplit(url)
        if at.scheme not in ("http", "https") or not at.netloc:
            raise ValueError("no URL")
        kind = http.client.HTTPSConnection if at.scheme == "https" else http.client.HTTPConnection
        key = os.environ.get("OPENAI_API_KEY")
        with contextlib.closing(kind(at.netloc, timeout=10)) as connection:
            connection.request("GET", f"{at.path}/models", headers={"Authorization": f"Bearer {key}"} if key else {})
            return str(json.load(connection.getresponse())["data"][0]["id"])
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{url}: {error}; name a server with OpenAI's API, like http://HOST:PORT/v1") from error


@contextlib.contextmanager
def served(model: Path, threads: int, *flags: str, seconds: float = 300.0) -> Iterator[str]:
    """Run `headstart serve` on a free port and yield its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "headstart", "serve", str(model), "--port", str(port), "--threads", str(threads)]
    url, end = f"http://127.0.0.1:{port}/v1", time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with open(log, "wb") as file:
            process = subprocess.Popen([*command, *flags], stdout=file, stderr=subprocess.STDOUT)
        try:
            while True:
                with contextlib.suppress(UsageError):
                    model_at(url)
                    break
                if process.poll() is not None or time.monotonic() > end:
                    raise UsageError(f"headstart serve did not start ({last_line(log)}); try it by itself")
                time.sleep(0.1)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
