"""Estimate of the memory and time of a run, for `--dry-run`. It starts nothing, and reads and writes no data."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import Any, Literal

import torch

from headstart import hardware
from headstart.console import duration, format_table
from headstart.errors import UsageError
from headstart.formats.registry import load_config as model_config
from headstart.formats.registry import load_dtype
from headstart.training.adapt.run import check_frozen_dtype, check_processes, check_shape, flops_per_token
from headstart.training.adapted_memory import estimate_adapt
from headstart.training.config import RunConfig
from headstart.training.memory import Estimate, Layout, estimate, layout

SPARE = {"cpu": 0.5, "gpu": 0.1}
"""Spare memory that a device should have, as a fraction of the estimate: on a GPU for torch itself, communication, and
memory that its allocator cannot reuse; on a CPU the resident set was measured at 1.3 times the estimate
(docs/scale-out.md)."""
GPUS = ("A100", "H100", "B200")
"""GPUs whose hours are estimated; their speeds are `hardware.GPU_TERAFLOPS`."""
UNITS = {"": 1, "B": 1} | {
    f"{letter}{kind}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for kind, base in (("B", 1000), ("iB", 1024))
}


def estimate_run(
    config: RunConfig, name: str, processes: int = 1, device_memory: str | None = None, mfu: float = 0.4
) -> dict[str, Any]:
    """Return the estimate of a run, which the result calls `name`, as plain data.

    Without several `processes` or `device_memory`, such as 80GiB, a run that would take the CPU is estimated for the
    CPU; every other for GPUs. Hours assume a model FLOPs utilization of `mfu`. Raises UsageError for settings out of
    range, and for anything that would keep the run from starting. Data is not looked for.
    """
    if not 0 < mfu <= 1:
        raise UsageError(f"--mfu is {mfu}; it must be above 0 and at most 1")
    memory = None if device_memory is None else parse_bytes(device_memory)
    if config.adapt is not None:
        check_processes(config, processes)
    spread = layout(config, processes)
    on_cpu = config.device == "cpu" or not (torch.cuda.is_available() or memory or processes > 1)
    if memory is None:
        memory = _memory_here(on_cpu, processes)
    device: Literal["cpu", "gpu"] = "cpu" if on_cpu else "gpu"
    config = config.on("cpu") if on_cpu or config.dtype != "auto" else replace(config, dtype="bfloat16")
    needed, flops = _needs(config, spread, device)
    total_flops = flops * config.tokens_per_step * config.steps
    return {
        "config": name,
        "device": device,
        "parameters": config.model.parameters()["total"],
        "heads": config.model.heads,
        "head_kind": config.model.head_kind,
        "wiring": config.model.wiring,
        **asdict(spread),
        "rows_per_step": config.batch.rows * config.batch.accumulate,
        "length": config.length,
        "steps": config.steps,
        "tokens_per_step": config.tokens_per_step,
        "tokens": config.tokens_per_step * config.steps,
        "flops_per_token": flops,
        "flops": total_flops,
        "mfu": mfu,
        "hours": _hours_here(config, total_flops) if on_cpu else _hours_on_gpus(config, total_flops, mfu, processes),
        "moments": needed.moments,
        "peak_moment": needed.peak_moment,
        "peak_bytes": needed.peak,
        "device_bytes": memory,
        "fits": None if memory is None else needed.peak * (1 + SPARE[device]) <= memory,
    }


def _needs(config: RunConfig, spread: Layout, device: Literal["cpu", "gpu"]) -> tuple[Estimate, int]:
    """Return the memory of a run, and its FLOPs per token."""
    if config.adapt is None:
        return estimate(config, spread, device), config.model.flops_per_token(config.length)
    check_shape(model_config(config.adapt.model), config)
    check_frozen_dtype(config, load_dtype(config.adapt.model))
    return estimate_adapt(config, spread, device), flops_per_token(config)


def _hours_on_gpus(config: RunConfig, flops: int, mfu: float, processes: int) -> dict[str, float]:
    """Return the hours of a run on each GPU of `GPUS`."""
    full = config.dtype == "float32"
    return {gpu: flops / (hardware.GPU_TERAFLOPS[gpu][full] * 1e12 * mfu * processes) / 3600 for gpu in GPUS}


def _hours_here(config: RunConfig, flops: int) -> dict[str, float]:
    """Return the hours of a run on an existing model on this CPU, at the speed measured for large products."""
    if config.adapt is None:
        return {}
    speed, _ = hardware.peak_flops(config.dtype, "cpu", config.threads or torch.get_num_threads())
    return {"this CPU": flops / speed / 3600}


def format_dry_run(found: dict[str, Any]) -> str:
    """`dry_run`'s result for people."""
    held = found["moments"][found["peak_moment"]]
    shared = f", {found['sharers']} share one copy of the weights" if found["sharers"] > 1 else ""
    unit, size = ("GiB", 2**30) if found["peak_bytes"] >= 2**30 else ("MiB", 2**20)
    rows = [[name, f"{held[name] / size:,.2f}"] for name in sorted(held, key=lambda name: -held[name])]
    lines = [
        f"{found['config']}: {found['parameters']:,} parameters, "
        f"{_counted(found['heads'], found['head_kind'] + ' head')}, {found['wiring']}",
        f"{found['steps']:,} steps of {found['tokens_per_step']:,} tokens ({found['rows_per_step']:,} rows of "
        f"{found['length']:,}): {found['tokens']:,} tokens in all",
        f"{_counted(found['processes'], 'process', 'processes')}{shared}; a step is "
        f"{_counted(found['micro_batches'], 'micro-batch', 'micro-batches')} of "
        f"{_counted(found['rows'], 'row')} for each",
        "",
        f"estimated memory of one process on a {found['device'].upper()}, at its peak in {found['peak_moment']}:",
        "",
        format_table(["", unit], [*rows, ["all", f"{found['peak_bytes'] / size:,.2f}"]]),
        "",
        _verdict(found),
        f"{found['flops']:.3g} FLOP" + _hours(found),
    ]
    if found.get("cache_states_gib"):
        lines.append(f"hidden states on disk: at most {found['cache_states_gib']:g} GiB (--cache-gib)")
    return "\n".join(lines)


def _verdict(found: dict[str, Any]) -> str:
    if found["device_bytes"] is None:
        return "give --device-memory, such as 80GiB, to see whether that fits"
    left = (found["device_bytes"] - found["peak_bytes"]) / 2**30
    device = f"{found['device_bytes'] / 2**30:,.2f} GiB"
    if found["fits"]:
        return f"fits in {device}, {left:,.2f} GiB to spare"
    if left >= 0:
        spare = SPARE[found["device"]]
        return (
            f"tight in {device}: {left:,.2f} GiB to spare, of the {spare:.0%} that an estimate needs. {advise(found)}"
        )
    return f"does not fit in {device}: {-left:,.2f} GiB too much. {advise(found)}"


def advise(found: dict[str, Any]) -> str:
    """Return the setting that makes the largest part smaller."""
    held = found["moments"][found["peak_moment"]]
    largest = max(held, key=lambda name: held[name])
    if "before they are shared out" in largest:
        return "Set parallel.reduce_each_micro_batch to true"
    if "activations" in largest and not found["activation_checkpointing"]:
        return "Set parallel.activation_checkpointing to true, or halve batch.rows and double batch.accumulate"
    if "activations" in largest:
        return "Halve batch.rows and double batch.accumulate"
    return "Share the weights among more processes (--processes)"


def _hours(found: dict[str, Any]) -> str:
    if not found["hours"]:
        return ""
    if "this CPU" in found["hours"]:
        return f"; on this CPU {_time(found['hours']['this CPU'])} at the speed of large products measured now"
    hours = ", ".join(f"{gpu} {_time(value)}" for gpu, value in found["hours"].items())
    return f"; at {found['mfu']:.0%} of the peak of {_counted(found['processes'], 'GPU')}: {hours}"


def parse_bytes(text: str) -> int:
    """80GiB, 80 GB, 1e9 -> bytes. Raises UsageError for an unknown unit, or no number."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    try:
        if found is None or found[2].lower() not in units:
            raise ValueError
        size = int(float(found[1]) * units[found[2].lower()])
    except ValueError:
        raise UsageError(f"--device-memory {text!r} is no size; write it as 80GiB, or in MiB, GB, MB") from None
    if size < 1:
        raise UsageError(f"--device-memory is {text}; it must be above 0")
    return size


def _memory_here(on_cpu: bool, processes: int) -> int | None:
    """Return the memory of the GPU here, or the memory available to one process on this CPU."""
    if not on_cpu:
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    return hardware.available_memory() if processes == 1 else None


def _counted(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _time(hours: float) -> str:
    return duration(hours * 3600) if hours < 48 else f"{hours / 24:,.1f} days"
