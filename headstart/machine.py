"""The machine under a measurement: what it is, and how fast it reads memory."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

# Those that decide how fast matrix products are: bf16 is the fast path only where one of the last two is there.
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def describe() -> dict[str, Any]:
    """Processor, memory, GPUs, versions, threads and load, as plain data for a report."""
    import torch

    model, flags = _processor()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": model,
        "cores": cores(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "memory_gib": _gib(_memory_bytes()),
        "gpus": [{"name": gpu.name, "memory_gib": _gib(gpu.total_memory)} for gpu in gpus],
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def cores() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping; None where the system does not tell."""
    kib = _field(Path("/proc/meminfo"), "MemAvailable")
    return None if kib is None else int(kib.split()[0]) * 1024


def stream_bandwidth(threads: int, *, device: str = "cpu", mebibytes: int = 512, repetitions: int = 5) -> float:
    """GB/s at which `threads` torch threads read memory: the best of `repetitions` sums over an fp32 tensor.

    The tensor must be much larger than the caches; the best, because whatever disturbs a read only makes it slower.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.ones(mebibytes * 2**20 // 4, device=device)
        best = float("inf")
        for _ in range(repetitions + 1):  # the first one also wakes the threads
            began = time.perf_counter()
            x.sum().item()  # .item() waits for a GPU
            best = min(best, time.perf_counter() - began)
        return x.numel() * 4 / best / 1e9
    finally:
        torch.set_num_threads(before)


def summary(machine: dict[str, Any]) -> str:
    """`describe()` in one line."""
    parts = [
        f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['instruction_sets']) or 'no AVX'})",
        f"{machine['memory_gib']} GiB" if machine["memory_gib"] else "",
        *(f"{gpu['name']} ({gpu['memory_gib']} GiB)" for gpu in machine["gpus"]),
        machine["os"],
        f"Python {machine['python']}, torch {machine['torch']}",
        f"transformers {machine['transformers']}" if machine["transformers"] else "",
    ]
    return "; ".join(part for part in parts if part)


def _processor() -> tuple[str, set[str]]:
    file = Path("/proc/cpuinfo")
    model = _field(file, "model name") or platform.processor() or platform.machine()
    return model, set((_field(file, "flags") or "").split())


def _field(file: Path, name: str) -> str | None:
    """The value of the first line `name: value` of a file in /proc; None where there is no such file or line."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _gib(count: int | None) -> float | None:
    return None if count is None else round(count / 2**30, 1)


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
