"""The most memory that something held: of this process, or of a GPU's allocator."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import torch

from headstart import hardware

# glibc keeps freed memory for itself, and keeps more after every large block that was freed. A fixed threshold has
# each large tensor mapped and unmapped on its own, so resident memory is what is alive.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Environment of a process whose peak is measured."""


def meter(device: str) -> CudaPeak | ProcessPeak:
    """`reset()` takes the level from which `read()` counts the peak, in bytes; `method` names it for a reader."""
    return CudaPeak() if device.startswith("cuda") else ProcessPeak()


def joint_step_fits(device: str, heads: int, positions: int, vocab_size: int) -> bool:
    """Whether a joint step should go through: about six copies of all fp32 logits are alive at its peak."""
    available = hardware.available_memory()
    if device != "cpu" or available is None:
        return True
    return 6 * 4 * heads * positions * vocab_size < available


class CudaPeak:
    method = "peak of torch's CUDA allocator"

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        self._level = torch.cuda.memory_allocated()

    def read(self) -> int:
        return torch.cuda.max_memory_allocated() - self._level


class ProcessPeak:
    """Peak resident memory of this process: what the user's machine sees."""

    def __init__(self) -> None:
        self._resets = self._reset_peak()
        self.method = "peak resident memory (VmHWM)" if self._resets else "peak resident memory (getrusage)"

    def reset(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)  # what is free in the heap goes back, so the level holds live memory only
        if self._resets:
            self._reset_peak()
            self._level = self._status("VmRSS")
        else:
            # Without a reset the peak is the highest of the whole life of the process, warm-up included: the same step.
            self._level = _resident_now()

    def read(self) -> int:
        if self._resets:
            return self._status("VmHWM") - self._level
        import resource
        import sys

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


def _resident_now() -> int:
    """Resident bytes by `ps`, where there is no /proc (macOS)."""
    import os
    import subprocess

    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())], text=True)) * 1024
