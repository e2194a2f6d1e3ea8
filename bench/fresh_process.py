"""Run a measurement in a process of its own, with its own threads and allocator settings, and read its peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from headstart import hardware
from headstart.errors import UsageError

# glibc keeps freed memory for itself, and keeps more after every large block that was freed. A fixed threshold has
# each large tensor mapped and unmapped on its own, so resident memory is what is alive.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Environment of a process whose peak memory is measured."""


def thread_environment(threads: int) -> dict[str, str]:
    """Return the variables that set the threads of a process. torch's OpenMP pool keeps the size it starts with."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def call(
    function: Callable[[dict[str, Any]], Any],
    case: Mapping[str, Any],
    *,
    threads: int,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Call `function` of a module with `case`, both as JSON, in a new Python with `threads` threads.

    The function's output goes to stderr.

    Raises:
        UsageError: the function raised it.
        RuntimeError: the function failed in any other way.
    """
    name = f"{function.__module__}:{function.__name__}"
    source = str(Path(__file__).parents[1])
    inherited = os.environ.get("PYTHONPATH")
    done = subprocess.run(
        [sys.executable, "-m", "bench.fresh_process", name, str(threads)],
        input=json.dumps(case),
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            **thread_environment(threads),
            "PYTHONPATH": source if not inherited else f"{source}{os.pathsep}{inherited}",
            **(environment or {}),
        },
    )
    if done.returncode:
        raise RuntimeError(f"{name} ended with status {done.returncode} in its own process; its output is above")
    answer = json.loads(done.stdout)
    if "usage_error" in answer:
        raise UsageError(answer["usage_error"])
    return answer["result"]


def _answer(name: str, threads: int) -> None:
    # Libraries may print: the answer has the real stdout to itself.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        torch.set_num_threads(threads)
        module, function = name.split(":")
        try:
            answer = {"result": getattr(importlib.import_module(module), function)(json.load(sys.stdin))}
        except UsageError as error:
            answer = {"usage_error": str(error)}
        json.dump(answer, out)


def joint_step_fits(device: str, heads: int, positions: int, vocab_size: int) -> bool:
    """Return whether the memory holds a joint step: about six copies of all fp32 logits are alive at its peak."""
    available = hardware.available_memory()
    if device != "cpu" or available is None:
        return True
    return 6 * 4 * heads * positions * vocab_size < available


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


if __name__ == "__main__":
    _answer(sys.argv[1], int(sys.argv[2]))
