"""Running programs that a model wrote: each in a process of its own that can neither harm nor last."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from headstart.errors import UsageError
from headstart.evaluation import seccomp

SERVER = Path(__file__).with_name("sandbox_server.py")


@dataclass(frozen=True)
class Program:
    """A program, and what it must do."""

    program: str
    """Python source."""
    tests: str = ""
    """Python source run behind it, in the same names: it passes if this raises nothing. Empty: the program alone."""
    stdin: str = ""
    seconds: float = 3.0
    """Wall-clock and processor time."""
    memory: int = 1 << 30
    """Bytes of address space."""


@dataclass(frozen=True)
class Verdict:
    """How a program ended."""

    status: str
    """passed, failed (an exception, a failed test, a signal), timeout, memory, output (more than 1 MiB), or sandbox
    (the sandbox itself was lost)."""
    detail: str
    """The exception, on one line or more."""
    stdout: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.status == "passed"


class Sandbox:
    """Runs programs, `workers` at a time. A context manager.

    A program has a process forked from a small warm one (a few milliseconds), limits on memory, time, output and open
    files, no environment, and a filter of system calls: no network, no further processes, no signals to others, no
    files written anywhere. It may read files. When it ends, or its time has come, its process group is killed.
    It passes only if its tests ran to their end: leaving early, with whatever status, does not count. What shares a
    process with its tests can still deceive them, by objects that equal everything for instance: this keeps the machine
    safe and guards against accidents, and is no examination of cheats.

    Raises UsageError where the machine cannot confine programs.
    """

    def __init__(self, workers: int = 2) -> None:
        if workers < 1:
            raise UsageError(f"the sandbox needs at least one worker, not {workers}")
        if not seccomp.is_available():
            raise UsageError(
                "programs can only be run where the kernel filters system calls (Linux on x86-64 or arm64): "
                "run this evaluation there; on other systems, in a Linux container"
            )
        self._threads = ThreadPoolExecutor(workers)
        self._servers: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
        for _ in range(workers):
            self._servers.put(_start())
        self._closed = threading.Event()

    def run(self, programs: Sequence[Program], done: Callable[[int], None] = lambda count: None) -> list[Verdict]:
        """Verdicts in the order of `programs`; `done(1)` after each."""

        def one(program: Program) -> Verdict:
            verdict = self._run(program)
            done(1)
            return verdict

        return list(self._threads.map(one, programs))

    def _run(self, program: Program) -> Verdict:
        server = self._servers.get()
        try:
            assert server.stdin is not None and server.stdout is not None
            server.stdin.write(json.dumps(asdict(program)) + "\n")
            server.stdin.flush()
            answer = server.stdout.readline()
            if not answer:
                raise BrokenPipeError
            return Verdict(**json.loads(answer))
        except (OSError, ValueError):
            server.kill()
            server.wait()
            server = _start()
            return Verdict("sandbox", "the sandbox was lost while this ran", "", 0.0)
        finally:
            self._servers.put(server)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        while not self._servers.empty():
            server = self._servers.get()
            server.kill()
            server.wait()
            for stream in (server.stdin, server.stdout):
                assert stream is not None
                stream.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _start() -> subprocess.Popen[str]:
    # -I: neither the environment nor the working directory decides what it imports.
    return subprocess.Popen(
        [sys.executable, "-I", str(SERVER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
