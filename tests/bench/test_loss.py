from __future__ import annotations

from dataclasses import asdict

import pytest

from bench import loss, processes
from bench.loss import Settings
from headstart import hardware
from headstart.model.config import ModelConfig

TINY = {"vocab_size": 300, "rows": 1, "length": 16, "dim": 16, "layers": 9, "repetitions": 1}


def test_memory_has_a_case_for_each_step_and_number_of_heads(in_process):
    result = loss.run(Settings(heads=(1, 4, 8), **TINY))
    names = [row["what"] for row in result["measurements"]]
    assert names == [
        *(f"{step}, n = {n}{time}" for n in (1, 4, 8) for step in ("walk", "joint") for time in ("", ": a step")),
        "walk, same trunk, n = 8",
        "walk, same trunk, n = 8: a step",
        "walk n = 8 / walk n = 1",
        "walk n = 8 / walk n = 1, same trunk",
        "walk / joint, n = 4",
        "walk / joint, n = 4: a step",
        "walk / joint, n = 8",
        "walk / joint, n = 8: a step",
    ]
    bars = {row["what"]: row["bar"] for row in result["measurements"] if row["bar"]}
    assert bars == {
        "walk n = 8 / walk n = 1": {"sign": "<=", "value": 1.05},
        "walk / joint, n = 4": {"sign": "<=", "value": 0.25},
    }


def test_joint_steps_that_cannot_fit_are_left_out_and_said_so(in_process, monkeypatch):
    monkeypatch.setattr(hardware, "available_memory", lambda: 1)
    result = loss.run(Settings(heads=(1,), **TINY))
    assert [row["what"] for row in result["measurements"]] == ["walk, n = 1", "walk, n = 1: a step"]
    assert any("joint step at n = 1 left out" in note for note in result["notes"])


def test_peak_holds_what_a_step_holds():
    # A joint step holds at least one whole logits tensor, 8 MiB here.
    config = asdict(ModelConfig(vocab_size=16384, dim=16, layers=9, context=128))
    case = {"step": "joint", "config": config, "rows": 1, "length": 128, "repetitions": 1, "device": "cpu"}
    answer = processes.call(loss.memory_case, case, threads=1, environment=processes.ALLOCATOR)
    if "VmHWM" not in answer["method"]:
        pytest.skip("this system cannot reset a peak")
    assert 8 <= answer["mebibytes"][0] < 200
