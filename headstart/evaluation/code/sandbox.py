"""Run programs that a model wrote, each in a process of its own that can neither harm nor last."""

from __future__ import annotations

import json
import os
import queue
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headstart.errors import UsageError
from headstart.evaluation.code import confinement, seccomp

SERVER = Path(__file__).resolve().with_name("sandbox_server.py")
START_SECONDS = 60.0
"""Time limit for a process of the sandbox to start."""
GRACE = 1.5
"""Seconds after a program's time limit at which the process that runs it counts as lost."""


@dataclass(frozen=True)
class Program:
    """A program, its tests and its limits."""

    program: str
    """Python source."""
    tests: str = ""
    """Python source that runs after the program in the same namespace. The program passes if they raise nothing or end
    in a `unittest.main()` that passes. Without tests it passes if its exit status is 0."""
    stdin: str = ""
    seconds: float = 3.0
    """Limit of wall-clock and of processor time."""
    memory: int = 1 << 30
    """Limit of the address space in bytes."""


@dataclass(frozen=True)
class Verdict:
    """The result of a program."""

    status: str
    """passed, failed (an exception, a failed test, a signal), timeout, memory, output (more than 1 MiB), or sandbox
    (the sandbox itself was lost)."""
    detail: str
    """The exception, on one line or more."""
    stdout: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Return whether the program passed."""
        return self.status == "passed"


class _Server(subprocess.Popen[bytes]):
    """The process that forks one process per program, and the folder that it runs them in."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="headstart-sandbox-")).resolve()
        # Python imports this name before it opens its script.
        (self.folder / "sitecustomize.py").symlink_to(SERVER)
        environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "LANG": "C.UTF-8"}
        environment |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        super().__init__(
            [sys.executable, "program.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=self.folder,
            env=environment | {"PYTHONPATH": ".", "PYTHONDONTWRITEBYTECODE": "1"},
            start_new_session=True,
        )
        assert self.stdin is not None and self.stdout is not None
        self._in, self._out = self.stdin.fileno(), self.stdout.fileno()
        os.set_blocking(self._in, False)
        self._ready = False

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send `request` and return its answer.

        Raises TimeoutError after `seconds`, and OSError if the process is lost.
        """
        deadline = time.monotonic() + seconds
        self.wait_until_ready(deadline)
        data = memoryview(json.dumps(request).encode() + b"\n")
        while data:
            _wait_for(self._in, select.POLLOUT, deadline)
            data = data[os.write(self._in, data[: 1 << 16]) :]
        return self._receive(deadline)

    def wait_until_ready(self, deadline: float) -> None:
        """Wait for the process. Raise UsageError if it cannot give up its privileges, else the errors of `ask`."""
        if not self._ready:
            started = self._receive(deadline)
            if "refused" in started:
                raise UsageError(
                    f"programs cannot be run here: {started['refused']}; run this as a user without privileges"
                )
            self._ready = True

    def _receive(self, deadline: float) -> dict[str, Any]:
        line = bytearray()
        while not line.endswith(b"\n"):
            _wait_for(self._out, select.POLLIN, deadline)
            piece = os.read(self._out, 1 << 20)
            if not piece:
                raise BrokenPipeError("the sandbox's process has ended")
            line += piece
        found = json.loads(line)
        assert isinstance(found, dict)
        return found

    def close(self) -> None:
        """End the process and remove its folder."""
        self.kill()  # and, by the kernel, what it runs
        self.wait()
        for stream in (self.stdin, self.stdout):
            assert stream is not None
            stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _wait_for(fd: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(fd, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError("the sandbox's process does not answer")


class Sandbox:
    """A context manager that runs programs, `workers` at a time.

    A program runs as `python program.py` does, alone in a folder, in a process forked from a small warm one (a few
    milliseconds). The process has limits on memory, time, output and open files, no environment, no capabilities, and a
    filter that allows the system calls that computing, reading and printing need: no network, no further processes, no
    effect on other processes, no files written anywhere. It may read files; if the kernel has Landlock, it cannot read
    devices or other processes. It can never read the memory and the environment of this process while programs run.
    When a program ends or reaches its time limit, its process group is killed; a verdict comes at most two seconds
    after the time limit.

    A program with tests passes only if the tests ran to their end: leaving early, with any status, does not count. This
    guards against accidents. A program shares its process with its tests and can forge a verdict on purpose. Verdicts
    of hostile programs can be trusted only without tests, because output is judged outside.

    Raises UsageError if the machine cannot confine programs.
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
        self._servers: queue.SimpleQueue[_Server] = queue.SimpleQueue()
        servers = [_Server() for _ in range(workers)]
        for server in servers:
            self._servers.put(server)
        try:
            for server in servers:
                server.wait_until_ready(time.monotonic() + START_SECONDS)
        except (OSError, ValueError) as error:
            self.close()
            raise UsageError(f"the sandbox's process does not start ({error}); see its message above") from error
        except UsageError:
            self.close()
            raise

    def run(self, programs: Sequence[Program], done: Callable[[int], None] = lambda count: None) -> list[Verdict]:
        """Return verdicts in the order of `programs`; call `done(1)` after each."""

        def one(program: Program) -> Verdict:
            verdict = self._run(program)
            done(1)
            return verdict

        with confinement.hidden_memory():
            return list(self._threads.map(one, programs))

    def _run(self, program: Program) -> Verdict:
        server = self._servers.get()
        try:
            return Verdict(**server.ask(asdict(program), program.seconds + GRACE))
        except (OSError, ValueError, TypeError):
            server.close()
            server = _Server()
            return Verdict("sandbox", "the sandbox was lost while the program ran", "", 0.0)
        finally:
            self._servers.put(server)

    def close(self) -> None:
        """End all processes of the sandbox."""
        self._threads.shutdown(cancel_futures=True)
        while not self._servers.empty():
            self._servers.get().close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
