"""Whether a run's blocks go through torch.compile: where it pays, and where this machine can."""

from __future__ import annotations

import torch

from headstart.console import say
from headstart.errors import UsageError
from headstart.training.config import RunConfig
from headstart.training.processes import Processes

PAYS_FROM = {"cpu": 1e14, "cuda": 1e17}
"""FLOPs of a whole run from which compiling is won back. On a CPU of two cores they take 5 to 15 minutes, of which
compiled blocks save 8 to 28 %, for 12 seconds of compiling, or up to a minute in a new environment
(bench/results). For GPUs it is an assumption, not measured."""


def blocks_compiled(config: RunConfig, processes: Processes) -> bool:
    """Whether to compile. All processes call it, and all do alike.

    Raises UsageError where `config.compile` asks for what torch cannot do here; where it leaves the choice, that is
    said in a line.
    """
    if not (pays(config, processes.device) if config.compile is None else config.compile):
        return False
    problem = _problem(processes.device)
    if processes.all(not problem):
        return True
    problem = problem or "another process cannot"
    if config.compile:
        raise UsageError(f"compile is true, but torch cannot compile here ({problem}); leave it out, or mend that")
    say(f"torch cannot compile here ({problem}): training without, 10 to 30 % slower")
    return False


def pays(config: RunConfig, device: torch.device) -> bool:
    """Whether the run is long enough. Judged by its settings alone, so that a run that is gone on with on such a device
    is compiled if it was before: compiled blocks round differently."""
    flops = config.model.flops_per_token(config.length) * config.tokens_per_step * config.steps
    return flops >= PAYS_FROM.get(device.type, float("inf"))


def _problem(device: torch.device) -> str:
    """Why torch cannot compile here, in a line; empty where it can. Asked by compiling something: a compiler may be
    there and Python's headers, or triton, not."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
    except Exception as error:  # of dynamo, of inductor, of triton, of the compiler itself
        return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ""
