"""Measure loading a model: its time against reading its file, and its peak memory against its size."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import headstart
from bench import fresh_process
from bench.fresh_process import ALLOCATOR, memory_meter
from bench.report import RESULTS, Bar, BenchSettings, Findings, result
from headstart.console import Progress
from headstart.decoding.policy.timing import DTYPES
from headstart.errors import UsageError
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_config, load_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

TIME_BAR, MEMORY_BAR = Bar("<=", 1.3), Bar("<=", 1.2)
WAYS = ("file", "load_model", "headstart.load")


@dataclass(frozen=True)
class LoadSettings(BenchSettings):
    """Time and memory of loading a model, against reading its file."""

    model: Path | None = None
    """A model directory (None: one with random weights, by the sizes below, in a temporary folder)."""
    dim: int = 2048
    """Width of the random model; with the defaults it has 1.1 billion parameters."""
    layers: int = 20
    """Blocks of the random model."""
    vocab_size: int = 32000
    """Vocabulary of the random model."""
    stored: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of its stored weights."""
    dtypes: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    """Types to load it in."""
    repetitions: int = 5
    """Rounds; each way takes its turn in a new process, with the file in the system's memory."""
    threads: int = 1
    """CPU threads."""
    out: Path = RESULTS / "load"
    """Folder of the report."""


def run(settings: LoadSettings) -> dict[str, Any]:
    """Measure each way and return the results, see `report.result`."""
    if settings.repetitions < 1:
        raise UsageError(f"--repetitions is {settings.repetitions}; it must be at least 1")
    folder = None if settings.model else tempfile.mkdtemp(prefix="headstart-load-")
    try:
        directory = settings.model or _random_model(settings, Path(str(folder)))
        files = sorted(directory.rglob("*.safetensors"))
        if not files:
            raise UsageError(f"{directory}: holds no .safetensors file; name a model directory")
        size = sum(file.stat().st_size for file in files)
        return result("load", settings, Findings("load", _measure(settings, directory, files), _notes(size)))
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _random_model(settings: LoadSettings, folder: Path) -> Path:
    config = ModelConfig(
        vocab_size=settings.vocab_size, dim=settings.dim, layers=settings.layers, attention_heads=settings.dim // 128
    )
    torch.manual_seed(0)
    model = Transformer(config).to(DTYPES[settings.stored])
    save_model(model, folder, tokenizer=None)
    return folder


def _measure(settings: LoadSettings, directory: Path, files: list[Path]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with Progress("loads", settings.repetitions * len(settings.dtypes), unit="rounds") as bar:
        for dtype in settings.dtypes:
            found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for repetition in range(-1, settings.repetitions):
                for way in WAYS:
                    case = {"way": way, "directory": str(directory), "files": list(map(str, files)), "dtype": dtype}
                    one = fresh_process.call(load_case, case, threads=settings.threads, environment=ALLOCATOR)
                    if repetition >= 0:  # the first round brings the file into memory
                        found[way].append(one)
                bar.advance(repetition >= 0)
            parameters = load_config(directory).parameters()["total"] * DTYPES[dtype].itemsize
            rows += _rows(dtype, settings, found, parameters)
    return rows


def _rows(
    dtype: str, settings: LoadSettings, found: dict[str, list[dict[str, float]]], parameters: int
) -> list[dict[str, Any]]:
    rows = Findings(dtype)
    seconds = {way: [one["seconds"] for one in each] for way, each in found.items()}
    for way, values in seconds.items():
        rows.measure(f"{way}: time", values, "s")
    for way in WAYS[1:]:
        # Bars hold if nothing is converted: the stored type is the loaded one.
        judged = dtype == settings.stored and way == "load_model"
        time_bar, memory_bar = (TIME_BAR, MEMORY_BAR) if judged else (None, None)
        rows.ratio(f"{way} / reading the file", seconds[way], seconds["file"], time_bar)
        over = [one["peak"] / parameters for one in found[way]]
        rows.measure(f"{way}: peak memory / size of its parameters", over, bar=memory_bar)
    return rows.rows


def load_case(case: dict[str, Any]) -> dict[str, float]:
    """Return the seconds and the peak bytes of one way of loading."""
    dtype = DTYPES[case["dtype"]]
    peak = memory_meter("cpu")
    peak.reset()
    began = time.perf_counter()
    held: Any
    if case["way"] == "file":
        held = [_read(Path(file)) for file in case["files"]]
    elif case["way"] == "load_model":
        held = load_model(case["directory"], dtype=dtype)
    else:
        held = headstart.load(case["directory"], dtype=case["dtype"])
    seconds = time.perf_counter() - began
    found = {"seconds": seconds, "peak": peak.read()}
    del held
    return found


def _read(path: Path) -> torch.Tensor:
    buffer = torch.empty(
        path.stat().st_size, dtype=torch.uint8
    )  # memory like that of a model, which nothing fills first
    with path.open("rb", buffering=0) as file:
        held: Any = buffer.numpy()
        left = memoryview(held)
        while left:
            left = left[file.readinto(left) :]
    return buffer


def _notes(size: int) -> list[str]:
    return [
        f"The files have {size:,} bytes, and are in the system's memory: a disk that has to be read adds its time to "
        "every way.",
        "file: all bytes into one buffer, nothing else. load_model: the parameters in a model, checked, not packed. "
        "headstart.load: ready to decode, its products packed for this machine.",
        "Peak memory: above what the process held before, libraries included. Size: all parameters in that dtype.",
    ]
