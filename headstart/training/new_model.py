"""A model with first weights from the seed: how it is built, compiled and saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from headstart.console import say
from headstart.data.shards import TokenShards
from headstart.data.tokenizers import Tokenizer
from headstart.errors import UsageError
from headstart.formats.generation_config import keep_generation
from headstart.formats.hub import local_path
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_data_tokenizer, load_model_tokenizer
from headstart.model.transformer import Transformer
from headstart.objective.inputs import StepInputs
from headstart.training.checkpoints import all_steps, load_weights
from headstart.training.config import RunConfig, load_config
from headstart.training.init_from import first_values
from headstart.training.parallel import GradientSums, materialize, parallelize, whole_model
from headstart.training.processes import Processes

PAYS_FROM = {"cpu": 1e14, "cuda": 1e17}
"""FLOPs of a whole run from which compiling saves time. A CPU of two cores takes 5 to 15 minutes for them; compiled
blocks save 8 to 28 % of that and cost 12 seconds of compiling, or up to a minute in a new environment
(bench/results). The number for GPUs is an assumption, not measured."""


@dataclass
class NewModel:
    """A model that a run trains as a whole."""

    model: Transformer
    sums: GradientSums
    processes: Processes
    origin: Path | None = None
    """The model whose weights it started from."""

    @staticmethod
    def build(config: RunConfig, processes: Processes) -> NewModel:
        """Build the model with first weights from `config.seed`, or from `config.init_from`."""
        origin = None if config.init_from is None else local_path(config.init_from)
        return NewModel(*build_model(config, processes), processes, origin)

    def begin_step(self, step: int, extended: int) -> None:
        """Freeze nothing."""

    def complete(self, inputs: StepInputs) -> StepInputs:
        """Add nothing."""
        return inputs

    def complete_held_out(self, inputs: StepInputs, split: TokenShards) -> StepInputs:
        """Add nothing."""
        return inputs

    def tokenizer(self, of_data: Tokenizer) -> Tokenizer:
        """Return the tokenizer of the model that it started from, or that of its data."""
        return (None if self.origin is None else load_model_tokenizer(self.origin)) or of_data

    def whole(self) -> Transformer | None:
        """Return the model itself, or with several processes a whole copy on the first one; all of them call it."""
        if self.processes.count == 1:
            return self.model
        return whole_model(self.model, torch.bfloat16, keep=self.processes.main)

    def save(self, whole: Transformer, directory: Path, tokenizer: Tokenizer) -> None:
        """Write `whole` as a model directory, in bfloat16; stop tokens of the model that it started from stay."""
        save_model(whole, directory, tokenizer, dtype=torch.bfloat16)
        if self.origin is not None:
            keep_generation(self.origin, directory)


def build_model(
    config: RunConfig, processes: Processes, read: Callable[[], dict[str, Tensor]] | None = None
) -> tuple[Transformer, GradientSums]:
    """Build a model with first weights from `config.seed`, spread over the processes.

    Weights that `read` returns, or those of `config.init_from`, take their place; the first process reads them. A run
    that has checkpoints needs none. The weights are the same for every device and number of processes.
    """
    torch.manual_seed(config.seed)
    model = empty_model(config)
    mesh = processes.mesh(config.parallel.mesh_shape(processes.count, processes.per_node))
    compile = blocks_compiled(config, processes)
    sums = parallelize(model, mesh, config.parallel, compile=compile, dtype=config.dtype)
    if read is None and (named := config.init_from) is not None:
        read = partial(first_values, named, config.model, config.seed)
    values: dict[str, Tensor] = {}

    def names_read() -> list[str]:
        if read is not None and not all_steps(config.run_dir / "checkpoints"):
            values.update(read())
        return list(values)

    names = processes.on_main(names_read)
    materialize(model, processes.device, config.seed, values or dict.fromkeys(names))
    return model, sums


def empty_model(config: RunConfig) -> Transformer:
    """Return the model of a run on the meta device, with the parameters of its auxiliary objectives."""
    with torch.device("meta"):
        model = Transformer(config.model)
        for auxiliary in config.auxiliaries:
            auxiliary.add_parameters(model)
    return model


def save_checkpoint(checkpoint: Path, directory: Path) -> None:
    """Write the weights of a run's checkpoint as a model directory, with the tokenizer of the run's result.

    Raises UsageError for a run of `headstart adapt`, whose checkpoints lack the weights of the model below the heads.
    """
    run = checkpoint.parent.parent
    config = load_config(run / "config.yaml")
    if config.adapt is not None:
        raise UsageError(f"{run}: is a run of headstart adapt, whose checkpoints hold no whole model; take its model/")
    model = Transformer(config.model)
    for auxiliary in config.auxiliaries:
        auxiliary.add_parameters(model)
    load_weights(checkpoint, model)
    result = run / config.result
    save_model(model, directory, load_data_tokenizer(result), dtype=torch.bfloat16)
    keep_generation(result, directory)


def blocks_compiled(config: RunConfig, processes: Processes) -> bool:
    """Return whether to compile blocks: the same on all processes, which all call it.

    Raises UsageError if `config.compile` requires what torch cannot do here. If the choice is free, a line reports it.
    """
    if not (pays(config, processes.device) if config.compile is None else config.compile):
        return False
    problem = compile_problem(processes.device)
    if processes.all(not problem):
        return True
    problem = problem or "another process cannot"
    if config.compile:
        raise UsageError(f"compile is true, but torch cannot compile here ({problem}); leave it out, or fix that")
    say(f"torch cannot compile here ({problem}): training without, 10 to 30 % slower")
    return False


def pays(config: RunConfig, device: torch.device) -> bool:
    """Return whether the run is long enough to compile for.

    The settings alone decide, so that a resumed run makes the same choice: compiled blocks round differently.
    """
    flops = config.model.flops_per_token(config.length) * config.tokens_per_step * config.steps
    return flops >= PAYS_FROM.get(device.type, float("inf"))


def compile_problem(device: torch.device) -> str:
    """Return the reason, in a line, for which torch cannot compile here; empty if it can.

    It compiles something to find out: Python's headers or triton may be missing although there is a compiler.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
    except Exception as error:  # of dynamo, of inductor, of triton, of the compiler itself
        return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ""
