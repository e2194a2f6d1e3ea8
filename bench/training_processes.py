"""What does it cost to spread a step over two processes?"""

from __future__ import annotations

import socket
import statistics
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bench import fresh_process
from bench.report import measurement
from bench.training_steps import CASE, case_of, run_config
from headstart.console import say
from headstart.decoding.policy.timing import interleave, ratios
from headstart.training.config import RunConfig
from headstart.training.parallel import ParallelConfig

if TYPE_CHECKING:
    from bench.train import TrainSettings

HEADS = 4
TURNS = 3
"""Turns of one group of processes; its value is their median."""


def measure_processes(settings: TrainSettings) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and notes of the part "processes"."""
    alone = run_config(replace(settings.model(), heads=HEADS), settings.rows, dtype=settings.dtype, device="cpu")
    full = replace(alone, parallel=ParallelConfig(sharding="full"))
    replicate = replace(alone, parallel=ParallelConfig(sharding="replicate"))
    variants = {
        "1 process, 1 thread": (alone, 1, 1),
        "1 process, 2 threads": (alone, 1, 2),
        "2 processes, 1 thread each, full": (full, 2, 1),
        "2 processes, 1 thread each, replicate": (replicate, 2, 1),
    }
    sent: dict[str, int] = {}

    def variant(name: str) -> float:
        config, processes, threads = variants[name]
        answer = call_group(config, processes, threads, settings.steps)
        sent[name] = answer["sent"]["run"]
        return 1e6 / statistics.median(answer["speeds"]["run"])

    times = interleave(
        {name: lambda name=name: variant(name) for name in variants},  # type: ignore[misc]
        settings.process_rounds,
        warmup=0,
    )
    rows = []
    for name in variants:
        rows.append(measurement("processes", name, times[name], "µs/token"))
        say(f"processes: {name}: {rows[-1]['median']:,.1f} µs/token")
    for name, (_, processes, _) in variants.items():
        if processes > 1:
            for base in ("1 process, 1 thread", "1 process, 2 threads"):
                rows.append(measurement("processes", f"{name} / {base}", ratios(times[name], times[base])))
            sends = sent[name] / 2**20
            rows.append(measurement("processes", f"{name}: sent per step by each", [sends], "MiB"))
    notes = [
        f"processes: time of a step over all its tokens, V = 256, n = {HEADS}, {settings.rows} x {settings.length} "
        "tokens a step in every case, FSDP2 over gloo on one machine. Each value is the median of "
        f"{TURNS} turns in fresh processes; the cases take turns.",
        "processes: bytes sent are computed from the sizes of gathers and sums, as a ring of processes sends them.",
    ]
    return rows, notes


def call_group(config: RunConfig, processes: int, threads: int, steps: int) -> dict[str, Any]:
    """What `training_steps.case` gives on the first of `processes` fresh processes of one group."""
    arguments = case_of({"run": config}, TURNS, steps, warmup=1)
    if processes == 1:
        answer: dict[str, Any] = fresh_process.call(CASE, arguments, threads=threads)
        return answer
    port = _free_port()
    with ThreadPoolExecutor(processes) as pool:
        calls = [
            pool.submit(
                fresh_process.call, CASE, arguments, threads=threads, environment=_environment(rank, processes, port)
            )
            for rank in range(processes)
        ]
        answers: list[dict[str, Any]] = [call.result() for call in calls]
    return answers[0]


def _environment(rank: int, count: int, port: int) -> Mapping[str, str]:
    """What torchrun sets."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
