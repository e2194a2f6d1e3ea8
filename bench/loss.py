"""Measure the loss step: memory and time of the walk over the heads, by their number, and against joint autograd."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench import processes
from bench.processes import ALLOCATOR, memory_meter
from bench.report import Bar, BenchSettings, Findings, run_parts
from headstart import hardware
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.objective.inputs import StepInputs, count_targets
from headstart.objective.walk import HeadLosses, walk_step
from tests.reference import joint_step

FLAT_BAR = Bar("<=", 1.05)
JOINT_BAR = Bar("<=", 0.25)


@dataclass(frozen=True)
class Settings(BenchSettings):
    """Peak memory and time of a step of losses and gradients, each case in a process of its own."""

    heads: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of heads; all models have the same number of parameters."""
    vocab_size: int = 32000
    """Vocabulary."""
    rows: int = 4
    """Rows of the batch."""
    length: int = 512
    """Positions of a row."""
    dim: int = 256
    """Width of the model."""
    layers: int = 10
    """Blocks of the model, those of its heads included."""
    repetitions: int = 3
    """Steps measured in each process."""
    threads: int = 1
    """CPU threads."""
    device: str = "cpu"
    """cpu or cuda."""

    def config(self, heads: int, extra_layers: int) -> ModelConfig:
        """Return the model with so many heads, which has `extra_layers` more blocks than the model with one head."""
        return ModelConfig(
            vocab_size=self.vocab_size, dim=self.dim, layers=self.layers, context=self.length, heads=heads,
            extra_layers=extra_layers,
        )  # fmt: skip


def run(settings: Settings) -> dict[str, Any]:
    """Measure every number of heads and return the results, see `report.result`."""
    return run_parts("loss", settings, {"memory": memory})


def memory(settings: Settings) -> Findings:
    """Measure the walk and joint autograd for each number of heads."""
    found, method = Findings("memory"), ""
    peaks: dict[tuple[str, int], list[float]] = {}
    seconds: dict[tuple[str, int], list[float]] = {}
    first, last = min(settings.heads), max(settings.heads)
    cases = [(step, n) for n in settings.heads for step in ("walk", "joint")]
    cases += [("walk, same trunk", last)] if first < last else []
    for step, n in cases:
        if step == "joint" and not joint_step_fits(
            settings.device, n, settings.rows * settings.length, settings.vocab_size
        ):
            found.note(f"joint step at n = {n} left out, this machine's memory cannot hold it.")
            continue
        config = settings.config(n, n - 1 if "same" in step else 0)
        names = ("rows", "length", "repetitions", "device")
        case = {
            "step": step.split(",")[0],
            "config": asdict(config),
            **{name: getattr(settings, name) for name in names},
        }
        answer = processes.call(memory_case, case, threads=settings.threads, environment=ALLOCATOR)
        peaks[step, n], seconds[step, n], method = answer["mebibytes"], answer["seconds"], answer["method"]
        found.measure(f"{step}, n = {n}", peaks[step, n], "MiB")
        found.measure(f"{step}, n = {n}: a step", seconds[step, n], "s")
    if first < last:
        one, what = peaks["walk", first], f"walk n = {last} / walk n = {first}"
        found.ratio(what, peaks["walk", last], one, FLAT_BAR if (first, last) == (1, 8) else None)
        if first == 1:
            found.ratio(f"{what}, same trunk", peaks["walk, same trunk", last], one)
    for n in settings.heads:
        if n > 1 and ("joint", n) in peaks:
            found.ratio(f"walk / joint, n = {n}", peaks["walk", n], peaks["joint", n], JOINT_BAR if n == 4 else None)
            found.ratio(f"walk / joint, n = {n}: a step", seconds["walk", n], seconds["joint", n])
    found.note(
        f"{method}, fp32, {settings.rows} x {settings.length} positions, each case in a process of its own"
        f"{' with ' + ' '.join(f'`{k}={v}`' for k, v in ALLOCATOR.items()) if settings.device == 'cpu' else ''}. "
        "Counted above the level after the model was built, all gradients were allocated and one step had run: weights "
        "and gradients are the same for every n and are left out. Transformer heads are taken from the trunk, so with "
        "more heads fewer blocks' activations are alive at once; "
        '"same trunk" adds the heads on top of the trunk of n = 1 instead, so that only the number of heads differs.'
    )
    return found


def joint_step_fits(device: str, heads: int, positions: int, vocab_size: int) -> bool:
    """Return whether the memory holds a joint step: about six copies of all fp32 logits are alive at its peak."""
    available = hardware.available_memory()
    if device != "cpu" or available is None:
        return True
    return 6 * 4 * heads * positions * vocab_size < available


def memory_case(case: dict[str, Any]) -> dict[str, Any]:
    """Return the peak memory in MiB of single steps, above the level before each, and their seconds."""
    config, device = ModelConfig(**case["config"]), case["device"]
    torch.manual_seed(0)
    model = Transformer(config).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    n, T = config.heads, case["length"]
    sequences = torch.randint(config.vocab_size, (case["rows"], T + n)).to(device)
    targets = torch.stack([sequences[:, k : k + T] for k in range(1, n + 1)], -1)
    inputs, counts = StepInputs(sequences[:, :T], targets), count_targets(targets)
    step: Callable[..., HeadLosses] = walk_step if case["step"] == "walk" else joint_step
    peak = memory_meter(device)
    step(model, inputs, counts)
    values, seconds = [], []
    for _ in range(case["repetitions"]):
        peak.reset()
        began = time.perf_counter()
        step(model, inputs, counts)
        values.append(peak.read() / 2**20)
        seconds.append(time.perf_counter() - began)
    return {"mebibytes": values, "seconds": seconds, "method": peak.method}
