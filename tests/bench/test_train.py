"""The training benchmark: its parts on tiny models, its arithmetic, and settings that it refuses."""

from __future__ import annotations

import importlib.util

import pytest

from bench import train
from bench.train import gpu
from bench.train_steps import TrainSettings, flop_ratio
from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.model.presets import preset

TINY = {
    "heads": (1, 4), "dim": 16, "layers": 5, "length": 8, "rows": 2, "large_vocabulary": 500, "large_rows": 1,
    "repetitions": 2, "steps": 1, "threads": 1,
}  # fmt: skip


def test_speeds_and_ratios_over_one_head(in_process):
    # With one round the ratio is that of its two speeds, whatever else the machine does.
    result = train.run(TrainSettings(parts=("bytes", "large-vocabulary"), **TINY | {"repetitions": 1}))
    rows = result["measurements"]
    assert len(rows) == 3 + 4 and all(row["repetitions"] == 1 and row["median"] > 0 for row in rows)
    assert [(row["part"], row["bar"]["value"]) for row in rows if row["bar"]] == [
        ("bytes", 0.95), ("large-vocabulary", 1.05),
    ]  # fmt: skip
    speeds = {row["heads"]: row["median"] for row in rows if row["unit"] and row["part"] == "large-vocabulary"}
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


def test_gpu_rows_and_bars(in_process):
    sizes = {"small": ModelConfig(vocab_size=300, dim=16, layers=5, context=8)}
    found = gpu(TrainSettings(**TINY, dtype="float32"), sizes, compile=False)
    by_name = {row["what"]: row for row in found.rows}
    assert [row["what"] for row in found.rows if row["bar"]] == [
        "small, n = 1: MFU", "small, n = 4: MFU", "small, n = 4: step time over its FLOP ratio",
    ]  # fmt: skip
    flops = [ModelConfig(vocab_size=300, dim=16, layers=5, context=8, heads=n).flops_per_token(8) for n in (1, 4)]
    peaks = [
        by_name[f"small, n = {n}"]["median"] * f / by_name[f"small, n = {n}: MFU"]["median"]
        for n, f in zip((1, 4), flops)
    ]
    assert peaks[0] == pytest.approx(peaks[1]) and f"{peaks[0] / 1e12:,.1f} TFLOP/s (measured)" in found.notes[0]
    assert by_name["small, n = 4: step time over its FLOP ratio"]["median"] > 0
    assert by_name["small: peak memory, n = 4 / n = 1"]["median"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": ("gpu",)}, "gpu does not run on cpu"),
        ({"parts": ("processes",), "device": "cuda"}, "processes does not run on cuda"),
        ({"heads": (1, 12)}, "12 transformer heads"),
        ({"layers": 4, "heads": (1,)}, "4 transformer heads"),
        ({"compile_sizes": ((30, 6),)}, "model.dim 30"),
        ({"memory_vocabularies": (256, 0)}, "vocab_size is 0"),
        ({"repetitions": 0}, "--repetitions is 0"),
        ({"process_rounds": 0}, "--process-rounds is 0"),
        ({"heads": ()}, "--heads"),
        ({"device": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        train.run(TrainSettings(**{**TINY, **changes}))


def test_a_missing_peer_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else object())
    with pytest.raises(UsageError, match="pip install accelerate"):
        train.run(TrainSettings(**TINY))
