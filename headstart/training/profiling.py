"""A window of profiled steps: a trace, and a table of the operators that took the most time."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from headstart.arguments import AT_LEAST_0, AT_LEAST_1, check_fields
from headstart.console import say
from headstart.fileio import replacing_file, write_text

ROWS = 40
"""Operators in the table."""
SETTLED = 10
"""Number of the first typical step of a process: those before it allocate and compile."""


@dataclass(frozen=True)
class ProfileConfig:
    """Steps that torch.profiler records."""

    start: int | None = None
    """First step recorded (None: the tenth that this process takes)."""
    steps: int = 0
    """Number of steps recorded (0: none). A trace grows by megabytes a step. `--profile` alone means 3."""

    def __post_init__(self) -> None:
        check_fields(self, "profile.", start=AT_LEAST_1, steps=AT_LEAST_0)


class StepProfiler:
    """Record the steps of the window and write them to RUN/profile at its end, or at the end of the run."""

    def __init__(self, config: ProfileConfig, folder: Path, device: torch.device, step: int) -> None:
        """Prepare the window. `step`: steps done by a resumed run; a line reports a window that has passed."""
        start = step + SETTLED if config.start is None else config.start
        self._steps = range(start, start + config.steps)
        self._folder, self._device = folder, device
        self._recording: profile | None = None
        self._recorded = 0
        if self._steps and step >= self._steps.start:
            say(f"profile.start {start} lies behind step {step}, where this run resumes: nothing is profiled")

    def before_step(self, step: int) -> None:
        """Start to record before the first step of the window."""
        done = step + 1
        if done not in self._steps:
            return
        if done == self._steps.start:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._recording = profile(activities=activities)
            self._recording.start()
        self._recorded += 1

    def after_step(self, step: int, result: object) -> None:
        """Write the profile after the last step of the window."""
        if self._steps and step + 1 == self._steps[-1]:
            self.close()

    def close(self) -> None:
        """Write the recorded steps, if any."""
        recording, self._recording = self._recording, None
        if recording is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        recording.stop()
        name = f"step{self._steps.start}"
        trace, table = self._folder / f"trace-{name}.json.gz", self._folder / f"{name}.txt"
        with tempfile.TemporaryDirectory() as temporary:
            plain = Path(temporary) / "trace.json"
            recording.export_chrome_trace(str(plain))
            with replacing_file(trace) as compressed, plain.open("rb") as source, gzip.open(compressed, "wb") as target:
                shutil.copyfileobj(source, target)
        key = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        write_text(table, recording.key_averages().table(sort_by=key, row_limit=ROWS) + "\n")
        say(f"profile of {self._recorded} steps from step {self._steps.start}: {table}, {trace} (ui.perfetto.dev)")

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
