"""The client of forked.py: commands and programs in processes that have everything imported when they start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


class Forks:
    """One server, which forks the processes of one request at a time."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(TESTS / "forked.py")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start(
        self, outputs: Sequence[Path], folder: Path, environments: Sequence[dict[str, str]] = ({},), **task: Any
    ) -> list[int]:
        """Process ids of as many processes as `outputs`, files for what they print, that do `headstart=[arguments]` or
        `program=text` (with `arguments`) in `folder`. `finish` comes before the next `start`."""
        assert self._server.stdin is not None
        request = {"outputs": [str(each) for each in outputs], "folder": str(folder), "environments": environments}
        print(json.dumps({**request, **task}), file=self._server.stdin, flush=True)
        pids: list[int] = self._answer()
        return pids

    def finish(self) -> list[int]:
        """Their exit statuses; that of a process that was killed is minus the signal."""
        statuses: list[int] = self._answer()
        return statuses

    def _answer(self) -> Any:
        assert self._server.stdout is not None
        return json.loads(self._server.stdout.readline())

    def run(self, output: Path, folder: Path, **task: Any) -> tuple[int, str]:
        """(exit status, what was printed) of one process."""
        self.start([output], folder, **task)
        return self.finish()[0], output.read_text()

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        try:
            self._server.wait(60)
        except subprocess.TimeoutExpired:
            self._server.send_signal(signal.SIGKILL)
