"""Measure the loss: the exactness of the walk over the heads, and its memory by the number of heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from bench import fresh_process
from bench.fresh_process import ALLOCATOR, joint_step_fits, memory_meter
from bench.report import Bar, BenchSettings, Findings, run_parts
from headstart.data.batches import IGNORE
from headstart.model.config import HeadKindName, ModelConfig
from headstart.model.shape import Wiring
from headstart.model.transformer import Transformer
from headstart.objective.inputs import StepInputs, count_targets
from headstart.objective.objective import Objective
from headstart.objective.walk import HeadLosses, walk_step
from tests.reference import joint_step

GRADIENT_BAR = Bar("<", 1e-12)
FLAT_BAR = Bar("<=", 1.05)
JOINT_BAR = Bar("<=", 0.25)


@dataclass(frozen=True)
class LossSettings(BenchSettings):
    """Exactness and memory of the loss step."""

    parts: tuple[Literal["gradients", "memory"], ...] = ("gradients", "memory")
    """gradients: the walk against joint autograd in float64; memory: peak of a step for each number of heads."""
    heads: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of heads of the part memory; all models have the same number of parameters."""
    vocab_size: int = 32000
    """Vocabulary of the part memory."""
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
    """CPU threads of the part memory."""
    device: str = "cpu"
    """cpu or cuda: device of the part memory."""


def run(settings: LossSettings) -> dict[str, Any]:
    """Run the chosen parts and return their results, see `report.result`."""
    parts = {"gradients": _gradients, "memory": _memory}
    return run_parts("loss", settings, {name: part for name, part in parts.items() if name in settings.parts})


def _gradients(settings: LossSettings) -> Findings:
    kinds: list[tuple[HeadKindName, Wiring]] = [
        (kind, wiring) for kind in ("transformer", "linear") for wiring in ("parallel", "causal", "anticausal")
    ]
    found = Findings("gradients")
    for kind, wiring in [*kinds, ("replicated", "parallel")]:
        for tied in (False, True):
            what = f"{kind}, {wiring}, {'tied' if tied else 'untied'}: walk against joint autograd"
            found.measure(what, [gradient_error(kind, wiring, tied)], "relative error", GRADIENT_BAR)
    found.note(
        "float64; per parameter the largest difference over the largest gradient, of the worst parameter. Four heads, "
        "ignored targets and unequal head weights included; logits in several chunks."
    )
    return found


def gradient_error(kind: HeadKindName, wiring: Wiring, tied: bool) -> float:
    """Return the largest relative difference of a parameter's gradient between walk and joint autograd, in float64."""
    config = ModelConfig(
        vocab_size=67, dim=32, layers=6, attention_heads=4, heads=4, head_kind=kind, wiring=wiring, tied=tied
    )
    torch.manual_seed(0)
    model = Transformer(config).double()
    tokens, targets = _batch(config, rows=3, length=19)
    targets[0, -5:, 1:] = IGNORE
    weights = [1.0, 0.5, 2.0, 0.25]
    counts = count_targets(targets)
    inputs = StepInputs(tokens, targets)
    walk_step(model, inputs, counts, Objective(weights, budget=1))  # the smallest chunks: 16 rows
    walked = {name: _take_gradient(parameter) for name, parameter in model.named_parameters()}
    joint_step(model, inputs, counts, Objective(weights))
    errors = []
    for name, parameter in model.named_parameters():
        joint = _take_gradient(parameter)
        errors.append(float((walked[name] - joint).abs().max() / joint.abs().max()))
    return max(errors)


def _take_gradient(parameter: torch.Tensor) -> torch.Tensor:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None
    return gradient


def _batch(config: ModelConfig, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    sequences = torch.randint(config.vocab_size, (rows, length + config.heads))
    targets = torch.stack([sequences[:, k : k + length] for k in range(1, config.heads + 1)], -1)
    return sequences[:, :length], targets


def _memory(settings: LossSettings) -> Findings:
    found = Findings("memory")
    peaks: dict[tuple[str, int], list[float]] = {}
    method = ""
    first, last = min(settings.heads), max(settings.heads)
    cases: list[tuple[str, int]] = [(step, n) for n in settings.heads for step in ("walk", "joint")]
    if first < last:
        cases.append(("walk, same trunk", last))
    for step, n in cases:
        positions = settings.rows * settings.length
        if step == "joint" and not joint_step_fits(settings.device, n, positions, settings.vocab_size):
            found.note(f"joint step at n = {n} left out, this machine's memory cannot hold it.")
            continue
        case = {
            "step": step.split(",")[0],
            "config": asdict(_config(settings, n, extra_layers=n - 1 if "same" in step else 0)),
            "rows": settings.rows,
            "length": settings.length,
            "repetitions": settings.repetitions,
            "device": settings.device,
        }
        answer = fresh_process.call(memory_case, case, threads=settings.threads, environment=ALLOCATOR)
        peaks[step, n], method = answer["mebibytes"], answer["method"]
        found.measure(f"{step}, n = {n}", peaks[step, n], "MiB")
    _compare_memory(found, settings, peaks)
    found.note(
        f"{method}, fp32, {settings.rows} x {settings.length} positions, each case in a process of its own. "
        "Counted above the level after the model was built, all gradients were allocated and one step had run: weights "
        "and gradients are the same for every n and are left out. Transformer heads are taken from the trunk, so with "
        "more heads fewer blocks' activations are alive at once; "
        '"same trunk" adds the heads on top of the trunk of n = 1 instead, so that only the number of heads differs.'
    )
    if settings.device == "cpu":
        variables = " ".join(f"`{name}={value}`" for name, value in ALLOCATOR.items())
        found.note(f"{variables} in those processes.")
    return found


def _compare_memory(found: Findings, settings: LossSettings, peaks: dict[tuple[str, int], list[float]]) -> None:
    first, last = min(settings.heads), max(settings.heads)
    if first < last:
        one, what = peaks["walk", first], f"walk n = {last} / walk n = {first}"
        found.ratio(what, peaks["walk", last], one, FLAT_BAR if (first, last) == (1, 8) else None)
        if first == 1:
            found.ratio(f"{what}, same trunk", peaks["walk, same trunk", last], one)
    for n in settings.heads:
        if n > 1 and ("joint", n) in peaks:
            found.ratio(f"walk / joint, n = {n}", peaks["walk", n], peaks["joint", n], JOINT_BAR if n == 4 else None)


def _config(settings: LossSettings, heads: int, extra_layers: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=settings.vocab_size,
        dim=settings.dim,
        layers=settings.layers,
        context=settings.length,
        heads=heads,
        extra_layers=extra_layers,
    )


def memory_case(case: dict[str, Any]) -> dict[str, Any]:
    """Return the peak memory in MiB of single steps, above the level before each."""
    config, device = ModelConfig(**case["config"]), case["device"]
    torch.manual_seed(0)
    model = Transformer(config).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens, targets = (x.to(device) for x in _batch(config, case["rows"], case["length"]))
    counts = count_targets(targets)
    step: Callable[..., HeadLosses] = walk_step if case["step"] == "walk" else joint_step
    peak = memory_meter(device)
    inputs = StepInputs(tokens, targets)
    step(model, inputs, counts)
    values = []
    for _ in range(case["repetitions"]):
        peak.reset()
        step(model, inputs, counts)
        values.append(peak.read() / 2**20)
    return {"mebibytes": values, "method": peak.method}
