"""Training: what does a step cost, in time and in memory, beside fewer heads, limits and a peer?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bench import report, training_compile
from bench.report import count
from bench.training_compile import measure_compile
from bench.training_gpu import measure_gpu
from bench.training_heads import measure_heads
from bench.training_memory import measure_memory
from bench.training_peer import check_installed, measure_trainer
from bench.training_processes import measure_processes
from headstart.console import say
from headstart.errors import UsageError
from headstart.hardware import dtype_on
from headstart.model.config import ModelConfig
from headstart.training.processes import pick_device

Part = Literal["bytes", "large-vocabulary", "processes", "compile", "trainer", "memory", "gpu"]
ON_CPU: tuple[Part, ...] = ("bytes", "large-vocabulary", "processes", "compile", "trainer", "memory")
ON_GPU: tuple[Part, ...] = ("bytes", "large-vocabulary", "compile", "trainer", "memory", "gpu")


@dataclass(frozen=True)
class TrainSettings:
    """The whole training step: forward, walk over the heads, clipping, AdamW."""

    parts: tuple[Part, ...] = ()
    """bytes, large-vocabulary: against fewer heads; processes: two of them; compile: torch.compile; trainer: against
    Hugging Face's Trainer; memory: against joint autograd; gpu: the paper's sizes. None named: all that the device
    has (processes only on cpu, gpu only on cuda)."""
    heads: tuple[int, ...] = (1, 2, 4, 8)
    """bytes, large-vocabulary: numbers of transformer heads, all models with the same number of parameters."""
    dim: int = 256
    """Width of the model."""
    layers: int = 10
    """Blocks, those of the heads included: at least one more than the most heads."""
    length: int = 512
    """Positions of a row."""
    rows: int = 8
    """Rows of a batch at a vocabulary of 256."""
    large_vocabulary: int = 32000
    """Vocabulary of large-vocabulary, and of one of the cases of trainer."""
    large_rows: int = 2
    """Rows of their batches."""
    compile: bool = False
    """bytes, large-vocabulary, trainer, memory: whether blocks go through torch.compile (in trainer, the peer too)."""
    compile_sizes: tuple[tuple[int, int], ...] = ((128, 6), (256, 10), (512, 12))
    """compile: width and blocks of each model."""
    memory_vocabularies: tuple[int, ...] = (256, 32000, 128000)
    """memory: vocabularies."""
    process_rounds: int = 3
    """processes: how often each case is started."""
    gpu_rows: int = 4
    """gpu: rows of a batch, of 4,096 positions each."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What matrix products run in; weights and AdamW are float32 (auto: the faster one here)."""
    repetitions: int = 5
    """Rounds; in each round every variant takes its turn."""
    steps: int = 3
    """Steps of one turn."""
    threads: int = 2
    """CPU threads (processes has its own numbers of them)."""
    device: str = "cpu"
    """cpu or cuda."""
    out: Path = report.RESULTS
    """Folder of the report."""
    date: str | None = None
    """Date of the report (None: today)."""

    def model(self) -> ModelConfig:
        """One head, V = 256; parts change what they vary."""
        return ModelConfig(dim=self.dim, layers=self.layers, context=self.length)

    def run_fields(self) -> dict[str, Any]:
        """What a RunConfig takes from here."""
        return {"dtype": self.dtype, "device": self.device, "compile": self.compile}


def run(settings: TrainSettings) -> dict[str, Any]:
    """Runs the parts asked for; see `report.result` for the shape of what comes back."""
    here = ON_GPU if settings.device.startswith("cuda") else ON_CPU
    settings = replace(settings, parts=settings.parts or here, dtype=dtype_on(settings.device, settings.dtype))
    for part in settings.parts:
        if part not in here:
            other = "cpu" if part == "processes" else "cuda"
            raise UsageError(
                f"the part {part} does not run on {settings.device}; give --device {other}, or leave it out"
            )
    _check(settings)
    notes = [
        f"Each step is `headstart train`'s own, weights float32, {count(settings.threads, 'thread')} unless said, "
        f"{settings.device}{', blocks compiled' if settings.compile else ''}."
    ]
    measurements: list[dict[str, Any]] = []
    for part in settings.parts:
        say(f"{part} ...")
        rows, more = _measure(part, settings)
        measurements += rows
        notes += more
    return report.result("train", settings, measurements, notes)


def _check(settings: TrainSettings) -> None:
    """Raises UsageError for what a later part would fail at, after minutes of measuring."""
    for name in ("rows", "large_rows", "gpu_rows", "process_rounds", "repetitions", "steps", "threads"):
        if getattr(settings, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(settings, name)}; it must be at least 1")
    if not (settings.heads and settings.compile_sizes and settings.memory_vocabularies):
        raise UsageError("--heads, --compile-sizes or --memory-vocabularies is empty; give a number, or leave it out")
    for vocab_size in (settings.large_vocabulary, *settings.memory_vocabularies):
        replace(settings.model(), vocab_size=vocab_size)
    for heads in (*settings.heads, training_compile.HEADS):
        replace(settings.model(), heads=heads)
    for dim, layers in settings.compile_sizes:
        replace(settings.model(), dim=dim, layers=layers, heads=training_compile.HEADS)
    pick_device(settings.device)
    if "trainer" in settings.parts:
        check_installed()


def _measure(part: Part, settings: TrainSettings) -> tuple[list[dict[str, Any]], list[str]]:
    if part == "processes":
        return measure_processes(settings)
    if part == "compile":
        return measure_compile(settings)
    if part == "trainer":
        return measure_trainer(settings)
    if part == "memory":
        return measure_memory(settings)
    if part == "gpu":
        return measure_gpu(settings)
    return measure_heads(settings, part)
