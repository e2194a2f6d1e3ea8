"""The training benchmark: its parts on tiny models, its arithmetic, and settings that it refuses."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from bench import train
from bench.train import Settings, Steps, flop_ratio, run_config
from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.model.presets import preset
from headstart.training.processes import Processes
from tests.reference import joint_step

TINY = {
    "heads": (1, 4), "dim": 16, "layers": 5, "length": 8, "rows": 2, "large_vocabulary": 500, "large_rows": 1,
    "repetitions": 2, "steps": 1, "threads": 1,
}  # fmt: skip


def test_speeds_and_ratios_over_one_head(in_process):
    # With one round the ratio is that of its two speeds, whatever else the machine does.
    result = train.run(Settings(parts=("bytes", "large-vocabulary"), **TINY | {"repetitions": 1}))
    rows = result["measurements"]
    assert len(rows) == 3 + 4 and all(row["repetitions"] == 1 and row["median"] > 0 for row in rows)
    assert [(row["part"], row["bar"]["value"]) for row in rows if row["bar"]] == [
        ("bytes", 0.95), ("large-vocabulary", 1.05),
    ]  # fmt: skip
    speeds = {
        row["details"]["heads"]: row["median"] for row in rows if row["unit"] and row["part"] == "large-vocabulary"
    }
    model = ModelConfig(vocab_size=500, dim=16, layers=5, context=8, heads=4)
    time_ratio = rows[-1]["median"] * flop_ratio(model)
    assert time_ratio == pytest.approx(speeds[1] / speeds[4], rel=1e-6)
    assert result["settings"]["dtype"] in ("float32", "bfloat16")  # the one that ran


@pytest.mark.parametrize(
    ("size", "heads", "slower"),
    [("0.3B", 2, 1.08), ("0.3B", 4, 1.24), ("1.3B", 4, 1.12), ("3B", 4, 1.07), ("6.7B", 4, 1.05), ("13B", 2, 1.01)],
)
def test_flop_ratio_is_that_of_the_paper_reference(size, heads, slower):
    assert flop_ratio(preset(size, heads=heads)) == pytest.approx(slower, abs=0.006)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": (1, 12)}, "12 transformer heads"),
        ({"large_vocabulary": 0}, "vocab_size is 0"),
        ({"repetitions": 0}, "--repetitions is 0"),
        ({"heads": ()}, "--heads"),
        ({"device": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        train.run(Settings(**{**TINY, **changes}))


def test_a_missing_peer_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else object())
    with pytest.raises(UsageError, match="pip install accelerate"):
        train.run(Settings(**TINY))


def test_a_step_trains_and_the_joint_step_does_the_same():
    config = run_config(
        ModelConfig(vocab_size=60, dim=16, layers=5, attention_heads=2, context=8, heads=4), 2, device="cpu",
        dtype="float32",
    )  # fmt: skip
    walked, joint = (Steps(config, Processes(torch.device("cpu")), *walk) for walk in ((), (joint_step,)))
    expected, result = walked.step(), joint.step()
    assert result.losses == pytest.approx(expected.losses, rel=1e-5)
    assert result.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-4)
    losses = [sum(walked.step().losses) for _ in range(30)]
    assert losses[-1] < losses[0] - 0.05
