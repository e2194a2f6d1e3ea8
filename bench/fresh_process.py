"""A measurement in a process of its own: its own thread count, its own allocator settings, its own peak memory."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headstart.errors import UsageError


def call(
    function: str, arguments: Mapping[str, Any], *, threads: int, environment: Mapping[str, str] | None = None
) -> Any:
    """`function` ("module:name") of the JSON object `arguments`, in a new Python with `threads` threads.

    What it prints goes to stderr. A UsageError in there rises here; any other failure is a RuntimeError.
    """
    source = str(Path(__file__).parents[1])
    inherited = os.environ.get("PYTHONPATH")
    done = subprocess.run(
        [sys.executable, "-m", "bench.fresh_process", function, str(threads)],
        input=json.dumps(arguments),
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            # Set before torch is loaded: its OpenMP pool keeps the size it starts with.
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "PYTHONPATH": source if not inherited else f"{source}{os.pathsep}{inherited}",
            **(environment or {}),
        },
    )
    if done.returncode:
        raise RuntimeError(f"{function} ended with status {done.returncode} in its own process; its output is above")
    answer = json.loads(done.stdout)
    if "usage_error" in answer:
        raise UsageError(answer["usage_error"])
    return answer["result"]


def _serve(function: str, threads: int) -> None:
    # Libraries may print: the answer has the real stdout to itself.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        import torch

        torch.set_num_threads(threads)
        module, name = function.split(":")
        try:
            answer = {"result": getattr(importlib.import_module(module), name)(json.load(sys.stdin))}
        except UsageError as error:
            answer = {"usage_error": str(error)}
        json.dump(answer, out)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
