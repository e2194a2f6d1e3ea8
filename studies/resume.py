"""Keep the trainings inside a case on disk, so that a study that was killed resumes within the case."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from headstart.errors import UsageError
from headstart.fileio import replacing_file
from headstart.training.step import Learner, StepResult

SAVE_EVERY = 60.0
"""Seconds between the checkpoints of a training."""


@dataclass
class Clock:
    """Seconds, by the clock and of this process."""

    wall: float = 0.0
    processor: float = 0.0

    @classmethod
    def now(cls) -> Clock:
        """Return the present time."""
        return cls(time.monotonic(), time.process_time())

    def since(self, began: Clock) -> Clock:
        """Return the time that passed since `began`."""
        return Clock(self.wall - began.wall, self.processor - began.processor)

    def plus(self, other: Clock) -> Clock:
        """Return the sum."""
        return Clock(self.wall + other.wall, self.processor + other.processor)


@dataclass
class TrainingState:
    """A training's history, its checkpoint file, and what it spent."""

    file: Path | None = None
    """Checkpoint (None: the training is not kept)."""
    results: list[StepResult] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)
    """Plain data that a watcher collected."""
    spent: Clock = field(default_factory=Clock)
    """Time of earlier starts, up to the checkpoint."""
    began: Clock = field(default_factory=Clock.now)
    saved: float = field(default_factory=time.monotonic)

    def restore(self, learner: Learner) -> None:
        """Load the checkpoint, if there is one. Raises UsageError if it cannot be read."""
        if self.file is None or not self.file.exists():
            return
        try:
            kept = torch.load(self.file, map_location="cpu", weights_only=True)
            learner.model.load_state_dict(kept["model"])
            for optimizer, state in zip(learner.optimizers, kept["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            torch.set_rng_state(kept["random"])
            self.results = [StepResult(**result) for result in kept["results"]]
            self.seen, self.spent = kept["seen"], Clock(*kept["spent"])
        except Exception as error:  # zip and pickle each have their own kinds of error for a damaged file
            raise UsageError(f"{self.file}: is damaged; delete it and run the study again") from error

    def save_if_due(self, learner: Learner) -> None:
        """Write a checkpoint if the last one is older than SAVE_EVERY."""
        if self.file is None or time.monotonic() - self.saved < SAVE_EVERY:
            return
        spent = self.spent.plus(Clock.now().since(self.began))
        kept = {
            "model": learner.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in learner.optimizers],
            "random": torch.get_rng_state(),
            "results": [asdict(result) for result in self.results],
            "seen": self.seen,
            "spent": [spent.wall, spent.processor],
        }
        with replacing_file(self.file) as temporary:
            torch.save(kept, temporary)
        self.saved = time.monotonic()


@dataclass
class CaseTrainings:
    """The trainings of a case in their order, with a checkpoint file each in a folder."""

    folder: Path
    states: list[TrainingState] = field(default_factory=list)

    @property
    def spent(self) -> Clock:
        """Time that earlier starts spent on what was resumed."""
        return Clock(*(sum(getattr(s.spent, name) for s in self.states) for name in ("wall", "processor")))


_CASE: ContextVar[CaseTrainings | None] = ContextVar("case", default=None)


@contextmanager
def trainings_kept_in(folder: Path) -> Iterator[CaseTrainings]:
    """Keep every training of the block in `folder`, and resume those that the folder holds."""
    case = CaseTrainings(folder)
    token = _CASE.set(case)
    try:
        yield case
    finally:
        _CASE.reset(token)


def next_training() -> TrainingState:
    """Return the state of the case's next training; outside `trainings_kept_in` one that is not kept."""
    case = _CASE.get()
    if case is None:
        return TrainingState()
    case.folder.mkdir(exist_ok=True)
    state = TrainingState(case.folder / f"training-{len(case.states)}.pt")
    case.states.append(state)
    return state
