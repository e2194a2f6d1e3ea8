"""How near to its peak does a GPU train the paper's sizes? Written without a GPU at hand: not yet run on one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bench import fresh_process
from bench.report import Bar, measurement
from bench.training_steps import flop_ratio, measure, run_config
from headstart.console import say
from headstart.decoding.policy.timing import ratios
from headstart.model.config import ModelConfig
from headstart.model.presets import PRESETS

if TYPE_CHECKING:
    from bench.train import TrainSettings

HEADS = (1, 4)
SIZES = {name: PRESETS[name] for name in ("0.3B", "1.3B")}
UTILISATION_BAR = Bar(">=", 0.50)
FLOP_BAR = Bar("<=", 1.03)


def measure_gpu(
    settings: TrainSettings, sizes: Mapping[str, ModelConfig] = SIZES, compile: bool = True
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and notes of the part "gpu"."""
    peak, source = fresh_process.call(
        "bench.training_gpu:peak",
        {"dtype": settings.dtype, "device": settings.device},
        threads=settings.threads,
    )
    rows = []
    for size, one in sizes.items():
        speeds: dict[int, list[float]] = {}
        memory: dict[int, float] = {}
        for n in HEADS:
            model, what = replace(one, heads=n), f"{size}, n = {n}"
            config = run_config(
                model, settings.gpu_rows, compile=compile, dtype=settings.dtype, device=settings.device
            )  # fmt: skip
            # Each alone: the memory is its own, and a GPU has no neighbours to take turns for.
            answer = measure({"run": config}, settings.repetitions, settings.steps, settings.threads)
            speeds[n], memory[n] = answer["speeds"]["run"], (answer["memory"] or 0) / 2**30
            flops = model.flops_per_token(config.length)
            used = [speed * flops / peak for speed in speeds[n]]
            rows += [
                measurement("gpu", what, speeds[n], "tokens/s", size=size, heads=n),
                measurement("gpu", f"{what}: MFU", used, bar=UTILISATION_BAR, size=size, heads=n),
                measurement("gpu", f"{what}: peak memory", [memory[n]], "GiB", size=size, heads=n),
            ]
            say(f"gpu: {what}: {rows[-3]['median']:,.0f} tokens/s, MFU {rows[-2]['median']:.2f}, {memory[n]:.1f} GiB")
        first, last = HEADS
        over = [ratio / flop_ratio(replace(one, heads=last)) for ratio in ratios(speeds[first], speeds[last])]
        rows += [
            measurement("gpu", f"{size}, n = {last}: step time over its FLOP ratio", over, bar=FLOP_BAR),
            measurement("gpu", f"{size}: peak memory, n = {last} / n = {first}", [memory[last] / memory[first]]),
        ]
    notes = [
        f"gpu: {settings.dtype}, compiled, {settings.gpu_rows} rows of the whole context, each case in a process of "
        f"its own. MFU: FLOPs of a token (`ModelConfig.flops_per_token`) x tokens/s over {peak / 1e12:,.1f} TFLOP/s "
        f"({source})."
    ]
    return rows, notes


def peak(case: dict[str, Any]) -> tuple[float, str]:
    """`machine.peak_flops`, in a process of its own: this one must not hold a part of the GPU."""
    import torch

    from headstart.hardware import peak_flops

    return peak_flops(case["dtype"], case["device"], torch.get_num_threads())
