"""Runs that the clock ends: the schedule follows the time, on fast and slow machines, and across a stop."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count, pairwise

import pytest

from headstart.errors import UsageError
from headstart.objective.head_weights import HeadWeights
from headstart.training import loop
from headstart.training.checkpoint_state import Position, read_state
from headstart.training.config import CheckpointConfig, RunConfig, ValidationConfig, load_config
from headstart.training.interruption import Interrupted
from headstart.training.loop import train
from headstart.training.optimizer import OptimizerConfig
from headstart.training.schedule import is_finished, time_spent, timed_rate, weights_of

COSINE = OptimizerConfig(lr=1e-2, warmup_steps=2, final_lr_ratio=0.1)
WSD = replace(COSINE, schedule="wsd", decay_fraction=0.5)


def clock_of(seconds_a_step: float):
    """A clock that the run reads once before its first step and once after each."""
    ticks = count(-1)  # `Run` also reads it when it is made
    return lambda: 1000 + max(0, next(ticks)) * seconds_a_step


@pytest.fixture
def timed(tiny):
    """A run of one minute."""

    def make(name: str = "run", **changes) -> RunConfig:
        settings = {"validation": ValidationConfig(every=0), "checkpoints": CheckpointConfig(every=2)}
        return tiny(name, **{**settings, "minutes": 1.0, "steps": 1000, "optimizer": COSINE, **changes})

    return make


@pytest.mark.parametrize("seconds", [5, 12, 25])
def test_the_clock_ends_the_run_and_the_rate_follows_it(timed, metrics, seconds: int, capsys) -> None:
    config = timed()
    train(config, clock=clock_of(seconds))
    lines = [line for line in metrics(config.run_dir) if "lr" in line]
    steps = math.ceil(60 / seconds)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert [line["seconds"] for line in lines] == [seconds * step for step in range(1, steps + 1)]
    assert [line["lr"] for line in lines] == [timed_rate(i, i * seconds / 60, COSINE) for i in range(steps)]
    assert load_config(config.run_dir / "config.yaml").minutes == 1.0
    said = capsys.readouterr().err
    assert "1 minutes, at most 1,000 steps of" in said and f"done: {steps} steps" in said
    train(config, clock=clock_of(seconds))
    assert f"already trained for {steps} steps" in capsys.readouterr().err


def test_a_stopped_run_resumes_at_its_time(timed, metrics, monkeypatch) -> None:
    whole, stopped = timed("whole"), timed("stopped")
    train(whole, clock=clock_of(10))
    taken = iter(range(3))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop.Run, "count_targets", lambda run, result: setattr(result, "stop", next(taken) == 2))
        train(stopped, clock=clock_of(10))
    assert read_state(stopped.run_dir / "checkpoints" / "step-00000003").position.seconds == 30
    train(stopped, clock=clock_of(10))
    rates = [[line["lr"] for line in metrics(config.run_dir) if "lr" in line] for config in (whole, stopped)]
    assert rates[0] == rates[1] and len(rates[0]) == 6


def test_steps_end_a_timed_run_that_takes_them_first(timed, metrics) -> None:
    config = timed(steps=4)
    train(config, clock=clock_of(1))
    assert [line["step"] for line in metrics(config.run_dir) if "lr" in line] == [1, 2, 3, 4]


@pytest.mark.parametrize("optimizer", [COSINE, WSD], ids=["cosine", "wsd"])
@pytest.mark.parametrize("steps", [8, 200])
def test_the_rate_rises_to_the_peak_and_falls_to_the_final_one(optimizer: OptimizerConfig, steps: int) -> None:
    optimizer = replace(optimizer, warmup_steps=40)
    rates = [timed_rate(step, step / steps, optimizer) for step in range(steps)]
    peak = rates.index(max(rates))
    assert 0.8e-2 < rates[peak] <= 1e-2 and peak <= max(40, steps / 4)
    assert all(a < b for a, b in pairwise(rates[: peak + 1])) and all(a >= b for a, b in pairwise(rates[peak:]))
    assert timed_rate(steps, 1.0, optimizer) == pytest.approx(1e-3)


def test_head_weights_follow_the_clock(timed) -> None:
    config = timed(head_weights=HeadWeights(decay=0.5, curriculum="forward"))
    by_steps = replace(config, minutes=None)
    for share in (0, 0.25, 0.5):
        assert weights_of(1, config, spent=share) == weights_of(int(share * 1000), by_steps)


def test_a_run_is_finished_by_steps_or_by_time(timed) -> None:
    config = timed()
    assert not is_finished(Position(step=999, seconds=59.9), config)
    assert is_finished(Position(step=1000, seconds=1), config) and is_finished(Position(step=3, seconds=61), config)
    assert time_spent(Position(seconds=15), config) == 0.25
    assert time_spent(Position(seconds=15), replace(config, minutes=None)) is None


@pytest.mark.parametrize("minutes", [0, -1, math.nan])
def test_minutes_must_be_above_0(timed, minutes: float) -> None:
    with pytest.raises(UsageError, match=r"minutes is .*; it must be finite and above 0"):
        timed(minutes=minutes)
