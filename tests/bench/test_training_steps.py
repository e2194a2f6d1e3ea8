"""What the training benchmarks time is the work that they say."""

from __future__ import annotations

import pytest
import torch

from bench import train, training_memory, training_processes
from bench.train import TrainSettings
from bench.training_processes import call_group
from bench.training_steps import Steps, case, case_of, random_batch, run_config
from headstart.model.config import ModelConfig
from headstart.training import step as training_step
from headstart.training.parallel import ParallelConfig
from headstart.training.processes import Processes

MODEL = ModelConfig(vocab_size=60, dim=16, layers=5, attention_heads=2, context=8, heads=4)
ALONE = Processes(torch.device("cpu"))


def test_a_step_trains():
    steps = Steps(run_config(MODEL, 2, device="cpu"), ALONE)
    losses = [sum(steps.step().losses) for _ in range(30)]
    assert losses[-1] < losses[0] - 0.05


def test_the_rows_of_a_step_do_not_depend_on_how_they_are_shared_out():
    config = run_config(MODEL, 4)
    whole, parts = random_batch(config, 0, 4), [random_batch(config, first, 2) for first in (0, 2)]
    assert torch.equal(whole.tokens, torch.cat([part.tokens for part in parts]))
    assert torch.equal(whole.targets, torch.cat([part.targets for part in parts]))
    assert whole.targets.shape == (4, 8, 4)
    second = Steps(run_config(MODEL, 4, device="cpu"), Processes(torch.device("cpu"), rank=0, count=1)).batches
    assert torch.equal(second[0].tokens, whole.tokens)


def test_a_case_alone_sends_nothing():
    answer = case(case_of({"run": run_config(MODEL, 2, device="cpu")}, repetitions=2, steps=1))
    assert len(answer["speeds"]["run"]) == 2 and answer["sent"] == {"run": 0} and answer["memory"] > 0


@pytest.mark.slow  # how often two processes send, and what kind of sum, test_parallel.py counts; this counts the bytes
def test_two_processes_send_what_a_sum_of_gradients_needs():
    config = run_config(MODEL, 2, device="cpu", dtype="float32", parallel=ParallelConfig(sharding="replicate"))
    answer = call_group(config, processes=2, threads=1, steps=1)
    gradients = 4 * MODEL.parameters()["total"]
    # A ring of two sends half of what it sums twice; counts, losses and norms add little.
    assert gradients <= answer["sent"]["run"] < 1.05 * gradients
    assert len(answer["speeds"]["run"]) == training_processes.TURNS


def test_rows_of_processes(monkeypatch):
    seen = []

    def group(config, processes, threads, steps):
        seen.append((config.parallel.sharding, processes, threads))
        # µs a token: 1, 0.5 and 0.8
        speed = {(1, 1): 1e6, (1, 2): 2e6, (2, 1): 1.25e6}[processes, threads]
        return {"speeds": {"run": [speed, speed, 9e6]}, "sent": {"run": 2**20}}

    monkeypatch.setattr(training_processes, "call_group", group)
    settings = TrainSettings(parts=("processes",), dim=16, layers=9, length=8, rows=2, process_rounds=2)
    values = {row["what"]: row["median"] for row in train.run(settings)["measurements"]}
    assert seen == [("full", 1, 1), ("full", 1, 2), ("full", 2, 1), ("replicate", 2, 1)] * 2
    name = "2 processes, 1 thread each, replicate"
    assert values["1 process, 1 thread"] == 1 and values[name] == 0.8
    assert values[f"{name} / 1 process, 1 thread"] == pytest.approx(0.8)
    assert values[f"{name} / 1 process, 2 threads"] == pytest.approx(1.6)
    assert values[f"{name}: sent per step by each"] == 1


@pytest.fixture
def own_step(monkeypatch):
    """The memory case changes the training step of its process for good."""
    monkeypatch.setattr(training_step, "walk_step", training_step.walk_step)


def test_memory_compares_the_walk_with_the_joint_step(in_process, own_step, monkeypatch):
    real, calls = training_memory.joint_step, []
    monkeypatch.setattr(training_memory, "joint_step", lambda *a: calls.append(a) or real(*a))
    settings = TrainSettings(
        parts=("memory",), dim=16, layers=9, length=8, steps=1, threads=1, memory_vocabularies=(300,)
    )  # fmt: skip
    rows = train.run(settings)["measurements"]
    assert [row["what"] for row in rows] == ["V = 300, walk", "V = 300, joint", "V = 300, walk / joint"]
    assert len(calls) == 2 + 2  # of the small model, then of the measured one


def test_the_joint_step_does_the_same_step(own_step):
    walked = Steps(run_config(MODEL, 2, device="cpu", dtype="float32"), ALONE)
    joint = Steps(run_config(MODEL, 2, device="cpu", dtype="float32"), ALONE)
    expected = walked.step()
    training_step.walk_step = training_memory._joint_step
    result = joint.step()
    assert result.losses == pytest.approx(expected.losses, rel=1e-5)
    assert result.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-4)
    for a, b in zip(walked.model.parameters(), joint.model.parameters()):
        assert torch.allclose(a, b, atol=1e-5)
