"""Settings of `bench train`, and the step that it times: the real step of a run, on random tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import fresh_process
from bench.report import BenchSettings
from headstart.data.batches import Batch, targets_of
from headstart.decoding.policy.timing import interleave
from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.objective.walk import walk_step
from headstart.settings_loader import load_settings
from headstart.training.config import BatchConfig, RunConfig
from headstart.training.metrics import memory_in_use
from headstart.training.new_model import NewModel
from headstart.training.processes import Processes, joined
from headstart.training.step import Learner, StepResult, Walk
from headstart.training.yaml_settings import to_plain

Part = Literal["bytes", "large-vocabulary", "processes", "compile", "trainer", "memory", "gpu"]


@dataclass(frozen=True)
class TrainSettings(BenchSettings):
    """The whole training step: forward, walk over the heads, clipping, AdamW."""

    parts: tuple[Part, ...] = ()
    """bytes, large-vocabulary: against fewer heads; processes: two against one; compile: torch.compile; trainer:
    against Hugging Face's Trainer; memory: against joint autograd; gpu: the paper's sizes. Without any: all
    parts of the device (processes only on cpu, gpu only on cuda)."""
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
    """bytes, large-vocabulary, trainer, memory: compile the blocks with torch.compile (in trainer, the peer too)."""
    compile_sizes: tuple[tuple[int, int], ...] = ((128, 6), (256, 10), (512, 12))
    """compile: width and blocks of each model."""
    memory_vocabularies: tuple[int, ...] = (256, 32000, 128000)
    """memory: vocabularies."""
    process_rounds: int = 3
    """processes: starts of each case."""
    gpu_rows: int = 4
    """gpu: rows of a batch, of 4,096 positions each."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of matrix products; weights and AdamW are float32 (auto: the faster one here)."""
    repetitions: int = 5
    """Rounds, in each of which every variant takes its turn."""
    steps: int = 3
    """Steps of one turn."""
    threads: int = 2
    """CPU threads (the part processes sets its own)."""
    device: str = "cpu"
    """cpu or cuda."""

    def model(self) -> ModelConfig:
        """Return the model with one head and V = 256, which parts change."""
        return ModelConfig(dim=self.dim, layers=self.layers, context=self.length)

    def run_fields(self) -> dict[str, Any]:
        """Return the fields of a RunConfig that these settings give."""
        return {"dtype": self.dtype, "device": self.device, "compile": self.compile}


def run_config(model: ModelConfig, rows: int, **settings: Any) -> RunConfig:
    """Return a run on rows of the model's whole context, not compiled, with further fields of RunConfig."""
    settings = {"compile": False} | settings
    return RunConfig(steps=1_000_000, model=model, batch=BatchConfig(rows=rows), **settings)


def from_plain(values: Any) -> RunConfig:
    """Return the RunConfig that `to_plain` turned into JSON."""
    return load_settings(RunConfig, values, Path("benchmark"))


class Steps:
    """A model with its optimizers, and the same random batch for every step."""

    def __init__(self, config: RunConfig, processes: Processes, walk: Walk = walk_step) -> None:
        config = config.on(processes.device.type)
        self.config, self.processes = config, processes
        self.learner = Learner(NewModel.build(config, processes), config, processes, walk=walk)
        self.model = self.learner.model
        micro_batches, rows = config.micro_batches(processes.count)
        self.batches = [
            self.learner.inputs(random_batch(config, first, rows), 0)
            for first in range(processes.rank * micro_batches * rows, (processes.rank + 1) * micro_batches * rows, rows)
        ]

    def step(self) -> StepResult:
        """Run a training step."""
        return self.learner.update(self.batches, self.config.head_weights.at(0, self.config.model.heads), 1e-4)

    def seconds(self, steps: int) -> float:
        """Return the time of `steps` steps, the device's share included."""
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        if self.processes.device.type == "cuda":
            torch.cuda.synchronize()  # a step does not wait for its own update
        return time.perf_counter() - began

    def tokens_per_second(self, steps: int) -> float:
        """Return the rate of all processes together over `steps` steps."""
        return steps * self.config.tokens_per_step / self.seconds(steps)

    def bytes_sent(self) -> int:
        """Run a step and return the bytes that this process sends to the others."""
        if self.processes.count == 1:
            return 0
        with SentBytes(self.processes.count) as counter:
            self.step()
        return counter.sent


def random_batch(config: RunConfig, first: int, rows: int) -> Batch:
    """Return rows `first` to `first + rows` of a step: the same for every number of processes."""
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
    """Return what `step_case` does for these runs, which take turns of `steps` steps in one process of their own."""
    arguments = case_of(configs, repetitions, steps, warmup)
    answer: dict[str, Any] = fresh_process.call(step_case, arguments, threads=threads, environment=environment)
    return answer


def case_of(configs: Mapping[str, RunConfig], repetitions: int, steps: int, warmup: int = 2) -> dict[str, Any]:
    """Return the argument of `step_case`, as JSON holds it."""
    plain = {name: to_plain(config) for name, config in configs.items()}
    return {"configs": plain, "repetitions": repetitions, "steps": steps, "warmup": warmup}


def step_case(case: dict[str, Any]) -> dict[str, Any]:
    """Time runs on one device, by name, in this process or in each process of a group.

    Returns:
        `speeds`: tokens/s of each turn. By default two turns warm up: the first allocates and compiles, the second has
        AdamW's moments in place. `first_seconds`: time of the two first steps, which compile if the run compiles.
        `memory`: bytes in use at the end, see `memory_in_use`. `sent`: bytes that this process sends in a step of each
        run, see `SentBytes`; 0 if it is alone.
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
    """Return the multiply-accumulates of a token, forward, in rows of the whole context.

    The paper's Table S5 follows from them.
    """
    L, d, V, T = config.layers, config.dim, config.vocab_size, config.context
    return 12 * L * d * d + V * d + 2 * T * d * L + (config.heads - 1) * V * d


def flop_ratio(config: ModelConfig) -> float:
    """Return the time of a step over that with one head, if matrix products were its only cost."""
    one = products(config) - (config.heads - 1) * config.vocab_size * config.dim
    return products(config) / one


class SentBytes(TorchDispatchMode):
    """A counter of the bytes that this process sends to the others for gathers and sums, if they form a ring."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.sent, self._count = 0, count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.sent += self._bytes(func._schema.name.split("::")[1], args)
        return func(*args, **(kwargs or {}))

    def _bytes(self, name: str, args: Any) -> int:
        if name in ("_allgather_base_", "_reduce_scatter_base_"):
            # Each process sends every other one a share: the whole without its own.
            whole, share = sorted((_size(args[0]), _size(args[1])), reverse=True)
            return whole - share
        if name in ("allreduce_", "all_reduce"):
            return 2 * (self._count - 1) * _size(args[0]) // self._count
        return 0


def _size(tensors: Any) -> int:
    """Return the bytes of a tensor or of a list of tensors."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_size, tensors))
