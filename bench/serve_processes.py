"""The server and its clients of the serving benchmark, each a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.errors import UsageError

CLIENT = Path(__file__).with_name("serve_client.py")


@dataclass(frozen=True)
class Answer:
    """What came back of one request."""

    number: int
    """Of its body."""
    status: int
    body: str
    sent: float
    times: list[float]
    """Of the events of a stream, as they came."""
    end: float

    @property
    def first(self) -> float:
        """When the first event came."""
        return self.times[0]

    @property
    def events(self) -> list[dict[str, Any]]:
        """Of a stream."""
        lines = [line[6:] for line in self.body.splitlines() if line.startswith("data: {")]
        return [json.loads(line) for line in lines]

    @property
    def text(self) -> str:
        """Of its one choice."""
        if not self.times:
            return str(json.loads(self.body)["choices"][0]["text"])
        return "".join(choice["text"] for event in self.events for choice in event["choices"])

    @property
    def usage(self) -> dict[str, Any]:
        """Of a stream that was asked for it."""
        found: dict[str, Any] = self.events[-1]["usage"]
        return found


class ServerProcess:
    """`headstart serve` on a free port; use it in a `with`."""

    def __init__(self, model: Path, threads: int, *flags: str) -> None:
        command = [sys.executable, "-m", "headstart", "serve", str(model), "--port", "0", "--threads", str(threads)]
        self._process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True, env={**os.environ})
        assert self._process.stderr is not None
        said = ""
        for line in self._process.stderr:
            said = line.strip() or said
            if found := re.search(r"listening on http://[^:]+:(\d+)", line):
                self.port = int(found[1])
                break
        else:
            raise UsageError(f"headstart serve did not start ({said}); try it by itself")
        self._process.stderr.readline()  # how to try it

    @property
    def resident_bytes(self) -> int:
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
    """Asks a server; use it in a `with`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(CLIENT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def begin(
        self,
        port: int,
        bodies: list[dict[str, Any]],
        concurrency: int,
        seconds: float | None = None,
        path: str = "/v1/completions",
        limit: float = 120.0,
    ) -> None:
        job = {"port": port, "path": path, "bodies": bodies, "concurrency": concurrency, "seconds": seconds}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**job, "limit": limit}) + "\n")
        self._process.stdin.flush()

    def answers(self) -> list[Answer]:
        """Of what was begun, when all of it is done."""
        assert self._process.stdout is not None
        return [Answer(*each) for each in json.loads(self._process.stdout.readline())["answers"]]

    def ask(self, port: int, bodies: list[dict[str, Any]], concurrency: int, **more: Any) -> list[Answer]:
        self.begin(port, bodies, concurrency, **more)
        return self.answers()

    def __enter__(self) -> ClientProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()
