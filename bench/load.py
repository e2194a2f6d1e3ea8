"""Measure loading a model: its time against reading its file, and its peak memory against its size."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

import headstart
from bench import processes
from bench.processes import ALLOCATOR, memory_meter
from bench.report import RESULTS, Bar, BenchSettings, Findings, run_parts
from headstart.decoding.policy.timing import DTYPES, interleave, random_model
from headstart.errors import UsageError
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_config, load_model
from headstart.model.config import ModelConfig

TIME_BAR, MEMORY_BAR = Bar("<=", 1.3), Bar("<=", 1.2)
WAYS = ("file", "load_model", "headstart.load")


@dataclass(frozen=True)
class Settings(BenchSettings):
    """Time and memory of loading a model, against reading its file."""

    model: Path | None = None
    """A model directory or a GGUF file (None: random weights, by the sizes below, in a temporary folder)."""
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


def run(settings: Settings) -> dict[str, Any]:
    """Measure each way and return the results, see `report.result`."""
    if settings.repetitions < 1:
        raise UsageError(f"--repetitions is {settings.repetitions}; it must be at least 1")
    with tempfile.TemporaryDirectory(prefix="headstart-load-") as folder:
        model = settings.model or random_directory(settings, Path(folder))
        files = [model] if model.is_file() else sorted(model.rglob("*.safetensors"))
        if not files:
            raise UsageError(f"{model}: holds no .safetensors file; name a model directory or a GGUF file")
        notes = [
            f"The files have {sum(file.stat().st_size for file in files):,} bytes, and are in the system's memory.",
            "file: all bytes into one buffer. load_model: the parameters in a model, checked, not packed. "
            "headstart.load: ready to decode, packed for this machine.",
            "Peak memory: above what the process held before, libraries included. Size: all parameters in that dtype.",
        ]
        parts = {dtype: partial(_measure, dtype, model, files) for dtype in settings.dtypes}
        return run_parts("load", settings, parts, notes)


def random_directory(settings: Settings, folder: Path) -> Path:
    """Write the model with random weights and return its directory."""
    config = ModelConfig(
        vocab_size=settings.vocab_size, dim=settings.dim, layers=settings.layers, attention_heads=settings.dim // 128
    )
    save_model(random_model(config, settings.stored, "cpu"), folder, tokenizer=None)
    return folder


def _measure(dtype: str, model: Path, files: list[Path], settings: Settings) -> Findings:
    """Measure each way; the first round, which brings the file into memory, does not count."""
    found, peaks = Findings(dtype), {way: list[float]() for way in WAYS}

    def take(way: str) -> float:
        case = {"way": way, "model": str(model), "files": list(map(str, files)), "dtype": dtype}
        one = processes.call(load_case, case, threads=settings.threads, environment=ALLOCATOR)
        peaks[way].append(one["peak"])
        return float(one["seconds"])

    seconds = interleave({way: partial(take, way) for way in WAYS}, settings.repetitions)
    parameters = load_config(model).parameters()["total"] * DTYPES[dtype].itemsize
    for way, values in seconds.items():
        found.measure(f"{way}: time", values, "s")
    for way in WAYS[1:]:
        # Bars hold if nothing is converted: the stored type is the loaded one.
        judged = settings.model is None and dtype == settings.stored and way == "load_model"
        time_bar, memory_bar = (TIME_BAR, MEMORY_BAR) if judged else (None, None)
        found.ratio(f"{way} / reading the file", seconds[way], seconds["file"], time_bar)
        over = [peak / parameters for peak in peaks[way][1:]]
        found.measure(f"{way}: peak memory / size of its parameters", over, bar=memory_bar)
    return found


def load_case(case: dict[str, Any]) -> dict[str, float]:
    """Return the seconds and the peak bytes of one way of loading."""
    peak = memory_meter("cpu")
    peak.reset()
    began = time.perf_counter()
    held: Any
    if case["way"] == "file":
        held = [_read(Path(file)) for file in case["files"]]
    elif case["way"] == "load_model":
        held = load_model(case["model"], dtype=DTYPES[case["dtype"]])
    else:
        held = headstart.load(case["model"], dtype=case["dtype"])
    seconds = time.perf_counter() - began
    found = {"seconds": seconds, "peak": peak.read()}
    del held
    return found


def _read(path: Path) -> torch.Tensor:
    # Memory like that of a model, which nothing fills first.
    buffer = torch.empty(path.stat().st_size, dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        held: Any = buffer.numpy()
        left = memoryview(held)
        while left:
            left = left[file.readinto(left) :]
    return buffer
