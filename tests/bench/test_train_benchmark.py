from __future__ import annotations

import importlib.util

import pytest

from bench import fresh_process, train
from bench.train import ON_CPU, ON_GPU, TrainSettings
from bench.training_gpu import measure_gpu
from bench.training_steps import flop_ratio
from headstart import hardware
from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.model.presets import preset

TINY = {
    "heads": (1, 4), "dim": 16, "layers": 5, "length": 8, "rows": 2, "large_vocabulary": 500, "large_rows": 1,
    "repetitions": 2, "steps": 1, "threads": 1,
}  # fmt: skip


def names(rows, part):
    return [row["what"] for row in rows if row["part"] == part]


def test_speeds_and_ratios_over_one_head(in_process):
    rows = train.run(TrainSettings(parts=("bytes", "large-vocabulary"), **TINY))["measurements"]
    ratio = "n = 4 / n = 1 (by products alone: {})"
    assert names(rows, "bytes") == ["n = 1", "n = 4", ratio.format("0.63")]
    over = "n = 4: step time over its FLOP ratio"
    assert names(rows, "large-vocabulary") == ["n = 1", "n = 4", ratio.format("0.51"), over]
    assert all(row["repetitions"] == 2 and row["median"] > 0 for row in rows)
    bars = [(row["part"], row["what"], row["bar"]["sign"], row["bar"]["value"]) for row in rows if row["bar"]]
    assert bars == [("bytes", ratio.format("0.63"), ">=", 0.95), ("large-vocabulary", over, "<=", 1.05)]


def test_step_time_over_the_flop_ratio(monkeypatch):
    # Twice as slow with four heads, at a FLOP ratio of 1.5: (12 L d^2 + 4 V d + 2 T d L) / (12 L d^2 + V d + 2 T d L).
    settings = TrainSettings(**{**TINY, "parts": ("large-vocabulary",), "large_vocabulary": 206})
    assert flop_ratio(ModelConfig(vocab_size=206, dim=16, layers=5, context=8, heads=4)) == pytest.approx(1.5, abs=0.01)
    answer = {"speeds": {"1": [20.0, 30.0], "4": [10.0, 15.0]}}
    monkeypatch.setattr(fresh_process, "call", lambda *_, **__: answer)
    row = train.run(settings)["measurements"][-1]
    assert row["median"] == pytest.approx(2 / 1.5, abs=0.01) and row["met"] is False


@pytest.mark.parametrize(
    ("size", "heads", "slower"),
    [("0.3B", 2, 1.08), ("0.3B", 4, 1.24), ("1.3B", 4, 1.12), ("3B", 4, 1.07), ("6.7B", 4, 1.05), ("13B", 2, 1.01)],
)
def test_flop_ratio_is_that_of_the_paper_reference(size, heads, slower):
    assert flop_ratio(preset(size, heads=heads)) == pytest.approx(slower, abs=0.006)


def test_compile_reports_gain_and_the_seconds_of_compiling(monkeypatch):
    asked = []

    def call(function, arguments, *, threads, environment):
        asked.append((arguments["configs"], environment))
        # A step has 16 tokens: 2 s eager, 1 s compiled.
        return {"speeds": {"eager": [8.0, 8.0], "compiled": [16.0, 16.0]}, "first_seconds": {"compiled": 32.0}}

    monkeypatch.setattr(fresh_process, "call", call)
    result = train.run(TrainSettings(parts=("compile",), compile_sizes=((32, 6),), **TINY))
    values = {row["what"]: row["median"] for row in result["measurements"]}
    assert values["32 x 6: compiled / eager"] == 2 and values["32 x 6: compiling took"] == 30
    ((configs, environment),) = asked
    assert configs["compiled"]["compile"] is True and configs["eager"]["compile"] is False
    assert configs["eager"]["model"]["dim"] == 32 and environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] == "1"
    assert "32 x 6: compiled" in result["notes"][-1]


def test_gpu_rows_and_bars(in_process):
    sizes = {"small": ModelConfig(vocab_size=300, dim=16, layers=5, context=8)}
    rows, notes = measure_gpu(TrainSettings(**TINY, dtype="float32"), sizes, compile=False)
    by_name = {row["what"]: row for row in rows}
    assert [row["what"] for row in rows if row["bar"]] == [
        "small, n = 1: MFU", "small, n = 4: MFU", "small, n = 4: step time over its FLOP ratio",
    ]  # fmt: skip
    flops = [ModelConfig(vocab_size=300, dim=16, layers=5, context=8, heads=n).flops_per_token(8) for n in (1, 4)]
    peaks = [
        by_name[f"small, n = {n}"]["median"] * f / by_name[f"small, n = {n}: MFU"]["median"]
        for n, f in zip((1, 4), flops)
    ]
    assert peaks[0] == pytest.approx(peaks[1]) and f"{peaks[0] / 1e12:,.1f} TFLOP/s (measured)" in notes[0]
    assert by_name["small, n = 4: step time over its FLOP ratio"]["median"] > 0
    assert by_name["small: peak memory, n = 4 / n = 1"]["median"] > 0


def test_parts_follow_from_the_device(monkeypatch):
    measured = []
    monkeypatch.setattr(train, "_measure", lambda part, settings: measured.append(part) or ([], []))
    monkeypatch.setattr(train, "pick_device", lambda name: None)
    train.run(TrainSettings(**TINY))
    assert tuple(measured) == ON_CPU and "gpu" not in measured
    measured.clear()
    result = train.run(TrainSettings(device="cuda", **TINY))
    assert tuple(measured) == ON_GPU and "processes" not in measured
    assert result["settings"]["parts"] == list(ON_GPU)


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
def test_wrong_settings_are_refused_before_anything_is_measured(changes, message, monkeypatch):
    monkeypatch.setattr(train, "_measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(UsageError, match=message):
        train.run(TrainSettings(**{**TINY, **changes}))


def test_a_missing_peer_is_told_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(train, "_measure", lambda part, _: ([], []))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else object())
    with pytest.raises(UsageError, match="pip install accelerate"):
        train.run(TrainSettings(**TINY))
    train.run(TrainSettings(**{**TINY, "parts": ("bytes",)}))


def test_the_report_names_the_dtype_that_ran(monkeypatch):
    monkeypatch.setattr(train, "_measure", lambda part, settings: ([], []))
    monkeypatch.setattr(hardware, "_processor", lambda: ("", {"avx512_bf16"}))
    assert train.run(TrainSettings(parts=("bytes",), **TINY))["settings"]["dtype"] == "bfloat16"
    monkeypatch.setattr(hardware, "_processor", lambda: ("", {"avx2"}))
    assert train.run(TrainSettings(parts=("bytes",), **TINY))["settings"]["dtype"] == "float32"
