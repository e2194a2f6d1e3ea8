"""Measure a training step of heads on a frozen model, when the trunk runs and when its hidden states are read."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.report import Bar, BenchSettings, Findings, run_parts
from headstart.decoding.policy.timing import interleave, timed
from headstart.model.config import HeadKindName, ModelConfig
from headstart.model.transformer import Transformer
from headstart.objective.inputs import StepInputs, count_targets
from headstart.objective.objective import Objective
from headstart.objective.walk import walk_step
from headstart.training.adapt.hidden_states import HiddenStates
from headstart.training.adapt.new_heads import config_with_heads, freeze, with_heads

STATES_BAR = Bar(">=", 3.0)


@dataclass(frozen=True)
class Settings(BenchSettings):
    """A training step of heads alone, with and without the frozen trunk."""

    head_kinds: tuple[HeadKindName, ...] = ("medusa", "transformer")
    """Kinds of heads."""
    heads: int = 4
    """Heads in all."""
    layers: int = 24
    """Blocks of the model: the more, the more time the states save."""
    dim: int = 256
    """Width of the model."""
    vocab_size: int = 4096
    """Vocabulary: the larger, the more the heads' losses cost, which the states do not save."""
    rows: int = 4
    """Rows of a step."""
    length: int = 256
    """Positions of a row."""
    dtype: str = "float32"
    """float32 or bfloat16: type of products and of stored states."""
    repetitions: int = 8
    """Steps measured of each way, in turns."""
    threads: int = 1
    """CPU threads."""


def run(settings: Settings) -> dict[str, Any]:
    """Measure each kind of heads and return the results, see `report.result`."""
    torch.set_num_threads(settings.threads)
    notes = [
        "Forward and backward of the heads' losses, without the optimizer's update, which is the same. States come "
        "from files that the system has in memory; a disk that has to be read adds rows x length x dim values a step.",
        "everything: all weights trained, head 1 included.",
    ]
    return run_parts("adapt", settings, {kind: partial(_measure, kind) for kind in settings.head_kinds}, notes)


def _measure(kind: HeadKindName, settings: Settings) -> Findings:
    with tempfile.TemporaryDirectory() as folder:
        steps = {name: timed(step) for name, step in _steps(settings, kind, Path(folder)).items()}
        seconds = interleave(steps, settings.repetitions)
    found = Findings(kind)
    for name, values in seconds.items():
        found.measure(f"{name}: a step", values, "s")
    found.ratio("trunk runs / states are read", seconds["trunk runs"], seconds["states are read"], STATES_BAR)
    return found


def _steps(settings: Settings, kind: HeadKindName, folder: Path) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    old = ModelConfig(vocab_size=settings.vocab_size, dim=settings.dim, layers=settings.layers, context=settings.length)
    model = with_heads(Transformer(old), config_with_heads(old, settings.heads, kind))
    config, n, T = model.config, settings.heads, settings.length
    sequences = torch.randint(config.vocab_size, (settings.rows, T + n))
    targets = torch.stack([sequences[:, k : k + T] for k in range(1, n + 1)], -1)
    tokens, counts = sequences[:, : T + config.ahead], count_targets(targets)
    half = settings.dtype == "bfloat16"
    places = torch.stack([torch.zeros(settings.rows, dtype=torch.int64), torch.arange(settings.rows)], 1)
    dtype = torch.bfloat16 if half else torch.float32
    states = HiddenStates(folder, {}, [settings.rows], T, settings.dim, dtype)

    def read(source: int, first: int, stop: int) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model.latents(tokens[first:stop, :T], [])[0]

    states.fill(read, settings.rows)

    def step(weights: list[float], stored: bool) -> None:
        z = states.of(places).float() if stored else None
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            walk_step(model, StepInputs(tokens, targets, z=z), counts, Objective(weights))
        model.zero_grad()

    def heads_alone(stored: bool) -> None:
        freeze(model)
        step([0.0] + [1.0] * (n - 1), stored)

    def everything() -> None:
        model.requires_grad_(True)
        step([1.0] * n, False)

    return {
        "everything": everything,
        "trunk runs": lambda: heads_alone(False),
        "states are read": lambda: heads_alone(True),
    }
