"""Compiled kernels for CPUs: bf16 products, fp32 products and blocks, attention, and the choice of tokens.

Everything works without them, more slowly. The machine's C compiler makes them on first use, and they are kept in the
user's cache folder. `kernels()` and `chooser()` return None, and torch's operators take their place, if there is no
compiler or no folder to write to, if the processor lacks the instructions, or with `HEADSTART_NATIVE=0`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from headstart import hardware
from headstart.errors import UsageError
from headstart.fileio import cache_folder, replacing_file

SOURCES = {torch.bfloat16: "bf16.c", torch.float32: "fp32.c"}
STORED = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
"""The codes of fp32.c for the type of packed weights; uint8: in blocks."""
FLAGS = ("-O3", "-march=native", "-pthread", "-fPIC", "-std=gnu11")
LINK = ("-shared", "-pthread", "-lm")
"""Flags of the link step. -ffast-math is not one of them: a library linked with it makes denormal numbers zero in the
whole process."""
FAST = ("-ffast-math",)
STRICT = ("-fno-math-errno", "-ffinite-math-only", "-fno-signed-zeros", "-ffp-contract=off")
"""Flags that change no rounding."""


class Block(ctypes.Structure):
    """The weights of a transformer block, laid out as in block.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("qkv_bias", "out_bias", "attention_norm", "mlp_norm", "token_norm")),
        *((name, ctypes.c_long) for name in ("dim", "heads", "kv_heads", "width", "hidden")),
        ("stored", ctypes.c_int * 4),
        ("eps", ctypes.c_float),
    ]


class Tree(ctypes.Structure):
    """The rows of a window that is a tree, laid out as in tree.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("depth", "path")),
        *((name, ctypes.c_long) for name in ("deep", "stride", "first")),
    ]


ARGUMENTS = {
    "p": ctypes.c_void_p,
    "l": ctypes.c_long,
    "i": ctypes.c_int,
    "f": ctypes.c_float,
    "T": ctypes.POINTER(Tree),
    "B": ctypes.POINTER(Block),
    "A": ctypes.POINTER(ctypes.POINTER(Block)),
}
"""The letters of `SIGNATURES`: pointer, long, int, float, tree, block, array of blocks."""
_COMMON = {
    "rms_norm": "ppp ll f",
    "silu_times": "pp ll",
    "attend": "pppppppppppp T llllll i",
    "compact": "pp ll pp T llll",
}
SIGNATURES = {
    "bf16.c": _COMMON | {"linear": "pppp lll i"},
    "fp32.c": _COMMON
    | {
        **{"linear": "pppp lll i i", "block_rows": "ppp ll"},
        **{"block": "B pppppppppp T lll i", "blocks": "A l pppppp l p T lll i"},
    },
    "choose.c": {
        "noise": "ppp ll i",
        "choose": "ppppp llll i",
        "confidence": "pppp lll i",
        "settle": "pppppp llll",
        "settle_tree": "ppppppppp lllll",
    },
    "pool.c": {"parallel": "pp l i"},
}
"""The arguments of each function of a source file, by the letters of `ARGUMENTS`. None returns a value."""


def cpu_has_kernels(dtype: torch.dtype) -> bool:
    """Say whether the kernels for `dtype` are meant for this processor: with AMX, oneDNN's bf16 products are faster."""
    flags = hardware.processor()[1]
    if dtype == torch.float32:
        return {"avx2", "fma"} <= flags
    return dtype == torch.bfloat16 and "avx512_bf16" in flags and "amx_bf16" not in flags


@functools.cache
def kernels(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Return the compiled kernels for activations of `dtype`, or None if they are not available."""
    return _load(SOURCES[dtype], FAST) if cpu_has_kernels(dtype) else None


@functools.cache
def chooser() -> ctypes.CDLL | None:
    """Return the compiled choice of tokens (choose.c), or None if it is not available."""
    return _load("choose.c", STRICT)


@functools.cache
def loaded_kernels(*dtypes: torch.dtype) -> ctypes.CDLL:
    """Return the kernels for the first of `dtypes` that has some; the caller knows that one does."""
    return next(library for library in map(kernels, dtypes) if library is not None)


@functools.cache
def thread_pool() -> ctypes.CDLL | None:
    """Return the pool of threads that all kernels of this process share (pool.c), or None if it is not available."""
    pool = _compiled("pool.c", STRICT)
    if pool is not None:
        pool.stall_count.restype = ctypes.c_long
    return pool


def _load(source: str, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    """Return the compiled `source` with the pool's `parallel` in it, or None if it is not available."""
    library, pool = _compiled(source, flags), thread_pool()
    if library is None or pool is None:
        return None
    ctypes.c_void_p.in_dll(library, "parallel").value = ctypes.cast(pool.parallel, ctypes.c_void_p).value
    return library


def _compiled(source: str, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    compiler = None if os.environ.get("HEADSTART_NATIVE") == "0" else shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    try:
        library = ctypes.CDLL(str(_compile(compiler, Path(__file__).with_name(source), (*FLAGS, *flags))))
    except (OSError, subprocess.SubprocessError, UsageError, RuntimeError):
        return None  # no cache folder to write to, no home folder, or a compiler that fails
    _declare(library, SIGNATURES[source])
    return library


def _declare(library: ctypes.CDLL, signatures: Mapping[str, str]) -> None:
    for name, letters in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [ARGUMENTS[letter] for letter in letters.replace(" ", "")], None


def _compile(compiler: str, source: Path, flags: tuple[str, ...]) -> Path:
    key = [
        source.read_text(),
        *(header.read_text() for header in sorted(source.parent.glob("*.h"))),
        *flags,
        compiler,
        *LINK,
        _processor_lines(),
    ]
    name = hashlib.sha256("\n".join(key).encode()).hexdigest()[:20]
    path = cache_folder() / f"kernels-{name}.so"
    if not path.exists():
        with replacing_file(path) as temporary, tempfile.TemporaryDirectory() as folder:
            made = str(Path(folder) / "kernels.o")
            for command in ([*flags, "-c", str(source), "-o", made], [made, "-o", str(temporary), *LINK]):
                subprocess.run([compiler, *command], check=True, capture_output=True, timeout=120)
    return path


def _processor_lines() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags")))[:4000]


def address(x: Tensor, row: int) -> int:
    """Return the address of `x[row]`, for a fraction of the time that a tensor of the row takes to make."""
    return x.data_ptr() + (row * x.stride(0) * x.element_size() if row else 0)


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
    """Write the new keys and values into the cache, and attend from each row to all positions up to its own.

    Args:
        q_SHQE: queries in bf16 or fp32, the type of the result.
        k_SGWE: keys of the window, of the same type.
        v_SGWE: values of the window, of the same type.
        keys: (S, G, capacity / 16, E, 16) fp32, contiguous.
        values: (S, G, capacity, E) fp32, contiguous.
        at_SW: the positions of the rows, int64, consecutive in each slot, contiguous.
        row_S: the row of each slot whose queries `q_SHQE` holds, int64, with Q = 1 (None: queries of all W rows).
        tree: the rows that each row sees of its window (None: all up to it).

    Returns:
        (S, H, Q, E).
    """
    compiled = loaded_kernels(q_SHQE.dtype)
    (S, H, Q, E), (G, W) = q_SHQE.shape, k_SGWE.shape[1:3]
    y_SQHE = torch.empty((S, Q, H, E), dtype=q_SHQE.dtype)
    rows = [x if x.stride(3) == 1 else x.contiguous() for x in (q_SHQE, k_SGWE, v_SGWE)]
    compiled.attend(
        *(argument for x in rows for argument in (x.data_ptr(), (ctypes.c_long * 3)(*x.stride()[:3]))),
        y_SQHE.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        at_SW.data_ptr(),
        None if row_S is None else row_S.data_ptr(),
        None,
        tree,
        *(S, H, G, W, E, values.shape[2]),
        torch.get_num_threads(),
    )
    return y_SQHE.transpose(1, 2)


def compact(keys: Tensor, values: Tensor, start_S: Tensor, row_S: Tensor, tree: Tree) -> None:
    """Move the path to row `row_S` of each slot's window to the positions that a chain has.

    Args:
        keys: (layers, S, G, capacity / 16, E, 16) fp32, each layer contiguous.
        values: (layers, S, G, capacity, E) fp32, each layer contiguous.
        start_S: the first position of each window, int64, contiguous.
        row_S: the last row of each path, int64, contiguous.
        tree: the rows of the windows.
    """
    compiled = loaded_kernels(torch.float32, torch.bfloat16)
    layers, S, G, capacity, E = values.shape
    pointers = (keys.data_ptr(), values.data_ptr())
    compiled.compact(
        *(*pointers, layers, values.stride(0)), *(start_S.data_ptr(), row_S.data_ptr(), tree), *(S, G, E, capacity)
    )
