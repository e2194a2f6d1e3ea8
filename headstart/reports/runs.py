"""Read run folders in order to compare them: curves, settings, final numbers."""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from headstart.console import say
from headstart.errors import UsageError
from headstart.training.yaml_settings import read_mapping

SMOOTHING = 0.02
"""Share of the longest run's tokens over which the weights of a smoothed curve fall to 1/e."""


def running_mean(places: Sequence[float], values: Sequence[float], fade: float) -> list[float]:
    """Return the running mean whose weights fall to 1/e over a distance `fade`, corrected for its start."""
    out, total, weight, before = [], 0.0, 0.0, 0.0
    for place, value in zip(places, values):
        keep = math.exp(-max(0.0, place - before) / fade)
        total, weight, before = keep * total + value, keep * weight + 1, place
        out.append(total / weight)
    return out


@dataclass
class Curve:
    """One number of a run over its course, in the order of its lines, without values that are not finite."""

    tokens: array[float] = field(default_factory=lambda: array("d"))
    seconds: array[float] = field(default_factory=lambda: array("d"))
    """Time in training steps until then."""
    values: array[float] = field(default_factory=lambda: array("d"))

    def smoothed(self, fade: float) -> list[float]:
        """Return the running mean whose weights fall to 1/e over `fade` tokens."""
        return running_mean(self.tokens, self.values, fade)


@dataclass
class Run:
    """A run folder, as far as it is written."""

    name: str
    settings: dict[str, Any]
    """Settings of config.yaml by dotted names; empty if there is no such file."""
    curves: dict[str, Curve] = field(default_factory=dict)
    """Curves by the names of metrics.jsonl; that of the decoded sample is sample/tokens_per_pass."""
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Time in training steps, without validation, saving and pauses between two starts."""
    skipped: list[int] = field(default_factory=list)
    """Steps whose loss or gradient was not finite, or whose loss was a spike."""
    sample: dict[str, Any] | None = None
    """The newest decoded sample, with its `step`."""

    @property
    def heads(self) -> int:
        """n, the highest head with a loss."""
        found = [int(m[1]) for name in self.curves if (m := re.fullmatch(r"loss/head(\d+)", name))]
        return max(found, default=0)

    def curve(self, name: str) -> Curve:
        """Return a curve by its name; an empty one if the run does not have it."""
        return self.curves.get(name) or Curve()


def read_run(path: Path, name: str | None = None) -> Run:
    """Read RUN/metrics.jsonl and RUN/config.yaml. The run may be running: an unfinished last line is left out.

    Raises UsageError if `path` is no run folder, or holds no training step yet.
    """
    metrics = path / "metrics.jsonl"
    try:
        lines = metrics.open("rb")
    except OSError as error:
        raise UsageError(
            f"{path}: not a run folder ({metrics.name}: {error.strerror}); name folders that `headstart train` wrote"
        ) from error
    config = path / "config.yaml"
    run = Run(name or path.resolve().name, _dotted(read_mapping(config)) if config.exists() else {})
    unreadable = 0
    with lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break  # it is being written
            try:
                record = json.loads(line)
                step, tokens = int(record["step"]), int(record["tokens"])
            except (ValueError, KeyError, TypeError):
                unreadable += 1
                continue
            _add(run, record, step, tokens)
    if unreadable:
        say(f"warning: {metrics}: {unreadable} lines are no records of a run and were left out")
    if not run.steps:
        raise UsageError(f"{metrics}: holds no training step yet; compare it after the first one")
    return run


def _add(run: Run, record: dict[str, Any], step: int, tokens: int) -> None:
    if "tokens_per_second" in record:  # the line of a step; others follow one
        speed = record["tokens_per_second"]
        if _is_number(speed) and speed > 0:
            run.seconds += max(0, tokens - run.tokens) / speed
        run.steps, run.tokens = step, tokens
        if "skipped" in record:
            run.skipped.append(step)
    numbers = {name: value for name, value in record.items() if name not in ("step", "tokens", "skipped")}
    sample = numbers.pop("sample", None)
    if isinstance(sample, dict) and isinstance(sample.get("text"), str):
        run.sample = {**sample, "step": step}
        numbers["sample/tokens_per_pass"] = sample.get("tokens_per_pass")
    for name, value in numbers.items():
        if _is_number(value):
            curve = run.curves.setdefault(name, Curve())
            curve.tokens.append(tokens)
            curve.seconds.append(run.seconds)
            curve.values.append(value)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run folders, named after the folders, or by their paths if two folders have the same name."""
    names = [path.resolve().name for path in paths]
    return [read_run(path, name if names.count(name) == 1 else str(path)) for path, name in zip(paths, names)]


def common_heads(runs: Sequence[Run]) -> list[int]:
    """Return the heads whose curves can be compared: all if all runs have as many, else head 1 alone.

    Head 2 of 2 is not head 2 of 8: it shares the trunk with other heads.
    """
    counts = {run.heads for run in runs}
    return list(range(1, counts.pop() + 1)) if len(counts) == 1 else [1]


def fade(runs: Sequence[Run]) -> float:
    """Return the `fade` of smoothed curves in tokens, the same for all runs: at least ten steps of each."""
    return max(SMOOTHING * max(run.tokens for run in runs), *(10 * run.tokens / run.steps for run in runs))


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the settings in which the runs differ: dotted name -> a value per run, None if a run does not have it."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name != "run_dir")
    found = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def summary(run: Run, tokens: float) -> dict[str, Any]:
    """Return the final numbers of a run by name, None if it has none. `tokens`: see `fade`."""

    def last(name: str) -> float | None:
        smooth = run.curve(name).smoothed(tokens)
        return smooth[-1] if smooth else None

    def over(name: str, reduce: Any) -> float | None:
        values = run.curve(name).values
        return reduce(values) if values else None

    return {
        "steps": run.steps,
        "tokens": run.tokens,
        "training_seconds": run.seconds,
        "loss/head1": last("loss/head1"),
        "validation/bits_per_byte/head1": over("validation/bits_per_byte/head1", lambda values: values[-1]),
        "validation/top1/head1": over("validation/top1/head1", lambda values: values[-1]),
        "expected_tokens_per_pass": last("expected_tokens_per_pass"),
        "sample/tokens_per_pass": over("sample/tokens_per_pass", lambda values: values[-1]),
        "tokens_per_second": over("tokens_per_second", median),
        "mfu": over("mfu", median),
        "memory_gib": over("memory_gib", max),
        "clip_rate": over("clipped", lambda values: sum(values) / len(values)),
        "skipped": len(run.skipped),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _dotted(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found.update(_dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return found
