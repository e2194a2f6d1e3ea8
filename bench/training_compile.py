"""For which sizes does torch.compile pay, and what does compiling cost?"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bench.report import measurement
from bench.training_steps import measure, run_config
from headstart.console import say
from headstart.decoding.policy.timing import ratios

if TYPE_CHECKING:
    from bench.train import TrainSettings

HEADS = 4


def measure_compile(settings: TrainSettings) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and notes of the part "compile"."""
    rows, better = [], []
    for dim, layers in settings.compile_sizes:
        size = f"{dim} x {layers}"
        config = run_config(replace(settings.model(), dim=dim, layers=layers, heads=HEADS), settings.rows)
        configs = {
            name: replace(config, compile=name == "compiled", dtype=settings.dtype, device=settings.device)
            for name in ("eager", "compiled")
        }
        # One turn of warm-up: the two first steps, timed apart, are warm-up too.
        answer = measure(
            configs, settings.repetitions, settings.steps, settings.threads, warmup=1,
            # What an earlier run compiled lies in a cache on disk.
            environment={"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
        )  # fmt: skip
        speeds, first = answer["speeds"], answer["first_seconds"]
        for name in configs:
            rows.append(measurement("compile", f"{size}, {name}", speeds[name], "tokens/s", dim=dim, layers=layers))
        gain = measurement("compile", f"{size}: compiled / eager", ratios(speeds["compiled"], speeds["eager"]))
        seconds = first["compiled"] - 2 * config.tokens_per_step / statistics.median(speeds["compiled"])
        rows += [gain, measurement("compile", f"{size}: compiling took", [seconds], "s", dim=dim, layers=layers)]
        better.append(f"{size}: {'compiled' if gain['median'] > 1 else 'eager'}")
        say(f"compile: {size}: {gain['median']:.2f} of eager, compiling took {seconds:.0f} s")
    notes = [
        f"compile: V = 256, n = {HEADS}, batches of {settings.rows} x {settings.length}; each block through "
        "torch.compile, nothing in its cache. Faster steps, once compiled: " + "; ".join(better) + "."
    ]
    return rows, notes
