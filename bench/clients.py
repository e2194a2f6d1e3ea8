"""Load a server that has OpenAI's API: start one, send requests from several clients at once, and time what arrives."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from bench.processes import last_line
from headstart.errors import UsageError
from headstart.evaluation.server_client import Stream, model_at, open_stream
from headstart.evaluation.speculation import TooLong


def send(url: str, bodies: Sequence[dict[str, Any]], clients: int, timeout: float = 600.0) -> list[Stream]:
    """Send each body to URL/completions as a streamed request, `clients` at a time, and return the answers in order.

    A client sends its next request when its last stream has ended. Raises UsageError if an answer is no stream of text.
    """
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(partial(_send, url, timeout), bodies))


def _send(url: str, timeout: float, body: dict[str, Any]) -> Stream:
    try:
        answer = open_stream(url, "completions", body, timeout)
    except TooLong as error:
        raise UsageError(f"{url}: has no room for the prompt ({error}); ask for fewer tokens") from error
    if not answer.pieces:
        raise UsageError(f"{url}: no stream of text; try the request by itself")
    return answer


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
