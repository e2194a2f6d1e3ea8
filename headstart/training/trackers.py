"""Trackers that a run reports to in addition to metrics.jsonl: TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from headstart.arguments import AT_LEAST_0, check_fields
from headstart.console import say
from headstart.errors import UsageError, first_line
from headstart.fileio import write_text

TrackerName = Literal["tensorboard", "wandb", "trackio"]
EXTRAS = {"tensorboard": "watch", "wandb": "watch", "trackio": "trackio"}


@dataclass(frozen=True)
class WatchConfig:
    """Trackers of the run, and the sample written at each validation."""

    trackers: tuple[TrackerName, ...] = ()
    """tensorboard (into the run folder), wandb, trackio; each needs its package."""
    project: str = "headstart"
    """Project of the run in wandb and trackio."""
    name: str | None = None
    """Name of the run in wandb and trackio (None: the name of the run folder)."""
    sample_tokens: int = 100
    """Tokens of the sample, decoded with all heads at every validation (0: no sample)."""
    sample_prompt: str = ""
    """Prompt of the sample (empty: the start of a document)."""
    sample_documents: int = 0
    """Number of held-out documents that the sample continues, in place of the prompt: conversations from their first
    answer, text from a quarter of its length (0: the prompt)."""

    def __post_init__(self) -> None:
        check_fields(self, "watch.", sample_tokens=AT_LEAST_0, sample_documents=AT_LEAST_0)
        if len(set(self.trackers)) < len(self.trackers):
            raise UsageError(f"watch.trackers {list(self.trackers)} names one twice; name each once")


@dataclass(frozen=True)
class Tracker:
    """One of the services. An exception of its functions ends the tracker, not the run."""

    log: Callable[[dict[str, float], dict[str, str], int], None]
    """Record the numbers and samples of a step, both by name."""
    close: Callable[[bool], None]
    """End the run, which has failed or not."""


class Trackers:
    """All trackers of a run, behind one `log`. A context manager that closes them at the end of the run."""

    def __init__(self, config: WatchConfig, run_dir: Path, settings: dict[str, Any], step: int) -> None:
        """Start the trackers of a run that has done `step` steps. Raise UsageError if one cannot start."""
        self._open: dict[str, Tracker] = {}
        start = Start(config.project, config.name or run_dir.resolve().name, run_dir, settings, step)
        for name in config.trackers:
            try:
                self._open[name] = STARTERS[name](start)
            except Exception as error:  # each service has its own kinds of error
                self.close(failed=True)
                hint = "run `wandb login`, or set WANDB_MODE=offline" if name == "wandb" else "fix that"
                raise UsageError(
                    f"watch.trackers: {name} does not start ({first_line(error)}); {hint}, or leave {name} out"
                ) from error

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Pass on a line of metrics.jsonl without the entries that are None."""
        if not self._open:
            return
        numbers: dict[str, float] = {}
        samples: dict[str, str] = {}
        for name, value in _flat(record):
            if isinstance(value, str):
                samples[name] = value
            elif value is not None:
                numbers[name] = float(value)
        self._each(lambda tracker: tracker.log(numbers, samples, step))

    def close(self, failed: bool = False) -> None:
        """Close all trackers."""
        self._each(lambda tracker: tracker.close(failed))
        self._open.clear()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.close(failed=kind is not None)

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                act(tracker)
            except Exception as error:  # the network, a full disk, a bug of the service: none is worth the run
                del self._open[name]
                say(f"warning: {name} failed and gets no more ({first_line(error)}); metrics.jsonl has everything")


def check_packages(config: WatchConfig) -> None:
    """Raise UsageError if the package of a tracker is missing; call it before any long work."""
    for name in config.trackers:
        if find_spec(name) is None:
            raise UsageError(
                f"watch.trackers: the package {name} is missing; pip install 'headstart[{EXTRAS[name]}]', "
                f"or leave {name} out"
            )


@dataclass(frozen=True)
class Start:
    """Arguments of a tracker."""

    project: str
    name: str
    run_dir: Path
    settings: dict[str, Any]
    step: int

    def stored_name(self, tracker: str, new: str) -> str:
        """Return the name of this run folder in a tracker: `new` at first, then the one kept in RUN/trackers.json."""
        path = self.run_dir / "trackers.json"
        try:
            names = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            names = {}
        if not isinstance(names.get(tracker), str):
            names[tracker] = new
            write_text(path, json.dumps(names, indent=2) + "\n")
        return names[tracker]


def tensorboard(start: Start) -> Tracker:
    """Write event files in RUN/tensorboard. A resumed run hides the events past its checkpoint."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(start.run_dir / "tensorboard", purge_step=start.step + 1 if start.step else None)

    def log(numbers: dict[str, float], samples: dict[str, str], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        for name, text in samples.items():
            writer.add_text(name, f"<pre>{text}</pre>", step)

    return Tracker(log, lambda failed: writer.close())


def wandb(start: Start) -> Tracker:
    """Log to Weights & Biases, or with WANDB_MODE=offline in RUN/wandb. A resumed run keeps its id."""
    import wandb

    run = wandb.init(
        project=start.project,
        name=start.name,
        id=start.stored_name("wandb", secrets.token_hex(4)),
        resume="allow",
        dir=start.run_dir,
        config=start.settings,
        settings=wandb.Settings(console="off", silent=True),  # the terminal is ours
    )
    # wandb drops lines of steps before its own count, and a resumed run may log some steps twice, with the same values.
    # So wandb counts lines, and our step is the axis.
    run.define_metric("*", step_metric="step")
    if run.url:
        say(f"wandb: {run.url}")
    return Tracker(
        lambda numbers, samples, step: run.log({**numbers, **samples, "step": step}),
        lambda failed: run.finish(exit_code=int(failed)),
    )


def trackio(start: Start) -> Tracker:
    """Log to trackio's local database. A resumed run keeps its name."""
    import trackio

    name = start.stored_name("trackio", f"{start.name}-{secrets.token_hex(2)}")
    trackio.init(project=start.project, name=name, config=start.settings, resume="allow")
    return Tracker(
        lambda numbers, samples, step: trackio.log({**numbers, **samples}, step=step), lambda failed: trackio.finish()
    )


STARTERS: dict[str, Callable[[Start], Tracker]] = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}


def _flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return names and values; those inside a mapping or a list get its name as a prefix: sample/tokens_per_pass."""
    found: list[tuple[str, Any]] = []
    for name, value in record.items():
        if isinstance(value, list):
            value = {str(i): item for i, item in enumerate(value)}
        found += _flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else [(prefix + name, value)]
    return found
