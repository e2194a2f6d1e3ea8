"""Trains a configuration with processes that are killed (SIGKILL) at random moments, until it is done.

python killing.py CONFIG.yaml PROCESSES KILLS SEED, with at most KILLS kills. The processes are forked from this one,
which has everything imported already, so that an attempt takes a second. Prints a JSON line for each attempt.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import distributed

from headstart.training import checkpoints, loop
from headstart.training.config import load_config
from headstart.training.processes import LostProcesses

TIMED_OUT = 124
"""Status of a process that should have ended by itself, and did not."""


def child(path: str, rank: int, count: int, port: int) -> int:
    os.environ.update(distributed.environment(rank, count, port))
    torch.set_num_threads(1)
    try:
        loop.train(load_config(path))
    except LostProcesses:
        return LostProcesses.status
    return 0


def steps_in(metrics: Path) -> int:
    """The last step of metrics.jsonl."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    whole = [line for line in lines if line.endswith("}")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def wait_for_a_step(run_dir: Path) -> None:
    """Until this attempt has taken a step: the lines behind the newest checkpoint were cut off first."""
    newest, started = step_of(checkpoints.latest(run_dir)), time.time()
    metrics = run_dir / "metrics.jsonl"
    while time.time() < started + 20:
        time.sleep(0.01)
        if metrics.exists() and metrics.stat().st_mtime > started and steps_in(metrics) > newest:
            return
        if (run_dir / "model").exists():
            return


def step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))


def ended(pid: int, patience: float) -> int:
    """The status of a process, which is killed if it has not ended after `patience` seconds."""
    began = time.monotonic()
    while time.monotonic() < began + patience:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -signal.SIGKILL if patience < 60 else TIMED_OUT


def main() -> None:
    path, count, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    config, chance = load_config(path), random.Random(seed)
    attempt = 0
    while True:
        port = distributed.free_port()
        children = []
        for rank in range(count):
            if (pid := os.fork()) == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                os._exit(child(path, rank, count, port))
            children.append(pid)
        killed = None
        if attempt < kills:
            if attempt % 4:  # some steps and checkpoints into its work; else before or during the start
                wait_for_a_step(config.run_dir)
            time.sleep(chance.uniform(0.0, 0.5))
            killed = chance.randrange(count)
            os.kill(children[killed], signal.SIGKILL)
        # Who is killed before the processes have met leaves the others waiting for it: minutes, unless a launcher ends
        # them, as torchrun does. Once they have met, the others must end by themselves.
        patience = 5.0 if killed is not None and attempt % 4 == 0 else 300.0
        statuses = [ended(pid, patience) for pid in children]
        print(
            json.dumps(
                {
                    "killed": killed,
                    "statuses": statuses,
                    "newest": step_of(checkpoints.latest(config.run_dir)),
                    "steps": steps_in(config.run_dir / "metrics.jsonl"),
                }
            ),
            flush=True,
        )
        attempt += 1
        if not any(statuses):
            return


if __name__ == "__main__":
    main()
