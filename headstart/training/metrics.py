"""What a step says of itself: the line that metrics.jsonl and the trackers get."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from headstart.hardware import resident_memory
from headstart.training.step import StepResult


def step_record(
    result: StepResult,
    *,
    step: int,
    tokens: int,
    lr: float,
    clip: float,
    tokens_per_second: float,
    seconds_at_peak: float,
    memory: int | None,
    accuracies: Sequence[float] = (),
    tokens_per_pass: float | None = None,
) -> dict[str, Any]:
    """The metrics of one optimiser step by name; a number that is not finite, or not known, is None.

    Args:
        step, tokens: done so far, this step included.
        lr, clip: learning rate and largest gradient norm of this step.
        tokens_per_second: of this step, over all processes.
        seconds_at_peak: seconds that the matrix products of one token would take on all devices together at their
            peak: `ModelConfig.flops_per_token` / peak. Times tokens_per_second it is the model FLOPs utilisation.
        memory: bytes, see `memory_in_use`.
        accuracies: top-1 of each head on this step's own tokens, head 1 first; empty where it was not counted.
        tokens_per_pass: what these accuracies promise for decoding.
    """
    record: dict[str, Any] = {"step": step, "tokens": tokens}
    record |= {f"loss/head{k}": loss for k, loss in enumerate(result.losses, start=1)}
    record |= {f"loss/{method}": loss for method, loss in result.extras.items()}
    record |= {f"top1/head{k}": share for k, share in enumerate(accuracies, start=1)}
    if tokens_per_pass is not None:
        record["expected_tokens_per_pass"] = tokens_per_pass
    record |= {
        "lr": lr,
        "grad_norm": result.gradient_norm,
        # A share over the last steps would not survive a resume; readers make it from this.
        "clipped": result.finite and result.gradient_norm > clip,
        "tokens_per_second": tokens_per_second,
        "mfu": tokens_per_second * seconds_at_peak,
        "memory_gib": None if memory is None else memory / 2**30,
    }
    return {name: None if value is None or not math.isfinite(value) else value for name, value in record.items()}


def memory_in_use(device: torch.device) -> int | None:
    """Bytes: on a GPU the most that tensors held so far, on a CPU what this process holds in memory now."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_memory()
