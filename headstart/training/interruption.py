"""Ctrl-C, SIGTERM and SIGUSR1: the current step is finished and saved before the program ends."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from headstart.errors import Stopped
from headstart.training.checkpoint_state import name_of

REQUEUE = 75
"""Exit status of a run that was pre-empted: EX_TEMPFAIL of sysexits.h, "try again later". No error of ours has it."""


class Interrupted(Stopped):
    """A run was stopped from outside and can resume.

    The command line prints the message and exits with `status`: 130 after Ctrl-C, 75 after a scheduler's signal.
    """

    def __init__(self, run_dir: Path, step: int, checkpoint: Path | None, number: int | None) -> None:
        """Write the message about a signal; `checkpoint` is of an earlier step if the last ones were skipped."""
        self.status = 130 if number == signal.SIGINT else REQUEUE
        folder = shlex.quote(str(run_dir))
        config = shlex.quote(str(run_dir / "config.yaml"))
        saved = f", saved as {checkpoint}; resume with"
        if checkpoint is None or checkpoint.name != name_of(step):
            saved = " and skipped steps, which are not saved; "
            saved += "start again with" if checkpoint is None else f"resume from {checkpoint} with"
        super().__init__(f"stopped after step {step}{saved}: headstart train {config} --run-dir {folder}")


@dataclass
class Interruption:
    """The request to stop a run."""

    requested: bool = False
    signal: int | None = None
    """First signal that this process received."""


@contextmanager
def watching_signals(alone: bool = True) -> Iterator[Interruption]:
    """Turn the first SIGINT, SIGTERM or SIGUSR1 into `requested`; let the second one interrupt at once.

    If the process is not `alone`, only SIGKILL stops it at once: launcher and scheduler may both send the signal.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield interruption
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if interruption.requested:
            if alone:
                raise KeyboardInterrupt
            return
        interruption.requested, interruption.signal = True, number
        # print is not safe here: the signal may have arrived in the middle of a print.
        more = b"; once more stops at once, without saving" if alone else b""
        os.write(2, b"\nstopping: this step is finished and saved" + more + b"\n")

    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
