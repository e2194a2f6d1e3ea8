"""A peer in a process of its own, asked for one variant at a time: see `peers/run.py` for what is said."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
from pathlib import Path
from typing import Any

from bench.peer_environments import PeerError

RUNNER = Path(__file__).with_name("peers") / "run.py"
SOURCE = Path(__file__).parents[1]


class PeerProcess:
    """Starts it and waits until its model is loaded; use it in a `with`.

    Args:
        python: the interpreter that has the peer.
        script: its file in `peers/`.
        case: what it is to load and decode, as JSON.
        threads: CPU threads.
        log: file that takes what it prints.
        limit: seconds that an answer may take.

    Raises:
        PeerError: from here on and from `decode`, where it does not answer, or answers that it failed.
    """

    def __init__(
        self, python: str, script: str, case: dict[str, Any], *, threads: int, log: Path, limit: float = 900
    ) -> None:
        self.log, self.limit = log, limit
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
        }
        # Ours needs this source; a foreign interpreter must not see the packages that lie beside it.
        environment.pop("PYTHONPATH", None)
        if script == "with_headstart":
            environment["PYTHONPATH"] = str(SOURCE)
        with open(log, "wb") as file:
            self._process = subprocess.Popen(
                [python, str(RUNNER), script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=environment,
            )
        try:
            about = self._ask({**case, "threads": threads})
        except PeerError:
            self.close()
            raise
        self.version: str = about["version"]
        self.variants: list[str] = about["variants"]

    def decode(self, variant: str, prompts: list[list[int]]) -> dict[str, Any]:
        """{"stamps", "tokens"} of one run of a variant over prompts of one length."""
        return self._ask({"variant": variant, "prompts": prompts})

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        line = ""
        try:
            stdin.write(json.dumps(question) + "\n")
            stdin.flush()
            if not select.select([stdout], [], [], self.limit)[0]:
                self._process.kill()
                raise PeerError(f"failed: no answer in {self.limit:.0f} s")
            line = stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            said = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((text.strip() for text in reversed(said) if text.strip()), "it said nothing")
            raise PeerError(f"failed: it ended with status {self._process.wait()}; {last[:200]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(f"failed: {answer['error']}")
        return answer

    def close(self) -> None:
        """Ends it: at the end of its input, or after ten seconds."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
