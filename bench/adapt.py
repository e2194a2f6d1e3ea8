"""Training heads on a frozen model: what a step costs when the trunk runs, and when its hidden states are read."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import report
from bench.report import Bar, measurement
from headstart.console import say
from headstart.decoding.policy.timing import interleave, ratios, timed
from headstart.model.config import HeadKindName, ModelConfig
from headstart.model.transformer import Transformer
from headstart.objective.walk import count_targets, walk_step
from headstart.training.adapt.hidden_states import HiddenStates
from headstart.training.adapt.new_heads import config_with_heads, freeze, with_heads

STATES_BAR = Bar(">=", 3.0)


@dataclass(frozen=True)
class AdaptSettings:
    """A step of heads alone, with and without the frozen trunk."""

    head_kinds: tuple[HeadKindName, ...] = ("medusa", "transformer")
    """Kinds of heads."""
    heads: int = 4
    """Heads in all."""
    layers: int = 24
    """Of the model: the more, the more is spared."""
    dim: int = 256
    """Width of the model."""
    vocab_size: int = 4096
    """Vocabulary: the larger, the more the heads' losses cost, which is not spared."""
    rows: int = 4
    """Rows of a step."""
    length: int = 256
    """Positions of a row."""
    dtype: str = "float32"
    """float32, or bfloat16: what products run in and states are kept in."""
    repetitions: int = 8
    """Steps measured of each way, in turns."""
    threads: int = 1
    """CPU threads."""
    out: Path = report.RESULTS
    """Folder of the report."""
    date: str | None = None
    """Date of the report (None: today)."""


def run(settings: AdaptSettings) -> dict[str, Any]:
    """Measures each kind; see `report.result` for the shape of what comes back."""
    torch.set_num_threads(settings.threads)
    rows: list[dict[str, Any]] = []
    for kind in settings.head_kinds:
        with tempfile.TemporaryDirectory() as folder:
            seconds = interleave({n: timed(step) for n, step in _steps(settings, kind, Path(folder)).items()},
                                 settings.repetitions)  # fmt: skip
        rows += [measurement(kind, f"{name}: a step", values, "s") for name, values in seconds.items()]
        plain, kept = seconds["trunk runs"], seconds["states are read"]
        rows.append(measurement(kind, "trunk runs / states are read", ratios(plain, kept), bar=STATES_BAR))
        say(f"{kind}: {rows[-1]['median']:.2f} times as fast with hidden states that are read")
    notes = [
        "Forward and backward of the heads' losses, without the optimiser's update, which is the same. States come "
        "from files that the system has in memory; a disk that has to be read adds rows x length x dim values a step.",
        "everything: all weights trained, head 1 included.",
    ]
    return report.result("adapt", settings, rows, notes)


def _steps(settings: AdaptSettings, kind: HeadKindName, folder: Path) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    old = ModelConfig(vocab_size=settings.vocab_size, dim=settings.dim, layers=settings.layers, context=settings.length)
    model = with_heads(Transformer(old), config_with_heads(old, settings.heads, kind))
    config, n, T = model.config, settings.heads, settings.length
    text = torch.randint(config.vocab_size, (settings.rows, T + n))
    targets = torch.stack([text[:, k : k + T] for k in range(1, n + 1)], -1)
    tokens, counts = text[:, : T + config.ahead], count_targets(targets)
    half = settings.dtype == "bfloat16"
    places = torch.stack([torch.zeros(settings.rows, dtype=torch.int64), torch.arange(settings.rows)], 1)
    dtype = torch.bfloat16 if half else torch.float32
    states = HiddenStates(folder, {}, [settings.rows], T, settings.dim, dtype)

    def read(source: int, first: int, stop: int) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            return model.latents(tokens[first:stop, :T], [])[0]

    states.fill(read, settings.rows)

    def step(weights: list[float], kept: bool) -> None:
        z = states.of(places).float() if kept else None
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            walk_step(model, tokens, targets, counts, weights, z_BTD=z)
        model.zero_grad()

    def alone(kept: bool) -> None:
        freeze(model)
        step([0.0] + [1.0] * (n - 1), kept)

    def everything() -> None:
        model.requires_grad_(True)
        step([1.0] * n, False)

    return {"everything": everything, "trunk runs": lambda: alone(False), "states are read": lambda: alone(True)}
