"""Trainer of transformers does the same work as our loop, and takes turns with it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from bench import train
from bench.train_peer import first_step
from bench.train_steps import Steps, TrainSettings, run_config
from headstart.formats.huggingface import load_peer, save_model
from headstart.model.config import ModelConfig
from headstart.training.processes import Processes


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_same_weights_and_batch_give_the_same_loss_and_gradient(tmp_path, dtype, tolerance):
    model = ModelConfig(vocab_size=90, dim=32, layers=3, attention_heads=2, kv_heads=1, context=16)
    steps = Steps(run_config(model, 3, device="cpu", dtype=dtype), Processes(torch.device("cpu")))
    with torch.no_grad():
        for parameter in steps.model.parameters():
            parameter.mul_(10 if parameter.ndim > 1 else 1)  # else every loss is log V, whatever a model does
    save_model(steps.model, tmp_path / "model", dtype=torch.float32)
    peer = load_peer(tmp_path / "model", torch.float32)
    loss, norm = first_step(peer, steps.batches[0], steps.config)
    assert all(parameter.grad is None for parameter in peer.parameters())
    result = steps.step()
    assert loss == pytest.approx(result.losses[0], rel=tolerance)
    assert norm == pytest.approx(result.gradient_norm, rel=tolerance)
    assert abs(loss - torch.tensor(90.0).log().item()) > 0.1


@pytest.mark.parametrize("compile", [False, True])
def test_rows_of_trainer(in_process, monkeypatch, compile):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    settings = TrainSettings(
        parts=("trainer",), dim=16, layers=9, length=8, rows=2, large_vocabulary=300, large_rows=1, repetitions=2,
        steps=2, threads=1, compile=compile,
    )  # fmt: skip
    rows = train.run(settings)["measurements"]
    assert all(row["median"] > 0 for row in rows if row["unit"])
    variants = ["headstart, compiled"] if compile else ["headstart", "headstart, compiled"]
    count = 2 * len(variants) + 2
    for vocab_size, part in (("256", rows[:count]), ("300", rows[count:])):
        names = [*variants, "transformers Trainer", *(f"{name} / Trainer" for name in variants)]
        assert [row["what"] for row in part[:-1]] == [f"V = {vocab_size}: {name}" for name in names]
        assert all(row["repetitions"] == 2 for row in part[:-1])
        assert all(row["bar"] == {"sign": ">=", "value": 1.2} for row in part[len(variants) + 1 : -1])
        same = part[-1]
        assert same["met"] and same["loss"][0] == pytest.approx(same["loss"][1], rel=1e-3)
