"""The training benchmarks time the work that they name."""

from __future__ import annotations

import pytest
import torch

from bench import train
from bench.train import GROUP_TURNS, call_group
from bench.train_steps import Steps, TrainSettings, case_of, random_batch, run_config, step_case
from headstart.model.config import ModelConfig
from headstart.training.parallel import ParallelConfig
from headstart.training.processes import Processes
from tests.reference import joint_step

MODEL = ModelConfig(vocab_size=60, dim=16, layers=5, attention_heads=2, context=8, heads=4)
ALONE = Processes(torch.device("cpu"))


def test_a_step_trains():
    steps = Steps(run_config(MODEL, 2, device="cpu"), ALONE)
    losses = [sum(steps.step().losses) for _ in range(30)]
    assert losses[-1] < losses[0] - 0.05


def test_the_rows_of_a_step_do_not_depend_on_the_processes_that_share_them():
    config = run_config(MODEL, 4)
    whole, parts = random_batch(config, 0, 4), [random_batch(config, first, 2) for first in (0, 2)]
    assert torch.equal(whole.tokens, torch.cat([part.tokens for part in parts]))
    assert torch.equal(whole.targets, torch.cat([part.targets for part in parts]))
    assert whole.targets.shape == (4, 8, 4)
    second = Steps(run_config(MODEL, 4, device="cpu"), Processes(torch.device("cpu"), rank=0, count=1)).batches
    assert torch.equal(second[0].tokens, whole.tokens)


def test_a_case_alone_sends_nothing():
    answer = step_case(case_of({"run": run_config(MODEL, 2, device="cpu")}, repetitions=2, steps=1))
    assert len(answer["speeds"]["run"]) == 2 and answer["sent"] == {"run": 0} and answer["memory"] > 0


@pytest.mark.slow  # test_parallel.py counts the collectives of two processes; this counts the bytes
def test_two_processes_send_what_a_sum_of_gradients_needs():
    config = run_config(MODEL, 2, device="cpu", dtype="float32", parallel=ParallelConfig(sharding="replicate"))
    answer = call_group(config, 2, threads=1, steps=1)
    gradients = 4 * MODEL.parameters()["total"]
    # A ring of two sends half of what it sums twice; counts, losses and norms add little.
    assert gradients <= answer["sent"]["run"] < 1.05 * gradients
    assert len(answer["speeds"]["run"]) == GROUP_TURNS


def test_memory_compares_the_walk_with_the_joint_step(in_process):
    settings = TrainSettings(
        parts=("memory",), dim=16, layers=9, length=8, steps=1, threads=1, memory_vocabularies=(300,)
    )  # fmt: skip
    rows = train.run(settings)["measurements"]
    assert [row["what"] for row in rows] == ["V = 300, walk", "V = 300, joint", "V = 300, walk / joint"]


def test_the_joint_step_does_the_same_step():
    walked = Steps(run_config(MODEL, 2, device="cpu", dtype="float32"), ALONE)
    joint = Steps(run_config(MODEL, 2, device="cpu", dtype="float32"), ALONE, joint_step)
    expected = walked.step()
    result = joint.step()
    assert result.losses == pytest.approx(expected.losses, rel=1e-5)
    assert result.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-4)
    for a, b in zip(walked.model.parameters(), joint.model.parameters()):
        assert torch.allclose(a, b, atol=1e-5)
