"""Ctrl-C and SIGTERM: the current step is finished and saved before the program ends."""

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


class Interrupted(Exception):
    """A run was stopped from outside and can go on. The command line prints the message and exits with `status`."""

    status = 130

    def __init__(self, run_dir: Path, step: int, checkpoint: Path) -> None:
        folder = shlex.quote(str(run_dir))
        config = shlex.quote(str(run_dir / "config.yaml"))
        super().__init__(
            f"stopped after step {step}, saved as {checkpoint}; go on with: headstart train {config} --run-dir {folder}"
        )


@dataclass
class Interruption:
    requested: bool = False


@contextmanager
def watching_signals() -> Iterator[Interruption]:
    """Turns the first SIGINT or SIGTERM into `requested`; the second one interrupts at once."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():  # signals only ever reach the main thread
        yield interruption
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if interruption.requested:
            raise KeyboardInterrupt
        interruption.requested = True
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping: this step is finished and saved; once more stops at once, without saving\n")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
