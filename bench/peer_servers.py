"""OpenAI-compatible servers of others over the same plain weights, each in its own environment and process."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.peer_environments import PeerError


@dataclass(frozen=True)
class Weights:
    """A plain model, as each peer wants it."""

    directory: Path
    gguf: Path
    context: int
    dtype: str


def _llama_cpp(weights: Weights, slots: int, threads: int) -> list[str]:
    # It decodes one request at a time; by default a new one would even end the one that runs.
    flags = {"model": weights.gguf, "n_ctx": weights.context, "n_threads": threads, "n_threads_batch": threads}
    more = {"interrupt_requests": "false", "verbose": "false"}
    return ["-m", "llama_cpp.server", *(f"--{name}={value}" for name, value in {**flags, **more}.items())]


def _vllm(weights: Weights, slots: int, threads: int) -> list[str]:
    flags = {"model": weights.directory, "dtype": weights.dtype, "max-model-len": weights.context}
    more = {"max-num-seqs": slots, "uvicorn-log-level": "warning"}
    return [
        "-m",
        "vllm.entrypoints.openai.api_server",
        *(f"--{name}={value}" for name, value in {**flags, **more}.items()),
    ]


COMMANDS: dict[str, Callable[[Weights, int, int], list[str]]] = {"llama.cpp": _llama_cpp, "vllm": _vllm}
"""Arguments of a peer's Python, without the address, for so many texts at once and threads."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class PeerServer:
    """Starts one on a free port and waits until it answers; use it in a `with`.

    Args:
        arguments: of `python`, without the address.
        log: file that takes what it prints.
        limit: seconds that its start may take.

    Raises:
        PeerError: it ended, or did not answer in time.
    """

    def __init__(self, python: str, arguments: list[str], *, threads: int, log: Path, limit: float = 600) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment.pop("PYTHONPATH", None)  # a foreign interpreter must not see the packages that lie there
        address = ["--host=127.0.0.1", f"--port={self.port}"]
        with open(log, "wb") as file:
            # A session of its own: vLLM's engine is a process beside its server, and ends with it.
            self._process = subprocess.Popen(
                [python, *arguments, *address], stdout=file, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + limit
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                self.close()
                said = log.read_text(encoding="utf-8", errors="replace").splitlines()
                last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
                raise PeerError(f"failed: its server did not start; {last[:200]}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", "/v1/models")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def close(self) -> None:
        """Ends it and what it has started: by a signal, or after ten seconds by force."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)

    def __enter__(self) -> PeerServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
