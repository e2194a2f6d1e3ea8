"""Compiled kernels for CPUs: bf16 where there is AVX-512 BF16 and no AMX, fp32 where there are AVX2 and FMA; and the
choosing of tokens, for all.

Everything works without them, slower. They are compiled once, on first use, by the C compiler of the machine, and kept
in the user's cache folder. Where there is no compiler, no folder to write to, another processor, or
`HEADSTART_NATIVE=0`, `kernels()` and `chooser()` are None, and torch's operators take their place.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from headstart.errors import UsageError
from headstart.fileio import cache_folder, replacing_file

SOURCES = {torch.bfloat16: "bf16.c", torch.float32: "fp32.c"}
STORED = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""How fp32.c tells what packed weights are made of."""
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-std=gnu11")
LINK = ("-shared", "-fopenmp")
"""Without -ffast-math: linked with it, a library makes denormal numbers zero in all of the process."""
FAST = ("-ffast-math",)
STRICT = ("-fno-math-errno", "-ffinite-math-only", "-fno-signed-zeros", "-ffp-contract=off")
"""Nothing that changes a rounding."""


def wanted(dtype: torch.dtype) -> bool:
    """Whether this processor is one the kernels are for: with AMX, oneDNN's products of bf16 are better."""
    try:
        flags = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")
        ).split()
    except (OSError, StopIteration):
        return False
    if dtype == torch.float32:
        return "avx2" in flags and "fma" in flags
    return dtype == torch.bfloat16 and "avx512_bf16" in flags and "amx_bf16" not in flags


@functools.cache
def kernels(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled kernels for activations of this type, or None where they cannot be had."""
    library = _library(SOURCES[dtype], FAST) if wanted(dtype) else None
    return None if library is None else _declared(library, dtype)


@functools.cache
def chooser() -> ctypes.CDLL | None:
    """The compiled choosing of tokens (choose.c), or None where it cannot be had."""
    library = _library("choose.c", STRICT)
    if library is not None:
        pointer, long = ctypes.c_void_p, ctypes.c_long
        library.noise.argtypes = [pointer, pointer, pointer, long, long, ctypes.c_int]
        library.choose.argtypes = [pointer] * 5 + [long] * 3
        library.confidence.argtypes = [pointer] * 4 + [long] * 3
        library.settle.argtypes = [pointer] * 6 + [long] * 4
        library.settle_tree.argtypes = [pointer] * 9 + [long] * 4
        for function in (library.noise, library.choose, library.confidence, library.settle, library.settle_tree):
            function.restype = None
    return library


def _library(source: str, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    if os.environ.get("HEADSTART_NATIVE") == "0":
        return None
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler, Path(__file__).with_name(source), (*FLAGS, *flags))))
    except (OSError, subprocess.SubprocessError, UsageError, RuntimeError):
        return None  # no cache folder that can be written, no home, or a compiler that cannot: decoding works without


def _compiled(compiler: str, source: Path, flags: tuple[str, ...]) -> Path:
    # torch brings its own OpenMP: a second one beside it would keep a second team of threads.
    runtime = next(iter(sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))), None)
    link = [*LINK, *([str(runtime), f"-Wl,-rpath,{runtime.parent}"] if runtime else []), "-lm"]
    key = [
        source.read_text(),
        *(header.read_text() for header in sorted(source.parent.glob("*.h"))),
        *flags,
        compiler,
        torch.__version__,
        *link,
        _processor(),
    ]
    name = hashlib.sha256("\n".join(key).encode()).hexdigest()[:20]
    cache = cache_folder()
    path = cache / f"kernels-{name}.so"
    if not path.exists():
        with replacing_file(path) as temporary, tempfile.TemporaryDirectory() as folder:
            made = str(Path(folder) / "kernels.o")
            for command in ([*flags, "-c", str(source), "-o", made], [made, "-o", str(temporary), *link]):
                subprocess.run([compiler, *command], check=True, capture_output=True, timeout=120)
    return path


class Block(ctypes.Structure):
    """The weights of a transformer block, as block.h has them."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("qkv_bias", "out_bias", "attention_norm", "mlp_norm")),
        *((name, ctypes.c_long) for name in ("dim", "heads", "kv_heads", "width", "hidden")),
        ("stored", ctypes.c_int * 4),
        ("eps", ctypes.c_float),
    ]


class Tree(ctypes.Structure):
    """The rows of a window that is a tree, as tree.h has them."""

    _fields_ = [("depth", ctypes.c_void_p), ("path", ctypes.c_void_p), ("deep", ctypes.c_long)]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags")))[:4000]


def _declared(kernels: ctypes.CDLL, dtype: torch.dtype) -> ctypes.CDLL:
    pointer, long, tree = ctypes.c_void_p, ctypes.c_long, ctypes.POINTER(Tree)
    kernels.linear.argtypes = [pointer, pointer, pointer, pointer, long, long, long, ctypes.c_int]
    if dtype == torch.float32:
        kernels.linear.argtypes = [*kernels.linear.argtypes, ctypes.c_int]
        kernels.block.argtypes = [ctypes.POINTER(Block), *[pointer] * 8, tree, long, long, long, ctypes.c_int]
        kernels.block.restype = None
        addresses = ctypes.POINTER(ctypes.POINTER(Block))
        kernels.blocks.argtypes = [
            *(addresses, long),
            *[pointer] * 6,
            *(long, pointer, tree),
            *(long, long, long),
            ctypes.c_int,
        ]
        kernels.blocks.restype = None
    kernels.rms_norm.argtypes = [pointer, pointer, pointer, long, long, ctypes.c_float]
    kernels.silu_times.argtypes = [pointer, pointer, long, long]
    kernels.attend.argtypes = [pointer] * 11 + [tree] + [long] * 6 + [ctypes.c_int]
    kernels.compact.argtypes = [*[pointer] * 2, long, long, *[pointer] * 2, tree, *[long] * 4]
    for function in (kernels.linear, kernels.rms_norm, kernels.silu_times, kernels.attend, kernels.compact):
        function.restype = None
    return kernels


def attend(
    q_SHQE: Tensor,
    k_SGWE: Tensor,
    v_SGWE: Tensor,
    keys: Tensor,
    values: Tensor,
    at_SW: Tensor,
    row_S: Tensor | None = None,
    tree: Tree | None = None,
) -> Tensor:
    """Keeps the new keys and values, and attends: (S, H, Q, E), each row to all up to its place.

    Args:
        q, k, v: bf16 or fp32, the type of the result.
        keys: (S, G, capacity / 16, E, 16) fp32, contiguous. values: (S, G, capacity, E) fp32, contiguous.
        at_SW: the rows' places, int64, consecutive in each slot, contiguous.
        row_S: int64: of which row `q` is, with Q = 1 (None: of all W).
        tree: what each row sees of the window, if not all up to it.
    """
    compiled = kernels(q_SHQE.dtype)
    assert compiled is not None
    (S, H, Q, E), (G, W) = q_SHQE.shape, k_SGWE.shape[1:3]
    y_SQHE = torch.empty((S, Q, H, E), dtype=q_SHQE.dtype)
    rows: list[object] = []
    for x in (q_SHQE, k_SGWE, v_SGWE):
        x = x if x.stride(3) == 1 else x.contiguous()
        rows += [x, (ctypes.c_long * 3)(*x.stride()[:3])]
    q, q_stride, k, k_stride, v, v_stride = rows
    compiled.attend(
        q.data_ptr(),  # type: ignore[attr-defined]
        q_stride,
        k.data_ptr(),  # type: ignore[attr-defined]
        k_stride,
        v.data_ptr(),  # type: ignore[attr-defined]
        v_stride,
        y_SQHE.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        at_SW.data_ptr(),
        None if row_S is None else row_S.data_ptr(),
        tree,
        *(S, H, G, W, E, values.shape[2]),
        torch.get_num_threads(),
    )
    return y_SQHE.transpose(1, 2)


def compact(keys: Tensor, values: Tensor, start_S: Tensor, row_S: Tensor, tree: Tree) -> None:
    """Moves the path to `row_S` of each slot's window to where a chain has it.

    Args:
        keys: (layers, S, G, capacity / 16, E, 16) fp32, a layer contiguous. values: (layers, S, G, capacity, E) fp32.
        start_S, row_S: int64, contiguous.
    """
    compiled = kernels(torch.float32) or kernels(torch.bfloat16)
    assert compiled is not None
    layers, S, G, capacity, E = values.shape
    pointers = (keys.data_ptr(), values.data_ptr())
    compiled.compact(
        *(*pointers, layers, values.stride(0)), *(start_S.data_ptr(), row_S.data_ptr(), tree), *(S, G, E, capacity)
    )
