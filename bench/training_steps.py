"""The step that training benchmarks time: the real `train_step` of a run, on random tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench import fresh_process
from bench.sent_bytes import SentBytes
from headstart.data.batches import Batch, targets_of
from headstart.decoding.policy.timing import interleave
from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.training.config import BatchConfig, RunConfig
from headstart.training.loop import build_model
from headstart.training.metrics import memory_in_use
from headstart.training.optimizer import build_optimizers
from headstart.training.processes import Processes, joined
from headstart.training.step import StepResult, move, train_step
from headstart.training.yaml_settings import build, to_plain


def run_config(model: ModelConfig, rows: int, **settings: Any) -> RunConfig:
    """A run on rows of the model's whole context, not compiled; `settings` are further fields of RunConfig."""
    settings = {"compile": False} | settings
    return RunConfig(steps=1_000_000, model=model, batch=BatchConfig(rows=rows), **settings)


def from_plain(values: Any) -> RunConfig:
    """The RunConfig that `to_plain` made into what JSON holds."""
    return build(RunConfig, values, Path("benchmark"))


class Steps:
    """A model with its optimisers, and the same random batch for every step."""

    def __init__(self, config: RunConfig, processes: Processes) -> None:
        config = config.on(processes.device.type)
        self.config, self.processes = config, processes
        self.model, self.sums = build_model(config, processes)
        self.optimizers = build_optimizers(self.model, config.optimizer, processes.device, config.dtype)
        micro_batches, rows = config.micro_batches(processes.count)
        self.batches = [
            move(random_batch(config, first, rows), processes.device)
            for first in range(processes.rank * micro_batches * rows, (processes.rank + 1) * micro_batches * rows, rows)
        ]

    def step(self) -> StepResult:
        config = self.config
        weights = config.head_weights.at(0, config.model.heads)
        return train_step(
            self.model, self.optimizers, self.batches, weights, 1e-4, config, self.processes, self.sums
        )  # fmt: skip

    def seconds(self, steps: int) -> float:
        """What `steps` steps take, the device's share included."""
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        if self.processes.device.type == "cuda":
            torch.cuda.synchronize()  # a step does not wait for its own update
        return time.perf_counter() - began

    def tokens_per_second(self, steps: int) -> float:
        """Over all processes."""
        return steps * self.config.tokens_per_step / self.seconds(steps)

    def bytes_sent(self) -> int:
        """By this process to the others, in a step; takes one."""
        if self.processes.count == 1:
            return 0
        with SentBytes(self.processes.count) as counter:
            self.step()
        return counter.sent


def random_batch(config: RunConfig, first: int, rows: int) -> Batch:
    """Rows `first` to `first + rows` of a step: the same ones for every number of processes."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = config.batch.rows * config.batch.accumulate, config.length + config.model.heads
    tokens = torch.randint(config.model.vocab_size, shape, generator=generator)[first : first + rows]
    documents = torch.zeros_like(tokens)
    targets = targets_of(tokens, documents, config.model.heads)
    return Batch(tokens[:, : config.length], targets, documents[:, : config.length])


def measure(
    configs: Mapping[str, RunConfig],
    repetitions: int,
    steps: int,
    threads: int,
    warmup: int = 2,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What `case` gives for these runs, which take turns of `steps` steps in one process of their own."""
    arguments = case_of(configs, repetitions, steps, warmup)
    answer: dict[str, Any] = fresh_process.call(CASE, arguments, threads=threads, environment=environment)
    return answer


CASE = "bench.training_steps:case"


def case_of(configs: Mapping[str, RunConfig], repetitions: int, steps: int, warmup: int = 2) -> dict[str, Any]:
    """The arguments of `case`, as JSON holds them."""
    plain = {name: to_plain(config) for name, config in configs.items()}
    return {"configs": plain, "repetitions": repetitions, "steps": steps, "warmup": warmup}


def case(case: dict[str, Any]) -> dict[str, Any]:
    """Times runs by name; all of them have one device. Runs in a process of its own, or in each one of a group.

    Returns:
        speeds: tokens/s of each turn. Two turns of warm-up by default: the first allocates and compiles, the second has
            AdamW's moments in place.
        first_seconds: of the two first steps, which compile where the run compiles.
        memory: bytes in use at the end, see `memory_in_use`.
        sent: bytes that this process sends in a step of each run, see `SentBytes`; 0 for one alone.
    """
    configs = {name: from_plain(values) for name, values in case["configs"].items()}
    (device,) = {config.device for config in configs.values()}
    with joined(device) as processes:
        try:
            runs = {name: Steps(config, processes) for name, config in configs.items()}
            first = {name: run.seconds(2) for name, run in runs.items()}
            variants = {name: lambda run=run: run.tokens_per_second(case["steps"]) for name, run in runs.items()}
            speeds = interleave(variants, case["repetitions"], case["warmup"])
        except torch.OutOfMemoryError as error:
            what = ", ".join(f"{config.batch.rows} x {config.length} tokens" for config in configs.values())
            raise UsageError(f"{what}: do not fit into the memory of {device}; take fewer rows") from error
        return {
            "speeds": speeds,
            "first_seconds": first,
            "memory": memory_in_use(processes.device),
            "sent": {name: run.bytes_sent() for name, run in runs.items()},
        }


def products(config: ModelConfig) -> int:
    """Multiply-accumulates of a token in rows of the whole context, forward: the paper's Table S5 follows from them."""
    L, d, V, T = config.layers, config.dim, config.vocab_size, config.context
    return 12 * L * d * d + V * d + 2 * T * d * L + (config.heads - 1) * V * d


def flop_ratio(config: ModelConfig) -> float:
    """How much longer a step takes than with one head, if matrix products were all that costs."""
    one = products(config) - (config.heads - 1) * config.vocab_size * config.dim
    return products(config) / one
