"""How much memory does a whole training step need, beside ordinary autograd over all heads at once?"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bench import fresh_process
from bench.peak_memory import ALLOCATOR, joint_step_fits, meter
from bench.report import measurement
from bench.training_steps import Steps, from_plain, run_config
from headstart.console import say
from headstart.decoding.policy.timing import ratios
from headstart.model.config import ModelConfig
from headstart.objective.walk import joint_step
from headstart.training import step as training_step
from headstart.training.processes import joined
from headstart.training.yaml_settings import to_plain

if TYPE_CHECKING:
    from bench.train import TrainSettings

HEADS = 4
ROWS = 1


def measure_memory(settings: TrainSettings) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and notes of the part "memory"."""
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    method = ""
    for vocab_size in settings.memory_vocabularies:
        model = replace(settings.model(), vocab_size=vocab_size, heads=HEADS)
        config = to_plain(run_config(model, ROWS, **settings.run_fields()))
        peaks: dict[str, list[float]] = {}
        for step in ("walk", "joint"):
            if step == "joint" and not joint_step_fits(settings.device, HEADS, ROWS * settings.length, vocab_size):
                notes.append(f"memory: joint step at V = {vocab_size:,} left out, it would not fit into this machine.")
                continue
            answer = fresh_process.call(
                "bench.training_memory:case",
                {"config": config, "step": step, "steps": settings.steps},
                threads=settings.threads,
                environment=ALLOCATOR,
            )
            peaks[step], method = [answer["bytes"] / 2**20], answer["method"]
            rows.append(measurement("memory", f"V = {vocab_size:,}, {step}", peaks[step], "MiB", vocab_size=vocab_size))
            say(f"memory: V = {vocab_size:,}, {step}: {peaks[step][0]:,.0f} MiB")
        if "joint" in peaks:
            rows.append(
                measurement("memory", f"V = {vocab_size:,}, walk / joint", ratios(peaks["walk"], peaks["joint"]))
            )
    notes.append(
        f"memory: {method}, above the level before the model was built: weights, gradients, "
        f"AdamW's moments, activations, loss. n = {HEADS}, {ROWS} x {settings.length} tokens, {settings.dtype}. walk: "
        "one head at a time, its logits in chunks; joint: the same training step with ordinary autograd over the "
        "logits of all heads. Each case in a process of its own."
    )
    return rows, notes


def case(case: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of a training run of some steps, in bytes. Runs in a process of its own, which it changes."""
    config = from_plain(case["config"])
    if case["step"] == "joint":
        # In the real training step, so that all else stays the same.
        training_step.walk_step = _joint_step  # type: ignore[assignment]
    with joined(config.device) as processes:
        small = ModelConfig(dim=32, layers=HEADS + 1, heads=HEADS, context=32)
        Steps(replace(config, model=small), processes).seconds(2)  # the code that a first step loads is not counted
        peak = meter(config.device)
        peak.reset()
        Steps(config, processes).seconds(case["steps"] + 1)  # AdamW's moments are there from the first update on
        return {"bytes": peak.read(), "method": peak.method}


def _joint_step(model: Any, tokens: Any, targets: Any, counts: Any, weights: Any, documents: Any, *_: Any) -> Any:
    """What follows the documents says how the walk computes its loss."""
    return joint_step(model, tokens, targets, counts, weights, documents)
