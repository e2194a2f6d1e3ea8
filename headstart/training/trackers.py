"""Trackers that a run reports to beside its metrics.jsonl: TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from headstart.console import say
from headstart.errors import UsageError
from headstart.fileio import write_text

TrackerName = Literal["tensorboard", "wandb", "trackio"]
EXTRAS = {"tensorboard": "watch", "wandb": "watch", "trackio": "trackio"}


@dataclass(frozen=True)
class WatchConfig:
    """Who is told how the run goes, beside metrics.jsonl."""

    trackers: tuple[TrackerName, ...] = ()
    """tensorboard (into the run folder), wandb, trackio; each one needs its package."""
    project: str = "headstart"
    """Under which wandb and trackio file the run."""
    name: str | None = None
    """Of the run, for wandb and trackio (None: the name of the run folder)."""
    sample_tokens: int = 100
    """Tokens written, with all heads, at every validation (0: none)."""
    sample_prompt: str = ""
    """What that text goes on from (empty: the start of a document)."""

    def __post_init__(self) -> None:
        if self.sample_tokens < 0:
            raise UsageError(f"watch.sample_tokens is {self.sample_tokens}; it must be at least 0")
        if len(set(self.trackers)) < len(self.trackers):
            raise UsageError(f"watch.trackers {list(self.trackers)} names one twice; name each once")


class Tracker(Protocol):
    """One of the services. Whatever its methods raise ends the tracker, not the run."""

    def log(self, numbers: dict[str, float], texts: dict[str, str], step: int) -> None: ...

    def close(self, failed: bool) -> None: ...


class Trackers:
    """All trackers of a run, behind one `log`. A context: it closes them, and tells them whether the run failed."""

    def __init__(self, config: WatchConfig, run_dir: Path, settings: dict[str, Any], step: int) -> None:
        """Starts them; `settings` is the configuration as plain data, `step` what a resumed run has done already.

        Raises UsageError where one cannot start.
        """
        self._open: dict[str, Tracker] = {}
        start = Start(config.project, config.name or run_dir.resolve().name, run_dir, settings, step)
        for name in config.trackers:
            try:
                self._open[name] = STARTERS[name](start)
            except Exception as error:  # each service has its own kinds of error
                self.close(failed=True)
                hint = "run `wandb login`, or set WANDB_MODE=offline" if name == "wandb" else "mend that"
                raise UsageError(
                    f"watch.trackers: {name} does not start ({_first_line(error)}); {hint}, or leave {name} out"
                ) from error

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Passes a line of metrics.jsonl on; what is None in it is left out."""
        if not self._open:
            return
        numbers: dict[str, float] = {}
        texts: dict[str, str] = {}
        for name, value in _flat(record):
            if isinstance(value, str):
                texts[name] = value
            elif value is not None:
                numbers[name] = float(value)
        self._each(lambda tracker: tracker.log(numbers, texts, step))

    def close(self, failed: bool = False) -> None:
        self._each(lambda tracker: tracker.close(failed))
        self._open.clear()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                act(tracker)
            except Exception as error:  # the network, a full disk, a bug of the service: none is worth the run
                del self._open[name]
                say(f"warning: {name} failed and gets no more ({_first_line(error)}); metrics.jsonl has everything")


def check_packages(config: WatchConfig) -> None:
    """Raises UsageError where the package of a tracker is missing; to be called before any long work."""
    for name in config.trackers:
        if find_spec(name) is None:
            raise UsageError(
                f"watch.trackers: the package {name} is missing; pip install 'headstart[{EXTRAS[name]}]', "
                f"or leave {name} out"
            )


@dataclass(frozen=True)
class Start:
    """What a tracker is started with."""

    project: str
    name: str
    run_dir: Path
    settings: dict[str, Any]
    step: int

    def kept(self, tracker: str, new: str) -> str:
        """The name under which this run folder is known to a tracker: made once, then read from RUN/trackers.json."""
        path = self.run_dir / "trackers.json"
        try:
            known = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            known = {}
        if not isinstance(known.get(tracker), str):
            known[tracker] = new
            write_text(path, json.dumps(known, indent=2) + "\n")
        return known[tracker]


class TensorBoard:
    """Event files in RUN/tensorboard. A resumed run hides what an earlier process wrote past its checkpoint."""

    def __init__(self, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(start.run_dir / "tensorboard", purge_step=start.step + 1 if start.step else None)

    def log(self, numbers: dict[str, float], texts: dict[str, str], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        for name, text in texts.items():
            self._writer.add_text(name, f"<pre>{text}</pre>", step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class Wandb:
    """A run on Weights & Biases, or with WANDB_MODE=offline in RUN/wandb. A resumed run goes on under the same id."""

    def __init__(self, start: Start) -> None:
        import wandb

        self._run = wandb.init(
            project=start.project,
            name=start.name,
            id=start.kept("wandb", secrets.token_hex(4)),
            resume="allow",
            dir=start.run_dir,
            config=start.settings,
            settings=wandb.Settings(console="off", silent=True),  # the terminal is ours
        )
        # wandb drops lines of a step that it has passed. A resumed run may log some steps twice, with the same values,
        # so its own count runs free and the axis is ours.
        self._run.define_metric("*", step_metric="step")
        if self._run.url:
            say(f"wandb: {self._run.url}")

    def log(self, numbers: dict[str, float], texts: dict[str, str], step: int) -> None:
        self._run.log({**numbers, **texts, "step": step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run in trackio's local database. A resumed run goes on under the same name."""

    def __init__(self, start: Start) -> None:
        import trackio

        self._trackio = trackio
        name = start.kept("trackio", f"{start.name}-{secrets.token_hex(2)}")
        trackio.init(project=start.project, name=name, config=start.settings, resume="allow")

    def log(self, numbers: dict[str, float], texts: dict[str, str], step: int) -> None:
        self._trackio.log({**numbers, **texts}, step=step)

    def close(self, failed: bool) -> None:
        self._trackio.finish()


STARTERS: dict[str, Callable[[Start], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def _flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Names and values; those inside a mapping or a list get its name before theirs: sample/tokens_per_pass."""
    found: list[tuple[str, Any]] = []
    for name, value in record.items():
        if isinstance(value, list):
            value = {str(i): item for i, item in enumerate(value)}
        found += _flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else [(prefix + name, value)]
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
