from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pytest

from headstart.errors import UsageError
from headstart.training import profiling
from headstart.training.loop import train
from headstart.training.profiling import ProfileConfig
from headstart.training.step import Learner


def trace(config) -> dict:
    (path,) = (config.run_dir / "profile").glob("trace-*.json.gz")
    with gzip.open(path) as file:
        return json.load(file)


def test_the_window_holds_its_steps_and_no_others(tiny, monkeypatch, capsys) -> None:
    from torch.profiler import record_function

    original, calls = Learner.update, []

    def named(*args):
        calls.append(len(calls) + 1)
        with record_function(f"this is step {calls[-1]}"):
            return original(*args)

    monkeypatch.setattr(Learner, "update", named)
    config = tiny(profile=ProfileConfig(start=3, steps=2))
    train(config)
    seen = {e["name"] for e in trace(config)["traceEvents"] if str(e.get("name")).startswith("this is")}
    assert seen == {"this is step 3", "this is step 4"} and len(calls) == 6
    table = (config.run_dir / "profile" / "step3.txt").read_text()
    assert "aten::mm" in table and "Self CPU" in table
    assert f"profile of 2 steps from step 3: {config.run_dir / 'profile' / 'step3.txt'}" in capsys.readouterr().err
    assert sorted(p.name for p in (config.run_dir / "profile").iterdir()) == ["step3.txt", "trace-step3.json.gz"]


def test_off_it_costs_nothing(tiny, monkeypatch) -> None:
    monkeypatch.setattr(profiling, "profile", lambda **_: 1 / 0)
    config = tiny()
    train(config)
    assert not (config.run_dir / "profile").exists()


def test_a_run_that_ends_inside_the_window_writes_what_it_has(tiny, capsys) -> None:
    config = tiny(profile=ProfileConfig(start=5, steps=100))
    train(config)
    assert trace(config)["traceEvents"] and "profile of 2 steps from step 5" in capsys.readouterr().err


def test_a_run_that_goes_on_is_profiled_once_its_process_has_settled(tiny, monkeypatch) -> None:
    monkeypatch.setattr(profiling, "SETTLED", 2)
    train(tiny(steps=4))
    config = tiny(steps=9, profile=ProfileConfig(steps=1))
    train(config)
    assert sorted(p.name for p in (config.run_dir / "profile").iterdir()) == ["step6.txt", "trace-step6.json.gz"]


def test_a_window_that_lies_behind_is_told(tiny, capsys) -> None:
    config = tiny(steps=4)
    train(config)
    train(replace(config, steps=6, profile=ProfileConfig(start=3, steps=3)))  # the run resumes inside it
    assert "profile.start 3 lies behind step 4, where this run resumes: nothing is profiled" in capsys.readouterr().err
    assert not (config.run_dir / "profile").exists()


@pytest.mark.parametrize(
    ("settings", "message"), [({"start": 0}, "profile.start is 0"), ({"steps": -1}, "steps is -1")]
)
def test_windows_that_cannot_be(settings, message) -> None:
    with pytest.raises(UsageError, match=message):
        ProfileConfig(**settings)
