"""The loading benchmark on a small model."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import load, processes
from bench.load import Settings, run
from headstart.errors import UsageError
from headstart.model.config import ModelConfig


def test_bars_hold_only_where_nothing_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"file": 1.0, "load_model": 1.25, "headstart.load": 3.0}

    def fresh(function, case, threads, environment):
        assert function is load.load_case and Path(case["files"][0]).is_file()
        size = {"bfloat16": 2, "float32": 4}[case["dtype"]] * parameters
        return {"seconds": seconds[case["way"]], "peak": 1.1 * size}

    config = ModelConfig(vocab_size=64, dim=128, layers=2, attention_heads=1)
    parameters = config.parameters()["total"]
    monkeypatch.setattr(processes, "call", fresh)
    found = run(Settings(dim=128, layers=2, vocab_size=64, repetitions=2))
    barred = [row for row in found["measurements"] if row["bar"]]
    assert [(row["part"], row["what"]) for row in barred] == [
        ("bfloat16", "load_model / reading the file"),
        ("bfloat16", "load_model: peak memory / size of its parameters"),
    ]
    assert barred[0]["median"] == 1.25 and barred[1]["median"] == pytest.approx(1.1) and found["met"]


def test_a_case_loads_the_model(tmp_path: Path) -> None:
    directory = load.random_directory(Settings(dim=128, layers=2, vocab_size=64), tmp_path / "model")
    files = [str(file) for file in directory.rglob("*.safetensors")]
    for way in load.WAYS:
        one = load.load_case({"way": way, "model": str(directory), "files": files, "dtype": "float32"})
        assert one["seconds"] > 0 and one["peak"] >= 0


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no"):
        run(Settings(model=tmp_path, repetitions=1))
