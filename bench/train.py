"""Measure training: the cost of a step in time and memory, against fewer heads, limits and a peer."""

from __future__ import annotations

import socket
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench import fresh_process
from bench.fresh_process import ALLOCATOR, joint_step_fits, memory_meter
from bench.report import Bar, Findings, count, run_parts
from bench.train_peer import check_installed, trainer
from bench.train_steps import (
    Part,
    Steps,
    TrainSettings,
    case_of,
    flop_ratio,
    from_plain,
    measure,
    run_config,
    step_case,
)
from headstart.console import say
from headstart.decoding.policy.timing import interleave, ratios
from headstart.errors import UsageError
from headstart.hardware import dtype_on, peak_flops
from headstart.model.config import ModelConfig
from headstart.model.presets import PRESETS
from headstart.objective.walk import walk_step
from headstart.training.config import RunConfig
from headstart.training.parallel import ParallelConfig
from headstart.training.processes import joined, pick_device
from headstart.training.yaml_settings import to_plain
from tests.reference import joint_step

HEADS = 4
"""Heads of the parts processes, compile and memory, and the larger number of gpu."""
SPEED_BAR = Bar(">=", 0.95)
FLOP_BAR = Bar("<=", 1.05)
GPU_FLOP_BAR = Bar("<=", 1.03)
UTILISATION_BAR = Bar(">=", 0.50)
GPU_SIZES = {name: PRESETS[name] for name in ("0.3B", "1.3B")}
GROUP_TURNS = 3
"""Turns of one group of processes, whose median is its value."""


def run(settings: TrainSettings) -> dict[str, Any]:
    """Run the chosen parts and return their results, see `report.result`."""
    here = ON_GPU if settings.device.startswith("cuda") else ON_CPU
    settings = replace(settings, parts=settings.parts or here, dtype=dtype_on(settings.device, settings.dtype))
    for part in settings.parts:
        if part not in here:
            other = "cpu" if part == "processes" else "cuda"
            raise UsageError(
                f"the part {part} does not run on {settings.device}; give --device {other}, or leave it out"
            )
    _check(settings)
    note = (
        f"Each step is `headstart train`'s own, weights float32, {count(settings.threads, 'thread')} unless said, "
        f"{settings.device}{', blocks compiled' if settings.compile else ''}."
    )
    return run_parts("train", settings, {part: PARTS[part] for part in settings.parts}, [note])


def _check(settings: TrainSettings) -> None:
    """Raise UsageError for settings with which a later part would fail after minutes of measuring."""
    for name in ("rows", "large_rows", "gpu_rows", "process_rounds", "repetitions", "steps", "threads"):
        if getattr(settings, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(settings, name)}; it must be at least 1")
    if not (settings.heads and settings.compile_sizes and settings.memory_vocabularies):
        raise UsageError("--heads, --compile-sizes or --memory-vocabularies is empty; give a number, or leave it out")
    for vocab_size in (settings.large_vocabulary, *settings.memory_vocabularies):
        replace(settings.model(), vocab_size=vocab_size)
    for heads in (*settings.heads, HEADS):
        replace(settings.model(), heads=heads)
    for dim, layers in settings.compile_sizes:
        replace(settings.model(), dim=dim, layers=layers, heads=HEADS)
    pick_device(settings.device)
    if "trainer" in settings.parts:
        check_installed()


def heads(part: Part, settings: TrainSettings) -> Findings:
    """Measure a step with more heads at the same number of parameters; `part` is bytes or large-vocabulary."""
    large = part == "large-vocabulary"
    vocab_size, batch_rows = (settings.large_vocabulary, settings.large_rows) if large else (256, settings.rows)
    one = replace(settings.model(), vocab_size=vocab_size)
    models = {str(n): replace(one, heads=n) for n in settings.heads}
    configs = {name: run_config(model, batch_rows, **settings.run_fields()) for name, model in models.items()}
    speeds = measure(configs, settings.repetitions, settings.steps, settings.threads)["speeds"]
    found = Findings(part)
    for name, model in models.items():
        found.measure(f"n = {name}", speeds[name], "tokens/s", heads=model.heads)
    for name, model in models.items():
        if "1" in models and name != "1":
            _over_one_head(found, model, ratios(speeds[name], speeds["1"]), large)
    found.note(
        f"V = {vocab_size:,}, batches of {batch_rows} x {settings.length}. Transformer heads, parallel, taken from the "
        "trunk, so every model has the same number of parameters."
    )
    if large:
        found.note(
            "FLOP ratio: matrix products of a token, 12 L d^2 + V d + 2 T d L and (n-1) V d more, over those of n = 1; "
            "the slowdowns of the paper's Table S5 follow it up to 3B parameters."
        )
    return found


def _over_one_head(found: Findings, model: ModelConfig, faster: list[float], large: bool) -> None:
    n, predicted = model.heads, flop_ratio(model)
    bar = SPEED_BAR if n == 4 and not large else None
    found.measure(f"n = {n} / n = 1 (by products alone: {1 / predicted:.2f})", faster, bar=bar)
    if large:
        over = [1 / ratio / predicted for ratio in faster]
        found.measure(f"n = {n}: step time over its FLOP ratio", over, bar=FLOP_BAR if n == 4 else None)


def processes(settings: TrainSettings) -> Findings:
    """Measure a step over two processes against one process with one and with two threads."""
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

    def start(name: str) -> float:
        config, number, threads = variants[name]
        answer = call_group(config, number, threads, settings.steps)
        sent[name] = answer["sent"]["run"]
        return 1e6 / statistics.median(answer["speeds"]["run"])

    times = interleave({name: partial(start, name) for name in variants}, settings.process_rounds, warmup=0)
    found = Findings("processes")
    for name in variants:
        found.measure(name, times[name], "µs/token")
    for name, (_, number, _) in variants.items():
        if number > 1:
            for base in ("1 process, 1 thread", "1 process, 2 threads"):
                found.ratio(f"{name} / {base}", times[name], times[base])
            found.measure(f"{name}: sent per step by each", [sent[name] / 2**20], "MiB")
    found.note(
        f"time of a step over all its tokens, V = 256, n = {HEADS}, {settings.rows} x {settings.length} tokens a step "
        f"in every case, FSDP2 over gloo on one machine. Each value is the median of {GROUP_TURNS} turns in fresh "
        "processes; the cases take turns. Bytes sent are computed from the sizes of gathers and sums, as a ring of "
        "processes sends them."
    )
    return found


def call_group(config: RunConfig, number: int, threads: int, steps: int) -> dict[str, Any]:
    """Return the answer of `step_case` in the first of `number` fresh processes of one group."""
    case = case_of({"run": config}, GROUP_TURNS, steps, warmup=1)
    if number == 1:
        answer: dict[str, Any] = fresh_process.call(step_case, case, threads=threads)
        return answer
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with ThreadPoolExecutor(number) as pool:
        environments = (_torchrun_environment(rank, number, port) for rank in range(number))
        calls = [
            pool.submit(fresh_process.call, step_case, case, threads=threads, environment=environment)
            for environment in environments
        ]
        answers: list[dict[str, Any]] = [call.result() for call in calls]
    return answers[0]


def _torchrun_environment(rank: int, number: int, port: int) -> Mapping[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in numbers.items()}}


def compiled(settings: TrainSettings) -> Findings:
    """Measure compiled blocks against eager ones, and the time of compiling, for several sizes."""
    found, better = Findings("compile"), []
    for dim, layers in settings.compile_sizes:
        size = f"{dim} x {layers}"
        config = run_config(replace(settings.model(), dim=dim, layers=layers, heads=HEADS), settings.rows)
        configs = {
            name: replace(config, compile=name == "compiled", dtype=settings.dtype, device=settings.device)
            for name in ("eager", "compiled")
        }
        # One turn of warm-up: the two first steps, timed apart, are warm-up too.
        answer = measure(
            configs, settings.repetitions, settings.steps, settings.threads, warmup=1,
            # An earlier run leaves what it compiled in a cache on disk.
            environment={"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
        )  # fmt: skip
        speeds, first = answer["speeds"], answer["first_seconds"]
        for name in configs:
            found.measure(f"{size}, {name}", speeds[name], "tokens/s")
        gain = found.ratio(f"{size}: compiled / eager", speeds["compiled"], speeds["eager"])["median"]
        seconds = first["compiled"] - 2 * config.tokens_per_step / statistics.median(speeds["compiled"])
        found.measure(f"{size}: compiling took", [seconds], "s")
        better.append(f"{size}: {'compiled' if gain > 1 else 'eager'}")
        say(f"compile: {size}: {gain:.2f} of eager, compiling took {seconds:.0f} s")
    found.note(
        f"V = 256, n = {HEADS}, batches of {settings.rows} x {settings.length}; each block through torch.compile, "
        "nothing in its cache. Faster steps, once compiled: " + "; ".join(better) + "."
    )
    return found


def memory(settings: TrainSettings) -> Findings:
    """Measure the memory of a whole training step against ordinary autograd over all heads at once."""
    found, method, batch_rows = Findings("memory"), "", 1
    for vocab_size in settings.memory_vocabularies:
        model = replace(settings.model(), vocab_size=vocab_size, heads=HEADS)
        config = to_plain(run_config(model, batch_rows, **settings.run_fields()))
        peaks: dict[str, list[float]] = {}
        where = f"V = {vocab_size:,}"
        for step in ("walk", "joint"):
            positions = batch_rows * settings.length
            if step == "joint" and not joint_step_fits(settings.device, HEADS, positions, vocab_size):
                found.note(f"joint step at {where} left out, this machine's memory cannot hold it.")
                continue
            case = {"config": config, "step": step, "steps": settings.steps}
            answer = fresh_process.call(memory_case, case, threads=settings.threads, environment=ALLOCATOR)
            peaks[step], method = [answer["bytes"] / 2**20], answer["method"]
            found.measure(f"{where}, {step}", peaks[step], "MiB")
        if "joint" in peaks:
            found.ratio(f"{where}, walk / joint", peaks["walk"], peaks["joint"])
    found.note(
        f"{method}, above the level before the model was built: weights, gradients, "
        f"AdamW's moments, activations, loss. n = {HEADS}, {batch_rows} x {settings.length} tokens, {settings.dtype}. "
        "walk: one head at a time, its logits in chunks; joint: the same training step with ordinary autograd over the "
        "logits of all heads. Each case in a process of its own."
    )
    return found


def memory_case(case: dict[str, Any]) -> dict[str, Any]:
    """Return the peak memory of a training run of some steps, in bytes."""
    config = from_plain(case["config"])
    walk = joint_step if case["step"] == "joint" else walk_step  # in the real training step, all else being the same
    with joined(config.device) as group:
        small = ModelConfig(dim=32, layers=HEADS + 1, heads=HEADS, context=32)
        Steps(replace(config, model=small), group, walk).seconds(2)  # loads the code, which is not counted
        peak = memory_meter(config.device)
        peak.reset()
        Steps(config, group, walk).seconds(case["steps"] + 1)  # AdamW's moments exist from the first update on
        return {"bytes": peak.read(), "method": peak.method}


def gpu(settings: TrainSettings, sizes: Mapping[str, ModelConfig] = GPU_SIZES, compile: bool = True) -> Findings:
    """Measure the share of its peak that a GPU reaches with the paper's sizes, and the memory. Not yet run on a GPU."""
    case = {"dtype": settings.dtype, "device": settings.device}
    # In a process of its own: this one must not hold a part of the GPU.
    peak, source = fresh_process.call(peak_case, case, threads=settings.threads)
    found = Findings("gpu")
    for size, one in sizes.items():
        speeds: dict[int, list[float]] = {}
        memory: dict[int, float] = {}
        for n in (1, HEADS):
            model, what = replace(one, heads=n), f"{size}, n = {n}"
            fields = settings.run_fields() | {"compile": compile}
            config = run_config(model, settings.gpu_rows, **fields)
            # Each alone: the memory is its own, and a GPU has no neighbours that would make turns necessary.
            answer = measure({"run": config}, settings.repetitions, settings.steps, settings.threads)
            speeds[n], memory[n] = answer["speeds"]["run"], (answer["memory"] or 0) / 2**30
            used = [speed * model.flops_per_token(config.length) / peak for speed in speeds[n]]
            speed = found.measure(what, speeds[n], "tokens/s")["median"]
            share = found.measure(f"{what}: MFU", used, bar=UTILISATION_BAR)["median"]
            found.measure(f"{what}: peak memory", [memory[n]], "GiB")
            say(f"gpu: {what}: {speed:,.0f} tokens/s, MFU {share:.2f}, {memory[n]:.1f} GiB")
        over = [ratio / flop_ratio(replace(one, heads=HEADS)) for ratio in ratios(speeds[1], speeds[HEADS])]
        found.measure(f"{size}, n = {HEADS}: step time over its FLOP ratio", over, bar=GPU_FLOP_BAR)
        found.measure(f"{size}: peak memory, n = {HEADS} / n = 1", [memory[HEADS] / memory[1]])
    found.note(
        f"{settings.dtype}, compiled, {settings.gpu_rows} rows of the whole context, each case in a process of its "
        f"own. MFU: FLOPs of a token (`ModelConfig.flops_per_token`) x tokens/s over {peak / 1e12:,.1f} TFLOP/s "
        f"({source})."
    )
    return found


def peak_case(case: dict[str, Any]) -> tuple[float, str]:
    """Return `hardware.peak_flops` of the device."""
    return peak_flops(case["dtype"], case["device"], torch.get_num_threads())


PARTS: dict[Part, Callable[[TrainSettings], Findings]] = {
    "bytes": partial(heads, "bytes"),
    "large-vocabulary": partial(heads, "large-vocabulary"),
    "processes": processes,
    "compile": compiled,
    "trainer": trainer,
    "memory": memory,
    "gpu": gpu,
}
ON_CPU: tuple[Part, ...] = tuple(part for part in PARTS if part != "gpu")
ON_GPU: tuple[Part, ...] = tuple(part for part in PARTS if part != "processes")
