"""Loss spikes: found against the steps before them, skipped, counted, and the end of a run where they stay."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics

import pytest
import torch

from headstart.errors import UsageError
from headstart.training import spikes, step
from headstart.training.config import ValidationConfig
from headstart.training.loop import train
from headstart.training.optimizer import OptimizerConfig
from headstart.training.spikes import LossHistory
from headstart.training.step import Learner


def history_of(losses: list[float]) -> LossHistory:
    history = LossHistory()
    for loss in losses:
        history.add([loss, 9.0])
    return history


def noise(mean: float, deviation: float, steps: int) -> list[float]:
    generator = random.Random(0)
    return [generator.gauss(mean, deviation) for _ in range(steps)]


def test_the_first_hundred_weigh_alike() -> None:
    losses = noise(3.0, 0.2, 100)
    history = history_of(losses)
    assert history.count == 100
    assert history.mean == pytest.approx(statistics.fmean(losses))
    assert history.variance == pytest.approx(statistics.pvariance(losses))


def test_older_steps_fade() -> None:
    history = history_of(noise(5.0, 0.2, 300) + noise(2.0, 0.1, 700))
    assert history.mean == pytest.approx(2.0, abs=0.05) and math.sqrt(history.variance) == pytest.approx(0.1, abs=0.03)


def test_a_spike_is_far_above_the_steps_before_it() -> None:
    history = history_of(noise(3.0, 0.2, 150))
    limit = history.mean + 6 * math.sqrt(history.variance)
    assert history.spike([limit + 0.01, 1.0], 6.0) == (
        f"loss {limit + 0.01:.3f} is a spike, above {history.mean:.3f} + 6 x {math.sqrt(history.variance):.3f}"
    )
    assert history.spike([limit - 0.01, 99.0], 6.0) == ""
    assert history.spike([0.0, 1.0], 6.0) == ""  # far below is good news
    assert history.spike([1e9, 1.0], 0.0) == ""


def test_nothing_is_a_spike_before_there_is_a_history() -> None:
    losses = noise(3.0, 0.2, 100)
    assert history_of(losses[:99]).spike([99.0], 6.0) == "" != history_of(losses).spike([99.0], 6.0)


def test_a_falling_loss_and_one_that_hardly_moves_are_no_spikes() -> None:
    falling = [2 + 3.5 * math.exp(-i / 60) for i in range(1000)]
    still = [0.001 + 1e-6 * (i % 7) for i in range(1000)]
    for losses in (falling, still):
        for i in range(100, 1000, 50):
            history = history_of(losses[:i])
            assert history.spike([losses[i] * 1.01 + 0.02], 10.0) == ""
    assert history_of(still).spike([0.2], 10.0) != ""


def test_without_head_1_the_first_head_with_a_loss_is_judged() -> None:
    history = LossHistory()
    for loss in noise(3.0, 0.2, 100):
        history.add([math.nan, loss])
    assert history.mean == pytest.approx(3.0, abs=0.1)
    assert history.spike([math.nan, 30.0], 10.0) != "" == history.spike([math.nan, 3.0], 10.0)
    history.add([math.nan, math.nan])
    assert history.count == 100 and history.spike([math.nan], 10.0) == ""


def raise_losses(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Lets the steps numbered so report 100 nats a target more than they saw."""
    monkeypatch.setattr(spikes, "WINDOW", 3)
    original, calls = step.walk_step, [0]

    def walk(*args):
        calls[0] += 1
        seen = original(*args)
        return dataclasses.replace(seen, sums=seen.sums + 100 * seen.counts * (calls[0] in steps))

    monkeypatch.setattr(step, "walk_step", walk)


def test_a_spike_is_skipped_and_told(tiny, metrics, monkeypatch, capsys) -> None:
    raise_losses(monkeypatch, {5})
    applied, original = [], torch.optim.AdamW.step
    config = tiny()
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: applied.append(self) or original(self))
    train(config)
    assert len(applied) == 1 + 6 - 1  # one makes the state
    lines = [line for line in metrics(config.run_dir) if "lr" in line]
    assert [line.get("skipped") for line in lines] == [None, None, None, None, 1, None]
    err = capsys.readouterr().err
    assert "step 5: loss 1" in err and "is a spike, above" in err and "step skipped (1 so far)" in err
    assert "1 steps were skipped" in err


def test_a_threshold_of_0_skips_nothing(tiny, metrics, monkeypatch) -> None:
    raise_losses(monkeypatch, {5})
    config = tiny(optimizer=OptimizerConfig(lr=1e-2, spike_threshold=0.0))
    train(config)
    assert not any("skipped" in line for line in metrics(config.run_dir))


def test_spikes_that_stay_end_the_run(tiny, monkeypatch) -> None:
    raise_losses(monkeypatch, set(range(6, 100)))
    said = r"20 steps in a row were skipped, up to step 25: loss 10\S+ is a spike, .* optimizer.spike_threshold"
    with pytest.raises(UsageError, match=said):
        train(tiny(steps=50, validation=ValidationConfig(every=0)))


class Killed(BaseException):
    pass


def test_a_run_that_goes_on_remembers_its_losses(tiny, monkeypatch) -> None:
    """The numbers in the checkpoint, digit by digit: they decide about the steps to come."""

    def history(config) -> dict[str, float]:
        newest = sorted((config.run_dir / "checkpoints").iterdir())[-1]
        return json.loads((newest / "state.json").read_text())["position"]["history"]

    whole, broken = tiny("whole"), tiny("broken")
    train(whole)
    original, calls = Learner.update, [0]

    def dying(*args):
        calls[0] += 1
        if calls[0] == 4:
            raise Killed
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", dying)
        with pytest.raises(Killed):
            train(broken)
    assert history(broken)["count"] == 2
    train(broken)
    assert history(broken) == history(whole) and history(whole)["count"] == 6
    assert history(whole).keys() == {field.name for field in dataclasses.fields(LossHistory)}


@pytest.mark.parametrize("threshold", [-1.0, math.nan])
def test_impossible_thresholds_are_refused(threshold: float) -> None:
    with pytest.raises(UsageError, match=r"^optimizer.spike_threshold is [^\n]*; it must be at least 0$"):
        OptimizerConfig(spike_threshold=threshold)
