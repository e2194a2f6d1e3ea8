"""Runs of two processes: the same losses as one, checkpoints for any number, and nothing lost however they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks

sys.path.insert(0, str(Path(__file__).parent))

import distributed

from headstart.data.tokenizers import load_tokenizer
from headstart.formats.huggingface import save_model
from headstart.model.config import ModelConfig
from headstart.training.auxiliary.masked_inputs import MaskConfig
from headstart.training.auxiliary.registers import RegisterConfig
from headstart.training.auxiliary.token_order import TokenOrderConfig
from headstart.training.config import BatchConfig, CheckpointConfig, RunConfig, save_config
from headstart.training.loop import train
from headstart.training.optimizer import OptimizerConfig
from headstart.training.parallel import ParallelConfig
from tests.models import random_model

KILLING = str(Path(__file__).with_name("killing.py"))
# An attempt of two processes takes four seconds on a busy machine, and more are tried by hand: HEADSTART_KILLS=20.
KILLS = int(os.environ.get("HEADSTART_KILLS", "5"))
# With Adam's own epsilon a gradient that is rounding error alone becomes a whole step, and other sums other weights.
TIED = ModelConfig(dim=16, layers=3, attention_heads=2, context=24, heads=2, tied=True)
ADAPTED = """--heads 2 --take-layers --steps 4 --rows 4 --length 24 --dtype float32 --device cpu --lr 1e-2
--warmup-steps 1 --sample-documents 0 --validation-every 2 --checkpoints-every 2"""
SMOOTH = OptimizerConfig(lr=1e-2, warmup_steps=2, eps=1e-3)


@pytest.fixture
def launch(forks: Forks, tmp_path: Path) -> Callable[..., list[tuple[int, str]]]:
    """(status, what was printed) of each of `count` processes that train together; what to do `meanwhile` is given
    their process ids."""

    def run(
        config: RunConfig, *arguments: str, count: int = 2, meanwhile: Callable[[list[int]], None] = lambda pids: None
    ) -> list[tuple[int, str]]:
        port, outputs = distributed.free_port(), [tmp_path / f"process-{rank}.txt" for rank in range(count)]
        environments = [distributed.environment(rank, count, port) for rank in range(count)]
        pids = forks.start(outputs, tmp_path, environments, headstart=command(config, *arguments))
        meanwhile(pids)
        return [(status, output.read_text()) for status, output in zip(forks.finish(), outputs)]

    return run


def command(config: RunConfig, *arguments: str) -> list[str]:
    file = config.run_dir.with_suffix(".yaml")
    save_config(config, file)
    return ["train", str(file), *arguments]


def wait_for_steps(config: RunConfig) -> None:
    file = config.run_dir / "metrics.jsonl"
    for _ in range(3000):
        time.sleep(0.01)
        if file.exists() and file.stat().st_size > 500:
            break


def assert_close(a: Path, b: Path, metrics: Any, weights: Any) -> None:
    first, second = metrics(a), metrics(b)
    assert [line.keys() for line in first] == [line.keys() for line in second]
    for one, other in zip(first, second):
        assert one == pytest.approx(other, rel=1e-4), (one, other)
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys() and any("exp_avg" in name for name in ours)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    "before, after",
    [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow)],
    ids=["from one process to two", "from two processes to one"],
)
def test_a_run_goes_on_with_another_number_of_processes(tiny, launch, metrics, weights, before, after) -> None:
    tied = replace(tiny().model, tied=True)
    whole = tiny("whole", optimizer=SMOOTH, model=tied)
    split = tiny("split", optimizer=SMOOTH, model=tied)
    train(whole)
    for count, steps in ((before, 4), (after, 6)):
        answers = launch(replace(split, steps=steps), "--steps", str(steps), count=count)
        assert [status for status, _ in answers] == [0] * count, answers[0][1][-2000:]
        if count == 2:
            assert "2 processes, 1 copy each shared by 2" in answers[0][1]
            assert answers[1][1] == ""  # one speaks for all
    # The schedule of the first part was one of 4 steps, so the learning rates differ there: compare with the same.
    again = tiny("again", optimizer=SMOOTH, model=tied)
    train(replace(again, steps=4))
    train(replace(again, steps=6))
    assert_close(again.run_dir, split.run_dir, metrics, weights)
    assert (split.run_dir / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("kind", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_two_processes_train_what_one_trains(tiny, launch, metrics, weights, kind) -> None:
    """The run has auxiliary objectives."""
    changes = {
        "optimizer": replace(SMOOTH, kind=kind),
        "batch": BatchConfig(rows=2, accumulate=6),
        "model": replace(tiny().model, vocab_size=258),
        "masked_inputs": MaskConfig("random"),
        "token_order": TokenOrderConfig(1.0),
        "registers": RegisterConfig(0.5, share=0.5),
    }
    one, two = tiny("one", **changes), tiny("two", **changes, parallel=ParallelConfig(sharding="hybrid"))
    train(one)
    answers = launch(two)
    assert [status for status, _ in answers] == [0, 0], answers[0][1][-2000:]
    assert_close(one.run_dir, two.run_dir, metrics, weights)
    assert {"validation/loss/token_order", "validation/loss/registers"} < metrics(two.run_dir)[-1].keys()
    names = {path.name for path in (two.run_dir / "checkpoints" / "step-00000006").iterdir()}
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "rng.pt", "state.json"} <= names


def test_two_processes_start_from_a_trained_model(tiny, launch, metrics, weights, tmp_path) -> None:
    """The first process alone reads it, and drops its third head."""
    shape = replace(tiny().model, layers=4, heads=3, tied=True)
    save_model(random_model(shape, scale=0.1), tmp_path / "model", load_tokenizer("bytes"))
    changes = {"optimizer": SMOOTH, "init_from": tmp_path / "model", "model": replace(shape, layers=3, heads=2)}
    one, two = tiny("one", **changes), tiny("two", **changes)
    train(one)
    answers = launch(two)
    assert [status for status, _ in answers] == [0, 0], answers[0][1][-2000:]
    assert "new: nothing; dropped: head 3" in answers[0][1] and answers[1][1] == ""
    assert_close(one.run_dir, two.run_dir, metrics, weights)


def test_two_processes_adapt_what_one_adapts(shards: Path, tmp_path: Path, metrics: Any, forks: Forks) -> None:
    """All weights of a trained model train from the first step, with heads that are the model's own last blocks."""
    shape = replace(TIED, layers=4, heads=1)
    save_model(random_model(shape, scale=0.1).bfloat16(), tmp_path / "model", load_tokenizer("bytes"))
    given = ["adapt", str(tmp_path / "model"), "--data", str(shards), "--mode", "joint", "--heads-first", "0"]
    given += ADAPTED.split()

    def run(name: str, count: int) -> list[str]:
        port, outputs = distributed.free_port(), [tmp_path / f"{name}-{rank}.txt" for rank in range(count)]
        environments = [distributed.environment(rank, count, port) for rank in range(count)]
        forks.start(outputs, tmp_path, environments, headstart=[*given, "--run-dir", str(tmp_path / name)])
        said = [(status, output.read_text()) for status, output in zip(forks.finish(), outputs)]
        assert [status for status, _ in said] == [0] * count, said[0][1][-3000:]
        return [text for _, text in said]

    run("one", 1)
    said = run("two", 2)
    assert "tokens per pass" in said[0] and said[1] == ""
    first, second = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for one, other in zip(first, second, strict=True):
        assert one == pytest.approx(other, rel=1e-3), (one, other)


@pytest.mark.slow
def test_a_scheduler_stops_it_through_torchrun_and_it_goes_on(tiny, launch, metrics) -> None:
    config = tiny("run", steps=4000, checkpoints=CheckpointConfig(every=0))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [*launcher, "-m", "headstart", *command(config)]
    process = subprocess.Popen(arguments, env=distributed.environment(0, 1, 0), stderr=subprocess.PIPE, text=True)
    wait_for_steps(config)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "stopping: this step is finished and saved\n" in said and "Traceback" not in said.split("stopping")[0]
    (checkpoint,) = (config.run_dir / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert f"stopped after step {step}, saved as {checkpoint}" in said
    assert metrics(config.run_dir)[-1]["step"] == step
    answers = launch(replace(config, steps=step + 2), "--steps", str(step + 2))
    assert [status for status, _ in answers] == [0, 0] and f"resuming from {checkpoint}" in answers[0][1]


def test_a_signal_to_one_process_stops_all_with_the_status_for_a_requeue(tiny, launch) -> None:
    config = tiny("run", steps=4000, checkpoints=CheckpointConfig(every=0))

    def stop(pids: list[int]) -> None:
        wait_for_steps(config)
        os.kill(pids[1], signal.SIGUSR1)
        os.kill(pids[1], signal.SIGTERM)  # launcher and scheduler may both send one: the second does not tear it

    answers = launch(config, meanwhile=stop)
    assert [status for status, _ in answers] == [75, 75], answers
    assert len(list((config.run_dir / "checkpoints").glob("step-*"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("count", [2])  # of one: test_resume.py
def test_kill_9_at_random_moments(tiny, metrics, weights, count) -> None:
    """Any process, at its start, within steps, within checkpoints: lost is only what came after the last checkpoint."""
    every = 3
    changes = {
        "steps": 24 * count,  # one process alone is quicker
        "batch": BatchConfig(rows=4),
        "checkpoints": CheckpointConfig(every=every, keep_last=2),
    }
    whole, broken = tiny("whole", **changes), tiny("broken", **changes)

    def go(config: RunConfig, kills: int) -> list[dict[str, Any]]:
        file = config.run_dir.with_suffix(".yaml")
        save_config(config, file)
        done = subprocess.run(
            [sys.executable, KILLING, str(file), str(count), str(kills), "0"],
            env=distributed.environment(0, 1, 0), capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    go(whole, 0)
    attempts = go(broken, KILLS)
    killed = [attempt for attempt in attempts if attempt["killed"] is not None]
    assert len(killed) >= 3
    for before, attempt in pairwise(attempts):
        assert attempt["newest"] >= before["newest"]
    for attempt in killed:
        # One checkpoint may have been written during the steps.
        assert attempt["newest"] >= attempt["steps"] - 2 * every
        assert sorted(set(attempt["statuses"])) in ([-9], [-9, 1], [-9, 0], [0])  # the others end by themselves
    assert metrics(whole.run_dir) == metrics(broken.run_dir)
    first, second = weights(whole.run_dir), weights(broken.run_dir)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not list((broken.run_dir / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_a_damaged_share_is_named_and_all_go_back(tiny, launch) -> None:
    config = tiny("run")
    assert [status for status, _ in launch(config)] == [0, 0]
    checkpoint = config.run_dir / "checkpoints" / "step-00000006"
    file = checkpoint / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    answers = launch(config, "--steps", "8")
    assert [status for status, _ in answers] == [0, 0], answers
    assert f"warning: {checkpoint}: damaged, {file.name} differs from what was written; delete it" in answers[0][1]
    assert f"resuming from {checkpoint.parent}/step-00000004" in answers[0][1]


def test_errors_are_told_once_and_end_all(tiny, launch) -> None:
    answers = launch(tiny("run", batch=BatchConfig(rows=3)))
    assert [status for status, _ in answers] == [2, 2]
    for _, said in answers:
        assert "3 rows a step cannot be shared by 2 processes; take a multiple of 2 rows" in said
    config = tiny("other", seed=0)
    train(config)
    answers = launch(replace(config, seed=1))
    assert [status for status, _ in answers] == [2, 2]
    assert "holds a run with seed 0, not 1" in answers[0][1] and answers[1][1] == ""


def test_a_process_that_does_not_come(tiny, monkeypatch) -> None:
    from headstart.errors import UsageError
    from headstart.training import processes

    for name, value in distributed.environment(0, 2, distributed.free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "WAIT", processes.timedelta(seconds=1))
    with pytest.raises(
        UsageError, match=r"^process 0 of 2: the others did not come \([^\n]*\); start all of them with"
    ):
        train(tiny())


@pytest.mark.parametrize(
    "rank, size, message",
    [("2", "2", "RANK is 2 of WORLD_SIZE 2"), ("0", "two", "WORLD_SIZE is 'two'"), ("0", "0", "RANK is 0 of WORLD_")],
)
def test_an_environment_that_makes_no_sense(tiny, monkeypatch, rank, size, message) -> None:
    from headstart.errors import UsageError

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UsageError, match=message):
        train(tiny())


@pytest.mark.parametrize(
    "rows, accumulate, processes, expected",
    [
        (8, 1, 1, (1, 8)),
        (8, 1, 2, (1, 4)),
        (2, 1024, 64, (16, 2)),
        (8, 3, 2, (2, 6)),
        (3, 2, 2, (1, 3)),
        (7, 2, 14, (1, 1)),
    ],
)
def test_a_step_is_shared_out(tiny, rows, accumulate, processes, expected) -> None:
    config = tiny(batch=BatchConfig(rows=rows, accumulate=accumulate))
    count, at_once = config.micro_batches(processes)
    assert (count, at_once) == expected and count * at_once * processes == rows * accumulate
