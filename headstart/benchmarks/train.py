"""Training: how much slower is a step with more heads, at the same number of parameters?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from headstart.benchmarks import fresh_process, report
from headstart.benchmarks.measure import interleave, ratios
from headstart.benchmarks.report import Bar, count, measurement
from headstart.model.config import ModelConfig
from headstart.model.layers import Block
from headstart.model.transformer import Transformer
from headstart.objective.step import count_targets, walk_step
from headstart.terminal import say

SPEED_BAR = Bar(">=", 0.95)


@dataclass(frozen=True)
class TrainSettings:
    """Tokens per second of the whole training step: forward, walk over the heads, clipping, AdamW."""

    parts: tuple[Literal["bytes", "large-vocabulary"], ...] = ("bytes", "large-vocabulary")
    """bytes: vocabulary 256, has a bar; large-vocabulary: beside what the products of the unembedding predict."""
    modes: tuple[Literal["eager", "compiled"], ...] = ("eager",)
    """compiled: each block through torch.compile."""
    heads: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of transformer heads, all models with the same number of parameters."""
    dim: int = 256
    """Width of the model."""
    layers: int = 10
    """Blocks, those of the heads included: at least one more than the most heads."""
    length: int = 512
    """Positions of a row."""
    rows: int = 8
    """Rows of a batch of the bytes part."""
    large_vocabulary: int = 32000
    """Vocabulary of the other part."""
    large_rows: int = 2
    """Rows of its batch."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What matrix products run in; weights and AdamW are float32."""
    repetitions: int = 5
    """Rounds; in each round every model takes its turn."""
    steps: int = 3
    """Steps of one turn."""
    threads: int = 2
    """CPU threads."""
    device: str = "cpu"
    """cpu or cuda."""
    out: Path = report.RESULTS
    """Folder of the report."""
    date: str | None = None
    """Date of the report (None: today)."""


def run(settings: TrainSettings) -> dict[str, Any]:
    """Runs the parts asked for; see `report.result` for the shape of what comes back."""
    measurements: list[dict[str, Any]] = []
    for part in settings.parts:
        large = part == "large-vocabulary"
        vocab_size, rows = (settings.large_vocabulary, settings.large_rows) if large else (256, settings.rows)
        for mode in settings.modes:
            configs = [
                ModelConfig(
                    vocab_size=vocab_size,
                    dim=settings.dim,
                    layers=settings.layers,
                    context=settings.length,
                    heads=n,
                )
                for n in settings.heads
            ]
            case = {
                "configs": [config.__dict__ for config in configs],
                "compiled": mode == "compiled",
                "rows": rows,
                "dtype": settings.dtype,
                "repetitions": settings.repetitions,
                "steps": settings.steps,
                "device": settings.device,
            }
            speeds = fresh_process.call("headstart.benchmarks.train:case", case, threads=settings.threads)
            for config in configs:
                n, values = config.heads, speeds[str(config.heads)]
                what = f"V = {vocab_size:,}, {mode}, n = {n}"
                measurements.append(measurement(part, what, values, "tokens/s", heads=n, mode=mode))
                say(f"{part}: {what}: {measurements[-1]['median']:,.0f} tokens/s")
            if 1 not in settings.heads:
                continue
            for config in configs:
                n = config.heads
                if n == 1:
                    continue
                predicted = predicted_speed(config)
                what = f"V = {vocab_size:,}, {mode}, n = {n} / n = 1 (by products alone: {predicted:.2f})"
                bar = SPEED_BAR if n == 4 and not large else None
                values = ratios(speeds[str(n)], speeds["1"])
                measurements.append(measurement(part, what, values, bar=bar, heads=n, mode=mode, predicted=predicted))
    notes = [
        f"{settings.dtype} autocast over float32 weights, {count(settings.threads, 'thread')}, {settings.device}; "
        f"transformer heads, parallel, taken from the trunk, so every model has the same number of parameters. Batches "
        "of "
        f"{settings.rows} x {settings.length} (V = 256) and {settings.large_rows} x {settings.length} "
        f"(V = {settings.large_vocabulary:,}).",
        "Prediction: products per token 12 L d^2 + V d + 2 T d L, and (n-1) V d more for n heads; the paper's Table "
        "S5 follows "
        "it up to 3B parameters (reference/paper.md section 5). No bar at the large vocabulary.",
    ]
    return report.result("train", settings, measurements, notes)


def predicted_speed(config: ModelConfig) -> float:
    """Tokens per second relative to one head, if multiply-accumulates were all that costs (Table S5 explained)."""
    L, d, V, T = config.layers, config.dim, config.vocab_size, config.context
    one = 12 * L * d * d + V * d + 2 * T * d * L
    return one / (one + (config.heads - 1) * V * d)


def case(case: dict[str, Any]) -> dict[str, list[float]]:
    """Tokens per second of each configuration, by its number of heads. Runs in a process of its own."""
    variants = {}
    for fields in case["configs"]:
        config = ModelConfig(**fields)
        variants[str(config.heads)] = _trainer(config, case)
    # Two rounds of warm-up: the first compiles and allocates, the second has AdamW's moments in place.
    return interleave(variants, case["repetitions"], warmup=2)


def _trainer(config: ModelConfig, case: dict[str, Any]) -> Callable[[], float]:
    device, rows, steps = case["device"], case["rows"], case["steps"]
    torch.manual_seed(0)
    model = Transformer(config).to(device)
    if case["compiled"]:
        for module in model.modules():
            if isinstance(module, Block):
                module.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    text = torch.randint(config.vocab_size, (rows, config.context + config.heads), device=device)
    tokens = text[:, : config.context]
    targets = torch.stack([text[:, k : k + config.context] for k in range(1, config.heads + 1)], -1)

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=case["dtype"] == "bfloat16"):
            walk_step(model, tokens, targets, count_targets(targets))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()  # the value is waited for, as in training
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def measure() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return steps * rows * config.context / (time.perf_counter() - began)

    return measure
