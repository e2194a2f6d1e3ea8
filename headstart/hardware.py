"""Describe the machine, and measure how fast it reads memory and multiplies matrices."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import platform
import re
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 64
"""Bytes to which torch aligns tensors: the compiled kernels read whole cache lines."""
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "bf16")
"""The instruction sets that decide the speed of matrix products."""
BFLOAT16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}
"""The instruction sets for bfloat16; the last one is ARM's."""
MAX_THREADS = 4096

# TFLOP/s of dense products from the makers' data sheets: bf16 on tensor cores (fp16 for cards without bf16), and fp32
# without tensor cores. Names match whole words, the longest first.
GPU_TERAFLOPS = {
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H200 NVL": (835, 60),
    "MI300X": (1307, 163),
    "RTX 4090": (165, 83),
    "RTX 3090": (71, 36),
    "GH200": (989, 67),
    "B200": (2250, 75),
    "H200": (989, 67),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "V100": (125, 15.7),
    "L40S": (362, 91.6),
    "A10": (125, 31),
    "L4": (121, 30),
    "T4": (65, 8.1),
}


def use_threads(threads: int | None) -> None:
    """Set how many CPU threads torch uses; None leaves torch's choice."""
    if threads is None:
        return
    if not 1 <= threads <= MAX_THREADS:
        raise UsageError(f"--threads is {threads}; it must be at least 1, and at most {MAX_THREADS}")
    import torch

    torch.set_num_threads(threads)


def describe() -> dict[str, Any]:
    """Return processor, memory, GPUs, versions, threads and load, as plain data for a report."""
    import torch

    model, flags = processor()
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
        "transformers": _package_version("transformers"),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def dtype_on(device: str, dtype: str = "auto") -> Any:
    """Return `dtype`, or for "auto" the one with the fastest matrix products on "cpu", "cuda", ...

    That is "bfloat16" or "float32". A CPU without instructions for bfloat16 computes it in software, 20 to 100 times
    slower than float32.
    """
    import torch

    if dtype != "auto":
        return dtype
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.startswith("cpu") and not BFLOAT16_INSTRUCTIONS.isdisjoint(processor()[1])
    return "bfloat16" if fast else "float32"


def cores() -> int:
    """Return the number of processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int | None:
    """Return the bytes that can be allocated without swapping, or None if the system does not report them."""
    kib = _read_field(Path("/proc/meminfo"), "MemAvailable")
    return None if kib is None else int(kib.split()[0]) * 1024


def free_memory(device: Any) -> int | None:
    """Return the bytes that can be allocated on a torch device now, or None if the system does not report them."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        # Memory that torch has reserved for later use counts as free.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return available_memory() if device.type == "cpu" else None


def resident_memory() -> int | None:
    """Return the bytes of this process that are in memory now, or None if the system does not report them."""
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_flops(dtype: str, device: str = "cpu", threads: int = 1) -> tuple[float, str]:
    """Return the FLOP/s that products in `dtype` can reach on one device, and "data sheet" or "measured".

    GPUs of `GPU_TERAFLOPS` have a data sheet; all others are measured, on a CPU with so many threads.
    """
    import torch

    if device.startswith("cuda"):
        teraflops = data_sheet(torch.cuda.get_device_name(device))
        if teraflops is not None:
            return teraflops[dtype == "float32"] * 1e12, "data sheet"
    return matmul_peak(threads, dtype, device), "measured"


def data_sheet(gpu: str) -> tuple[float, float] | None:
    """Return the entry of `GPU_TERAFLOPS` for a device name, or None for other names and for parts of a GPU (MIG)."""
    if "MIG" in gpu:
        return None
    names = sorted(GPU_TERAFLOPS, key=len, reverse=True)
    return next((GPU_TERAFLOPS[name] for name in names if re.search(rf"\b{name}\b", gpu)), None)


@cache
def matmul_peak(threads: int, dtype: str, device: str = "cpu", seconds: float = 0.3) -> float:
    """Return the FLOP/s of the best of the square products that fit into `seconds`, measured once per process.

    The best counts, because disturbances only make a product slower. A program that runs all the time still lowers it.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        n = 1024 if device == "cpu" else 8192
        x = torch.ones(n, n, dtype=getattr(torch, dtype), device=device)
        if device == "cpu":
            small = x[:128, :128].contiguous()
            once = []
            for _ in range(4):  # the first product wakes the threads
                start = time.perf_counter()
                torch.mm(small, small)
                once.append(time.perf_counter() - start)
            if min(once) * (n / 128) ** 3 > 3 * seconds:
                n, x = 128, small  # the processor computes this dtype in software
        torch.mm(x, x)[0, 0].item()  # wakes the threads; .item() waits for a GPU
        best, began = float("inf"), time.perf_counter()
        while (start := time.perf_counter()) < began + seconds or best == float("inf"):
            torch.mm(x, x)[0, 0].item()
            best = min(best, time.perf_counter() - start)
        return 2 * n**3 / best
    finally:
        torch.set_num_threads(before)


def huge_pages(x: Tensor, wanted: bool = True) -> Tensor:
    """Ask Linux to keep `x`, which is not written to yet, in pages of 2 MiB, or to keep it in small ones; return `x`.

    A processor that reads gigabytes in pages of 4 KiB also waits for their addresses. Other systems do nothing.
    """
    size = 2 << 20
    begin, end = -(-x.data_ptr() // size) * size, (x.data_ptr() + x.nbytes) // size * size
    if platform.system() == "Linux" and x.device.type == "cpu" and begin < end:
        libc, advice = ctypes.CDLL(None), mmap.MADV_HUGEPAGE if wanted else mmap.MADV_NOHUGEPAGE
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)  # a hint
    return x


def release_freed_memory() -> None:
    """Return freed memory to the system; glibc keeps tens of megabytes of it after loading a model."""
    if platform.system() == "Linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def untouched_zeros(shape: Sequence[int], dtype: Any, device: Any, huge: bool = True) -> Tensor:
    """Return a tensor of zeros, in `huge` pages if the system has them, or else from the start of a page on.

    On a CPU its pages take up memory only when they are written to, while torch.zeros writes all of them at once.
    """
    import numpy as np
    import torch

    if torch.device(device).type != "cpu":
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    alignment = ALIGNMENT if huge else mmap.PAGESIZE
    bytes_ = torch.from_numpy(np.zeros(size + alignment, dtype=np.uint8))
    begin = -bytes_.data_ptr() % alignment
    return huge_pages(bytes_[begin : begin + size].view(dtype).view(tuple(shape)), huge)


def stream_bandwidth(threads: int, *, device: str = "cpu", mebibytes: int = 512, repetitions: int = 5) -> float:
    """Return the GB/s at which `threads` torch threads read memory: the best of `repetitions` sums over a tensor.

    The fp32 tensor must be much larger than the caches. The best counts, because disturbances only slow a read down.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = huge_pages(torch.empty(mebibytes * 2**20 // 4, device=device)).fill_(1)
        best = float("inf")
        for _ in range(repetitions + 1):  # the first sum also wakes the threads
            began = time.perf_counter()
            x.sum().item()  # .item() waits for a GPU
            best = min(best, time.perf_counter() - began)
        return x.numel() * 4 / best / 1e9
    finally:
        torch.set_num_threads(before)


def summary(machine: dict[str, Any]) -> str:
    """Format the result of `describe` in one line."""
    parts = [
        f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['instruction_sets']) or 'no AVX'})",
        f"{machine['memory_gib']} GiB" if machine["memory_gib"] else "",
        *(f"{gpu['name']} ({gpu['memory_gib']} GiB)" for gpu in machine["gpus"]),
        machine["os"],
        f"Python {machine['python']}, torch {machine['torch']}",
        f"transformers {machine['transformers']}" if machine["transformers"] else "",
    ]
    return "; ".join(part for part in parts if part)


def processor() -> tuple[str, set[str]]:
    """Return the name of the processor, and its instruction sets as Linux names them."""
    file = Path("/proc/cpuinfo")
    model = _read_field(file, "model name") or platform.processor() or platform.machine()
    return model, set((_read_field(file, "flags") or _read_field(file, "Features") or "").split())  # Features on ARM


def _read_field(file: Path, name: str) -> str | None:
    """Return the value of the first line `name: value` of a file in /proc, or None without such a file or line."""
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


def _package_version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
