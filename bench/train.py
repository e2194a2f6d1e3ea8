"""Measure training: the time and memory of a step of `headstart train`, against fewer heads, limits and a peer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from bench import processes
from bench.peers.with_trainer import TRAINER, check_installed, trainer_case
from bench.report import Bar, BenchSettings, Findings, count, run_parts
from headstart.data.batches import Batch, targets_of
from headstart.decoding.policy.timing import interleave, ratios
from headstart.errors import UsageError
from headstart.hardware import dtype_on, peak_flops
from headstart.model.config import ModelConfig
from headstart.objective.walk import walk_step
from headstart.settings_loader import load_settings
from headstart.training.config import BatchConfig, RunConfig
from headstart.training.new_model import NewModel
from headstart.training.processes import Processes, joined, pick_device
from headstart.training.step import Learner, StepResult, Walk
from headstart.training.yaml_settings import to_plain

SPEED_BAR = Bar(">=", 0.95)
FLOP_BAR = Bar("<=", 1.05)
UTILISATION_BAR = Bar(">=", 0.50)
TRAINER_BAR = Bar(">=", 1.2)

Part = Literal["bytes", "large-vocabulary", "trainer"]


@dataclass(frozen=True)
class Settings(BenchSettings):
    """The whole training step: forward, walk over the heads, clipping, AdamW."""

    parts: tuple[Part, ...] = ("bytes", "large-vocabulary", "trainer")
    """bytes, large-vocabulary: against fewer heads, and on a GPU the share of its peak (MFU); trainer: against Hugging
    Face's Trainer."""
    heads: tuple[int, ...] = (1, 2, 4, 8)
    """bytes, large-vocabulary: numbers of transformer heads; all models have the same number of parameters."""
    dim: int = 256
    """Width of the model."""
    layers: int = 10
    """Blocks, those of the heads included: at least one more than the most heads."""
    length: int = 512
    """Positions of a row."""
    rows: int = 8
    """Rows of a batch at a vocabulary of 256."""
    large_vocabulary: int = 32000
    """Vocabulary of large-vocabulary, and of one case of trainer."""
    large_rows: int = 2
    """Rows of a batch at that vocabulary."""
    compile: bool = False
    """Compile the blocks with torch.compile (in trainer, the peer too, which else takes turns with both of ours)."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of matrix products; weights and AdamW are float32 (auto: the faster one here)."""
    repetitions: int = 5
    """Rounds, in each of which every variant takes its turn."""
    steps: int = 3
    """Steps of one turn."""
    threads: int = 2
    """CPU threads."""
    device: str = "cpu"
    """cpu or cuda."""

    def model(self, **changes: Any) -> ModelConfig:
        """Return the model with one head and V = 256, and its `changes`."""
        return replace(ModelConfig(dim=self.dim, layers=self.layers, context=self.length), **changes)

    def run(self, model: ModelConfig, rows: int) -> RunConfig:
        """Return a run of `model`."""
        return run_config(model, rows, dtype=self.dtype, device=self.device, compile=self.compile)

    def check(self) -> None:
        """Raise UsageError for settings with which a later part would fail after minutes of measuring."""
        for name in ("rows", "large_rows", "repetitions", "steps", "threads"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if not self.heads:
            raise UsageError("--heads is empty; give a number, or leave it out")
        for heads in self.heads:
            self.model(heads=heads, vocab_size=self.large_vocabulary)
        pick_device(self.device)
        if "trainer" in self.parts:
            check_installed()


def run(settings: Settings) -> dict[str, Any]:
    """Run the chosen parts and return their results, see `report.result`."""
    settings = replace(settings, dtype=dtype_on(settings.device, settings.dtype))
    settings.check()
    parts: dict[Part, Callable[[Settings], Findings]] = {
        "bytes": partial(heads, "bytes"),
        "large-vocabulary": partial(heads, "large-vocabulary"),
        "trainer": trainer,
    }
    note = (
        f"Each step is `headstart train`'s own, weights float32, {count(settings.threads, 'thread')}, "
        f"{settings.device}{', blocks compiled' if settings.compile else ''}."
    )
    return run_parts("train", settings, {name: part for name, part in parts.items() if name in settings.parts}, [note])


def heads(part: Part, settings: Settings) -> Findings:
    """Measure a step with more heads at the same number of parameters; `part` is bytes or large-vocabulary."""
    large = part == "large-vocabulary"
    vocab_size, rows = (settings.large_vocabulary, settings.large_rows) if large else (256, settings.rows)
    models = {str(n): settings.model(vocab_size=vocab_size, heads=n) for n in settings.heads}
    configs = {name: settings.run(model, rows) for name, model in models.items()}
    answer = measure(configs, settings.repetitions, settings.steps, settings.threads)
    found, speeds = Findings(part), answer["speeds"]
    for name, model in models.items():
        found.measure(f"n = {name}", speeds[name], "tokens/s", heads=model.heads)
        if answer["peak"] is not None:
            shares = [speed * model.flops_per_token(settings.length) / answer["peak"] for speed in speeds[name]]
            found.measure(f"n = {name}: MFU", shares, bar=UTILISATION_BAR)
    for name, model in models.items():
        if "1" not in models or name == "1":
            continue
        faster, predicted = ratios(speeds[name], speeds["1"]), flop_ratio(model)
        bar = SPEED_BAR if name == "4" and not large else None
        found.measure(f"n = {name} / n = 1 (by products alone: {1 / predicted:.2f})", faster, bar=bar)
        if large:
            over = [1 / ratio / predicted for ratio in faster]
            found.measure(f"n = {name}: step time over its FLOP ratio", over, bar=FLOP_BAR if name == "4" else None)
    found.note(
        f"V = {vocab_size:,}, batches of {rows} x {settings.length}. Transformer heads, parallel, taken from the "
        "trunk, so every model has the same number of parameters."
    )
    if large:
        found.note(
            "FLOP ratio: matrix products of a token, 12 L d^2 + V d + 2 T d L and (n-1) V d more, over those of n = 1; "
            "the slowdowns of the paper's Table S5 follow it up to 3B parameters."
        )
    return found


def trainer(settings: Settings) -> Findings:
    """Measure the tokens per second of our loop and Trainer's, in turns."""
    found = Findings("trainer")
    batches = ((256, settings.rows), (settings.large_vocabulary, settings.large_rows))
    for vocab_size, rows in batches:
        config = to_plain(settings.run(settings.model(vocab_size=vocab_size), rows))
        case = {"config": config, "repetitions": settings.repetitions, "steps": settings.steps}
        speeds = processes.call(trainer_case, case, threads=settings.threads)
        for name, values in speeds.items():
            found.measure(f"V = {vocab_size:,}: {name}", values, "tokens/s")
        for name, values in speeds.items():
            if name != TRAINER:
                found.ratio(f"V = {vocab_size:,}: {name} / Trainer", values, speeds[TRAINER], TRAINER_BAR)
    sizes = " and ".join(f"{rows} x {settings.length} (V = {v:,})" for v, rows in batches)
    found.note(
        f"n = 1, batches of {sizes}, {settings.dtype} autocast, clipping at 1, AdamW; turns of "
        f"{settings.steps} steps in one process, the loops of both around them (reading batches, bookkeeping), nothing "
        "logged or saved by Trainer. Ours writes its line of metrics.jsonl each step. Compiled: as `headstart train` "
        "does by default in runs long enough to win by it. Trainer has `optim=adamw_torch_fused`, its fastest; else "
        "its defaults, and so is not compiled" + (", but for this report it is." if settings.compile else ".")
    )
    return found


def run_config(model: ModelConfig, rows: int, **settings: Any) -> RunConfig:
    """Return a run on rows of the model's whole context, not compiled, with further fields of RunConfig."""
    settings = {"compile": False} | settings
    return RunConfig(steps=1_000_000, model=model, batch=BatchConfig(rows=rows), **settings)


class Steps:
    """A model with its optimizers, and the same random batch for every step."""

    def __init__(self, config: RunConfig, group: Processes, walk: Walk = walk_step) -> None:
        config = config.on(group.device.type)
        self.config, self.device = config, group.device
        self.learner = Learner(NewModel.build(config, group), config, group, walk=walk)
        self.model = self.learner.model
        self.batch = self.learner.inputs(random_batch(config), 0)

    def step(self) -> StepResult:
        """Run a training step."""
        return self.learner.update([self.batch], self.config.head_weights.at(0, self.config.model.heads), 1e-4)

    def seconds(self, steps: int) -> float:
        """Return the time of `steps` steps, the device's share included."""
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # a step does not wait for its own update
        return time.perf_counter() - began


def random_batch(config: RunConfig) -> Batch:
    """Return a batch of random tokens."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = config.batch.rows, config.length + config.model.heads
    tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
    documents = torch.zeros_like(tokens)
    targets = targets_of(tokens, documents, config.model.heads)
    return Batch(tokens[:, : config.length], targets, documents[:, : config.length])


def measure(
    configs: Mapping[str, RunConfig],
    repetitions: int,
    steps: int,
    threads: int,
    warmup: int = 2,
) -> dict[str, Any]:
    """Return what `step_case` does for these runs, which take turns of `steps` steps in one process of their own."""
    plain = {name: to_plain(config) for name, config in configs.items()}
    case = {"configs": plain, "repetitions": repetitions, "steps": steps, "warmup": warmup}
    answer: dict[str, Any] = processes.call(step_case, case, threads=threads)
    return answer


def step_case(case: dict[str, Any]) -> dict[str, Any]:
    """Time runs on one device, by name.

    Returns:
        `speeds`: tokens/s of each turn. By default two turns warm up: the first allocates and compiles, the second has
        AdamW's moments in place. `peak`: FLOP/s that a GPU can reach; None on a CPU.
    """
    configs = {name: load_settings(RunConfig, values, Path("benchmark")) for name, values in case["configs"].items()}
    (device,) = {config.device for config in configs.values()}
    with joined(device) as group:
        try:
            runs = {name: Steps(config, group) for name, config in configs.items()}
            variants = {name: partial(run.seconds, case["steps"]) for name, run in runs.items()}
            seconds = interleave(variants, case["repetitions"], case["warmup"])
        except torch.OutOfMemoryError as error:
            what = ", ".join(f"{config.batch.rows} x {config.length} tokens" for config in configs.values())
            raise UsageError(f"{what}: do not fit into the memory of {device}; take fewer rows") from error
    tokens = {name: case["steps"] * config.tokens_per_step for name, config in configs.items()}
    dtype = next(iter(configs.values())).dtype
    return {
        "speeds": {name: [tokens[name] / each for each in values] for name, values in seconds.items()},
        "peak": peak_flops(dtype, device)[0] if device.startswith("cuda") else None,
    }


def products(config: ModelConfig) -> int:
    """Return the multiply-accumulates of a token, forward, in rows of the whole context.

    The paper's Table S5 follows from them.
    """
    L, d, V, T = config.layers, config.dim, config.vocab_size, config.context
    return 12 * L * d * d + V * d + 2 * T * d * L + (config.heads - 1) * V * d


def flop_ratio(config: ModelConfig) -> float:
    """Return the time of a step over that with one head, if matrix products were its only cost."""
    return products(config) / products(replace(config, heads=1))
