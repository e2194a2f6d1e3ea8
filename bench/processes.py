"""Run measurements in processes of their own, with their own threads and allocator settings, and read peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from headstart.errors import UsageError

RUNNER = Path(__file__).with_name("peers") / "run.py"
SOURCE = Path(__file__).parents[1]
# glibc keeps freed memory for itself, and keeps more after every large block that was freed. A fixed threshold has
# each large tensor mapped and unmapped on its own, so resident memory is what is alive.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Environment of a process whose peak memory is measured."""


class ProcessError(Exception):
    """A process that ended, does not answer, or answers that it failed: one line for the report."""


class JsonProcess:
    """A Python that answers JSON lines, see `peers/run.py`; use it in a `with`.

    Args:
        python: the interpreter.
        target: MODULE:NAME of the function or class that answers.
        threads: CPU threads; torch's OpenMP pool keeps the size that it starts with.
        environment: further variables.
        source: whether the process can import this source. A foreign Python must not.
        log: file for what the process prints (None: stderr).
        timeout: seconds that an answer may take (None: any number).
    """

    def __init__(
        self,
        python: str,
        target: str,
        *,
        threads: int,
        environment: Mapping[str, str] | None = None,
        source: bool = True,
        log: Path | None = None,
        timeout: float | None = None,
    ) -> None:
        self.log, self.timeout = log, timeout
        with open(log, "wb") if log else contextlib.nullcontext() as file:
            self._process = subprocess.Popen(
                [python, str(RUNNER), target],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=_environment(threads, source) | dict(environment or {}),
            )

    def ask(self, question: Mapping[str, Any]) -> Any:
        """Return the answer to one question. Raises ProcessError, or UsageError if the process raised it."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps(question) + "\n")
            stdin.flush()
            if not select.select([stdout], [], [], self.timeout)[0]:
                self._process.kill()
                raise ProcessError(f"failed: no answer in {self.timeout:.0f} s")
            line = stdout.readline()
        if not line:
            status = self._process.wait()
            raise ProcessError(f"failed: it ended with status {status}; {last_line(self.log)}")
        answer: dict[str, Any] = json.loads(line)
        if answer.get("type") == "UsageError":
            raise UsageError(answer["error"])
        if "error" in answer:
            raise ProcessError(f"failed: {answer['type']}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """End the process by the end of its input, or by force after ten seconds."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> JsonProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def call(
    function: Callable[[dict[str, Any]], Any],
    case: Mapping[str, Any],
    *,
    threads: int,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Call `function` of a module with `case`, both as JSON, in a new Python with `threads` threads.

    The function's output goes to stderr. Raises UsageError if the function raised it, else ProcessError if it failed.
    """
    target = f"{function.__module__}:{function.__name__}"
    with JsonProcess(sys.executable, target, threads=threads, environment=environment) as process:
        return process.ask(case)


def last_line(log: Path | None) -> str:
    """Return the last line that a process printed to its log."""
    if log is None:
        return "its output is above"
    lines: Sequence[str] = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")[:200]


def _environment(threads: int, source: bool) -> dict[str, str]:
    found = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    inherited = found.pop("PYTHONPATH", None)
    if source:
        found["PYTHONPATH"] = f"{SOURCE}{os.pathsep}{inherited}" if inherited else str(SOURCE)
    return found


def memory_meter(device: str) -> CudaPeak | ProcessPeak:
    """Return the meter of a device's peak memory: `reset()` sets the level above which `read()` counts, in bytes."""
    return CudaPeak() if device.startswith("cuda") else ProcessPeak()


class CudaPeak:
    """Peak memory of torch's CUDA allocator."""

    method = "peak of torch's CUDA allocator"

    def reset(self) -> None:
        """Start counting from the present level."""
        torch.cuda.reset_peak_memory_stats()
        self._level = torch.cuda.memory_allocated()

    def read(self) -> int:
        """Return the bytes of the peak above the level."""
        return torch.cuda.max_memory_allocated() - self._level


class ProcessPeak:
    """Peak resident memory of this process, as the user's machine sees it."""

    def __init__(self) -> None:
        self._resets = self._reset_peak()
        self.method = "peak resident memory (VmHWM)" if self._resets else "peak resident memory (getrusage)"

    def reset(self) -> None:
        """Start counting from the present level."""
        with contextlib.suppress(AttributeError, OSError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)  # the heap gives back free memory, so the level holds live memory only
        if self._resets:
            self._reset_peak()
            self._level = self._status("VmRSS")
        else:
            # Without a reset the peak is that of the whole life of the process, warm-up included: the same step.
            # macOS has no /proc.
            pid = str(os.getpid())
            self._level = int(subprocess.check_output(["ps", "-o", "rss=", "-p", pid], text=True)) * 1024

    def read(self) -> int:
        """Return the bytes of the peak above the level."""
        if self._resets:
            return self._status("VmHWM") - self._level
        import resource  # Windows has none

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return (peak if sys.platform == "darwin" else peak * 1024) - self._level

    @staticmethod
    def _reset_peak() -> bool:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    @staticmethod
    def _status(name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/self/status has no {name}")
