from __future__ import annotations

import json
import math

import pytest

from headstart.training.loop import train
from headstart.training.metrics import step_record
from headstart.training.optimizer import OptimizerConfig
from headstart.training.step import StepResult


def record(result: StepResult, **changes):
    settings = dict(
        step=3, tokens=96, clip=1.0, tokens_per_second=50.0, seconds_at_peak=0.004, memory=2**29
    )  # fmt: skip
    return step_record(result, **{**settings, **changes})


def test_every_name_of_a_step() -> None:
    made = record(
        StepResult(losses=[2.0, 3.0], accuracies=[0.5, 0.25], gradient_norm=1.5, finite=True, lr=0.1),
        tokens_per_pass=1.25,
    )
    assert made == {
        "step": 3, "tokens": 96, "loss/head1": 2.0, "loss/head2": 3.0, "top1/head1": 0.5, "top1/head2": 0.25,
        "expected_tokens_per_pass": 1.25, "lr": 0.1, "grad_norm": 1.5, "clipped": True, "tokens_per_second": 50.0,
        "mfu": pytest.approx(0.2), "memory_gib": 0.5,
    }  # fmt: skip
    assert made["clipped"] is True  # and not 1


def test_what_is_not_known_or_not_finite_is_null() -> None:
    made = record(
        StepResult(losses=[math.nan, 3.0], accuracies=[], gradient_norm=math.inf, finite=False, lr=0.1), memory=None
    )
    assert made["loss/head1"] is None and made["grad_norm"] is None and made["memory_gib"] is None
    assert made["clipped"] is False  # a step that was skipped
    assert "top1/head1" not in made and "expected_tokens_per_pass" not in made
    json.dumps(made, allow_nan=False)


def test_a_run_logs_them(tiny, tmp_path) -> None:
    config = tiny(optimizer=OptimizerConfig(lr=1e-2, clip=1e-6))
    train(config)
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "lr" in line]
    assert all(line["clipped"] for line in steps)
    flops = config.model.flops_per_token(config.length)
    peaks = {round(flops * line["tokens_per_second"] / line["mfu"]) for line in steps}
    assert max(peaks) == pytest.approx(min(peaks), rel=1e-6) and min(peaks) > 1e8
    assert all(0 < line["memory_gib"] < 100 for line in steps)
