"""Trackers get what metrics.jsonl gets, and none of them can stop a run."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headstart.errors import UsageError
from headstart.training import loop, trackers
from headstart.training.loop import train
from headstart.training.step import Learner
from headstart.training.trackers import Trackers, WatchConfig, check_packages

RECORD = {
    "step": 2, "tokens": 64, "loss/head1": 1.5, "grad_norm": None, "clipped": True,
    "sample": {"text": "ab", "tokens_per_pass": 1.5, "acceptance": [0.5]},
}  # fmt: skip


class Recorder:
    """A tracker that keeps its records."""

    def __init__(self, start: trackers.Start) -> None:
        self.start, self.told, self.closed = start, [], []

    def log(self, numbers: dict[str, float], samples: dict[str, str], step: int) -> None:
        self.told.append((numbers, samples, step))

    def close(self, failed: bool) -> None:
        self.closed.append(failed)


@pytest.fixture
def recorders(monkeypatch) -> list[Recorder]:
    made: list[Recorder] = []

    def start(settings: trackers.Start) -> Recorder:
        made.append(Recorder(settings))
        return made[-1]

    monkeypatch.setitem(trackers.STARTERS, "trackio", start)
    monkeypatch.setattr(loop, "check_packages", lambda config: None)
    return made


def test_numbers_and_samples_are_told_apart_and_nulls_left_out(recorders, tmp_path) -> None:
    with Trackers(WatchConfig(trackers=("trackio",)), tmp_path / "mine", {}, 0) as watching:
        watching.log(RECORD, 2)
    (recorder,) = recorders
    numbers, samples, step = recorder.told[0]
    assert numbers == {"step": 2, "tokens": 64, "loss/head1": 1.5, "clipped": 1.0, "sample/tokens_per_pass": 1.5,
                       "sample/acceptance/0": 0.5}  # fmt: skip
    assert samples == {"sample/text": "ab"} and step == 2
    assert recorder.start.name == "mine" and recorder.closed == [False]


def test_a_run_tells_every_line_of_its_log(recorders, tiny, metrics) -> None:
    config = tiny(watch=WatchConfig(trackers=("trackio",), sample_tokens=4, name="other"))
    train(config)
    (recorder,) = recorders
    assert [step for *_, step in recorder.told] == [line["step"] for line in metrics(config.run_dir)]
    assert recorder.start.settings["optimizer"]["lr"] == config.optimizer.lr and recorder.start.name == "other"
    assert recorder.closed == [False]


def test_a_tracker_that_fails_is_told_no_more_and_the_run_goes_on(recorders, tiny, monkeypatch, capsys) -> None:
    calls = []

    def fail(self: Recorder, *args: Any) -> None:
        calls.append(args)
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(Recorder, "log", fail)
    train(tiny(watch=WatchConfig(trackers=("trackio",), sample_tokens=0)))
    assert len(calls) == 1
    said = capsys.readouterr().err
    assert said.count("warning: trackio failed and gets no more (no route to host); metrics.jsonl has everything") == 1


def test_a_failed_run_is_told_as_failed(recorders, tiny, monkeypatch) -> None:
    monkeypatch.setattr(Learner, "update", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tiny(watch=WatchConfig(trackers=("trackio",))))
    assert recorders[0].closed == [True]


def test_a_missing_package_is_told_before_anything_is_made(tiny, monkeypatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for name, extra in trackers.EXTRAS.items():
        config = tiny(watch=WatchConfig(trackers=(name,)))  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=rf"the package {name} is missing; pip install 'headstart\[{extra}\]'"):
            train(config)
        assert not config.run_dir.exists()


def test_one_that_does_not_start_closes_those_that_did(recorders, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(trackers.STARTERS, "wandb", lambda start: 1 / 0)
    with pytest.raises(UsageError, match=r"wandb does not start \(division by zero\); run `wandb login`"):
        Trackers(WatchConfig(trackers=("trackio", "wandb")), tmp_path, {}, 0)
    assert recorders[0].closed == [True]


def test_a_tracker_is_named_once() -> None:
    with pytest.raises(UsageError, match="names one twice"):
        WatchConfig(trackers=("wandb", "wandb"))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_reads_back_what_was_logged_across_a_resume(tiny, metrics) -> None:
    pytest.importorskip("tensorboard")
    config = tiny(watch=WatchConfig(trackers=("tensorboard",), sample_tokens=4))
    train(replace(config, steps=4))
    # A step past the checkpoint that a killed process had told TensorBoard of:
    with Trackers(config.watch, config.run_dir, {}, 4) as killed:
        killed.log({"loss/head1": 99.0}, 5)
    train(config)
    found = scalars(config.run_dir / "tensorboard")
    lines = metrics(config.run_dir)
    for name in ("loss/head2", "validation/top1/head1"):
        assert found[name] == [(line["step"], pytest.approx(line[name])) for line in lines if name in line]
    losses = [(line["step"], pytest.approx(line["loss/head1"])) for line in lines if "loss/head1" in line]
    assert found["loss/head1"] == losses
    assert "sample/tokens_per_pass" in found


def test_wandb_offline_goes_on_under_its_id(tmp_path, monkeypatch, capsys) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = WatchConfig(trackers=("wandb",), project="p", name="n")
    ids = []
    for step in (0, 4):
        with Trackers(config, tmp_path, {"model": {"dim": 16}}, step) as watching:
            run = wandb.run
            ids.append(run.id)
            assert run.project == "p" and run.name == "n" and run.config["model"]["dim"] == 16
            watching.log(RECORD, step + 1)
            assert run.summary["loss/head1"] == 1.5 and run.summary["sample/text"] == "ab"
        assert wandb.run is None
    assert ids == [json.loads((tmp_path / "trackers.json").read_text())["wandb"]] * 2
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}/run-{ids[0]}.wandb"))) >= 1
    assert "warning" not in capsys.readouterr().err


def test_trackio_goes_on_under_its_name(tmp_path, monkeypatch) -> None:
    calls: list[tuple[str, Any]] = []
    stand_in = types.ModuleType("trackio")
    for name in ("init", "log", "finish"):
        setattr(stand_in, name, lambda *args, _name=name, **named: calls.append((_name, (args, named))))
    monkeypatch.setitem(sys.modules, "trackio", stand_in)
    for step in (0, 4):
        with Trackers(WatchConfig(trackers=("trackio",), name="n"), tmp_path, {"seed": 1}, step) as watching:
            watching.log({"step": step + 1, "lr": 0.1}, step + 1)
    (_, (_, first)), (_, logged), (end, _), (_, (_, second)), *_ = calls
    assert first == second and first["name"].startswith("n-") and first["resume"] == "allow"
    assert first["project"] == "headstart" and first["config"] == {"seed": 1}
    assert logged == (({"step": 1.0, "lr": 0.1},), {"step": 1}) and end == "finish"


def test_packages_that_are_there_pass(monkeypatch) -> None:
    pytest.importorskip("tensorboard")
    check_packages(WatchConfig(trackers=("tensorboard",)))
