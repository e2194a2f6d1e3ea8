"""Streaks of skipped steps: nothing in them is saved, what was saved before them stays, and the run resumes from it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headstart.errors import UsageError
from headstart.training import checkpoint_state, checkpoints, spikes, step
from headstart.training.checkpoints import all_steps
from headstart.training.config import CheckpointConfig, RunConfig, ValidationConfig
from headstart.training.interruption import Interrupted
from headstart.training.loop import train
from headstart.training.step import Learner

SILENT = ValidationConfig(every=0)


def fail(monkeypatch: pytest.MonkeyPatch, first: int, last: int, kind: str, at_last=lambda: None) -> None:
    """Make every attempt at the steps `first` to `last` a spike, or its gradient NaN; `at_last` runs in the last."""
    monkeypatch.setattr(spikes, "WINDOW", 3)
    original_walk, number = step.walk_step, [0]

    def walk(model, *args):
        seen = original_walk(model, *args)
        if not first <= number[0] <= last:
            return seen
        if number[0] == last:
            at_last()
        if kind == "spike":
            return dataclasses.replace(seen, sums=seen.sums + 100 * seen.counts)
        for parameter in model.parameters():
            parameter.grad *= float("nan")
        return seen

    original_step = Learner.step

    def counted(self, batches, at):
        number[0] = at + 1
        return original_step(self, batches, at)

    monkeypatch.setattr(step, "walk_step", walk)
    monkeypatch.setattr(Learner, "step", counted)


def root(config: RunConfig) -> Path:
    return config.run_dir / "checkpoints"


def put_in_streak(path: Path, count: int) -> None:
    """Make a checkpoint one that an older Headstart wrote within a streak."""
    state = json.loads((path / "state.json").read_text())
    del state["digest"]
    state["position"]["skipped_in_a_row"] = count
    (path / "state.json").write_text(json.dumps({**state, "format": 1}))


@pytest.mark.parametrize(
    ("kind", "every", "keep_last"), [("spike", 1, 1), ("not finite", 1, 2), ("spike", 3, 1), ("not finite", 2, 1)]
)
def test_a_run_that_diverged_resumes_from_before(tiny, metrics, monkeypatch, kind, every, keep_last) -> None:
    """Step 8 is the first that fails: the weights of step 7 are the suspects, where an older checkpoint is there."""
    config = tiny(steps=40, checkpoints=CheckpointConfig(every, keep_last), validation=SILENT)
    with monkeypatch.context() as patch:
        fail(patch, 8, 99, kind)
        with pytest.raises(UsageError, match="20 steps in a row were skipped, up to step 27: ") as raised:
            train(config)
    assert f"resumes from {root(config)}/step-00000006, from before them" in str(raised.value)
    assert "\n" not in str(raised.value) and max(all_steps(root(config))) == 6
    train(replace(config, steps=12, optimizer=replace(config.optimizer, lr=1e-3)))
    lines = [line for line in metrics(config.run_dir) if "lr" in line]
    assert [line["step"] for line in lines] == list(range(1, 13)) and not any("skipped" in line for line in lines)


def test_the_advice_works_again_and_again(tiny, monkeypatch) -> None:
    """Weights that fail at once after a resume are given up in turn; the last checkpoint never."""
    config = tiny(steps=40, checkpoints=CheckpointConfig(every=2, keep_last=0), validation=SILENT)
    for first, before in ((7, 4), (5, 2), (3, 2)):
        with monkeypatch.context() as patch:
            fail(patch, first, 99, "not finite")
            with pytest.raises(UsageError, match=f"resumes from .*step-{before:08d}, from before them"):
                train(config)
    assert list(all_steps(root(config))) == [2]
    assert sorted(path.name for path in root(config).glob("diverged-*")) == [
        "diverged-step-00000004",
        "diverged-step-00000006",
    ]


def test_without_a_checkpoint_from_before_the_message_says_so(tiny, monkeypatch) -> None:
    config = tiny(steps=40, checkpoints=CheckpointConfig(every=10), validation=SILENT)
    fail(monkeypatch, 8, 99, "spike")
    with pytest.raises(UsageError, match=r"there is no checkpoint from before them, so move .*checkpoints away"):
        train(config)
    assert not all_steps(root(config))


def test_a_checkpoint_that_fell_due_in_a_streak_is_written_behind_it(tiny, metrics, weights, monkeypatch) -> None:
    config = tiny(steps=9, checkpoints=CheckpointConfig(every=5, keep_last=0), validation=SILENT)
    fail(monkeypatch, 5, 6, "spike")
    saved: list[int] = []
    original = checkpoints.CheckpointWriter.save
    monkeypatch.setattr(
        checkpoints.CheckpointWriter,
        "save",
        lambda self, position: saved.append(position.step) or original(self, position),
    )
    train(config)
    assert saved == [7, 9] == list(all_steps(root(config)))
    assert all(checkpoint_state.read_state(path).position.skipped == 2 for path in all_steps(root(config)).values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_streak_keeps_the_checkpoint_from_before(tiny, metrics, weights, monkeypatch, number) -> None:
    settings = {"checkpoints": CheckpointConfig(every=2, keep_last=1), "validation": SILENT, "steps": 10}
    whole, config = tiny("whole", **settings), tiny("broken", **settings)
    train(whole)
    with monkeypatch.context() as patch:
        fail(patch, 6, 8, "spike", lambda: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted) as stopped:
            train(config)
    assert "after step 8 and skipped steps, which are not saved; resume from" in str(stopped.value)
    assert f"{root(config)}/step-00000004 with: headstart train" in str(stopped.value)
    assert list(all_steps(root(config))) == [4]
    train(config)
    assert metrics(config.run_dir) == metrics(whole.run_dir)
    ours, theirs = weights(config.run_dir), weights(whole.run_dir)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_signal_in_a_streak_before_any_checkpoint(tiny, monkeypatch) -> None:
    config = tiny(steps=9, checkpoints=CheckpointConfig(every=0), validation=SILENT)
    fail(monkeypatch, 4, 5, "spike", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="after step 5 and skipped steps, which are not saved; start again with: "):
        train(config)
    assert not all_steps(root(config))


def test_checkpoints_of_an_older_run_within_a_streak_are_passed_over(tiny, monkeypatch, capsys) -> None:
    config = tiny(steps=8, checkpoints=CheckpointConfig(every=2, keep_last=0), validation=SILENT)
    train(config)
    (config.run_dir / "model").rename(config.run_dir / "moved")
    for number, count in ((4, 1), (6, 3), (8, 5)):
        put_in_streak(all_steps(root(config))[number], count)
    capsys.readouterr()
    train(replace(config, steps=10))
    said = capsys.readouterr().err
    for number in (4, 6, 8):
        assert f"step-{number:08d}: was written while steps were being skipped; taking one from before them" in said
    assert f"resuming from {root(config)}/step-00000002" in said


def test_where_every_checkpoint_is_within_a_streak_the_first_is_taken(tiny, capsys) -> None:
    config = tiny(steps=4, checkpoints=CheckpointConfig(every=2, keep_last=0), validation=SILENT)
    train(config)
    for number in (2, 4):
        put_in_streak(all_steps(root(config))[number], 19)
    capsys.readouterr()
    train(replace(config, steps=6))
    said = capsys.readouterr().err
    assert "step-00000002: was written while steps were being skipped, but there is no other" in said
    assert f"resuming from {root(config)}/step-00000002" in said and "in a row" not in said
    assert checkpoint_state.read_state(all_steps(root(config))[6]).position.skipped_in_a_row == 0


def test_a_run_that_ends_within_a_streak_says_so_and_keeps_the_checkpoint_from_before(
    tiny, monkeypatch, capsys
) -> None:
    config = tiny(steps=8, checkpoints=CheckpointConfig(every=4, keep_last=1), validation=SILENT)
    with monkeypatch.context() as patch:
        fail(patch, 7, 8, "spike")
        train(config)
    assert "the last 2 of them, so the weights may be those of a diverged run" in capsys.readouterr().err
    assert list(all_steps(root(config))) == [4, 8]
    train(replace(config, steps=9))
    assert f"resuming from {root(config)}/step-00000004" in capsys.readouterr().err
