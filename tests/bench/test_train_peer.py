"""Trainer of transformers takes turns with our loop."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from bench import train
from bench.train import Settings


@pytest.mark.parametrize("compile", [False, True])
def test_rows_of_trainer(in_process, monkeypatch, compile):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    settings = Settings(
        parts=("trainer",), dim=16, layers=9, length=8, rows=2, large_vocabulary=300, large_rows=1, repetitions=2,
        steps=2, threads=1, compile=compile,
    )  # fmt: skip
    rows = train.run(settings)["measurements"]
    variants = ["headstart, compiled"] if compile else ["headstart", "headstart, compiled"]
    names = [*variants, "transformers Trainer", *(f"{name} / Trainer" for name in variants)]
    assert [row["what"] for row in rows] == [f"V = {size}: {name}" for size in ("256", "300") for name in names]
    assert all(row["median"] > 0 and row["repetitions"] == 2 for row in rows)
    bars = [row["bar"] for row in rows if row["what"].endswith("/ Trainer")]
    assert bars == [{"sign": ">=", "value": 1.2}] * 2 * len(variants)
