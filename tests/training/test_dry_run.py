"""`headstart train --dry-run`: what it says, what it refuses, and that it starts and writes nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart import cli, hardware
from headstart.commands.train import TrainSettings
from headstart.errors import UsageError
from headstart.training import estimate as module
from headstart.training.estimate import format_dry_run, parse_bytes

CONFIGS = Path(__file__).parents[2] / "configs"
SMOKE, PAPER = CONFIGS / "smoke.yaml", CONFIGS / "paper-7b-4-heads.yaml"


def dry_run(path: Path, arguments: list[str]) -> dict[str, Any]:
    settings = TrainSettings.parse([str(path), "--dry-run", *arguments])
    return settings.dry_run.estimate(settings.run, str(path))


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["headstart", "train", *arguments])
    cli.main()


def test_the_command_prints_and_leaves_nothing(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, str(PAPER), "--dry-run", "--processes", "64", "--device-memory", "80GiB")
    out = capsys.readouterr().out
    assert "6,700,666,880 parameters, 4 transformer heads, parallel" in out
    assert "25,000 steps of 8,388,608 tokens (2,048 rows of 4,096): 209,715,200,000 tokens in all" in out
    assert "64 processes, 64 share one copy of the weights; a step is 16 micro-batches of 2 rows for each" in out
    assert "in 80.00 GiB" in out and "H100 4." in out
    assert not list(tmp_path.iterdir())
    assert not (torch.distributed.is_available() and torch.distributed.is_initialized())


def test_the_table_adds_up(monkeypatch, capsys) -> None:
    call(monkeypatch, str(PAPER), "--dry-run", "--processes", "8", "--json")
    found = json.loads(capsys.readouterr().out)
    sums = {moment: sum(held.values()) for moment, held in found["moments"].items()}
    assert found["peak_bytes"] == sums[found["peak_moment"]] == max(sums.values())
    lines = format_dry_run(found).splitlines()
    start, end = (next(i for i, line in enumerate(lines) if line.startswith(word)) for word in ("---", "all "))
    shown = [float(line.split()[-1]) for line in lines[start + 1 : end + 1]]
    assert sum(shown[:-1]) == pytest.approx(shown[-1], abs=0.01 * len(shown))


def test_settings_of_the_run_are_taken_too() -> None:
    found = dry_run(SMOKE, ["--steps", "7", "--batch.rows", "16", "--processes", "2", "--run-dir", "elsewhere"])
    assert (found["steps"], found["tokens_per_step"], found["processes"]) == (7, 16 * 256, 2)
    assert (found["rows"], found["micro_batches"]) == (8, 1)


def test_time_is_work_over_speed() -> None:
    found = dry_run(PAPER, ["--processes", "64", "--mfu", "0.5"])
    # 6 x 6.7e9 weights, three unembeddings more, attention over 4,096 positions in 32 layers.
    per_token = 6 * (6.7e9 + 2 * 0.131e9) + 12 * 32 * 4096 * 4096
    assert found["flops_per_token"] == pytest.approx(per_token, rel=0.01)
    assert found["flops"] == found["flops_per_token"] * found["tokens"]
    assert found["hours"]["H100"] == pytest.approx(found["flops"] / (64 * 0.5 * 989e12) / 3600)
    assert dry_run(SMOKE, [])["hours"] == {}


def test_whether_it_fits(monkeypatch) -> None:
    needed = dry_run(PAPER, ["--processes", "64"])["peak_bytes"]
    verdicts = {}
    for times in (0.9, 1.05, 1.2):
        found = dry_run(PAPER, ["--processes", "64", "--device-memory", f"{int(needed * times)}"])
        verdicts[times] = (found["fits"], module._verdict(found))
    assert [fits for fits, _ in verdicts.values()] == [False, False, True]
    assert verdicts[0.9][1].startswith("does not fit") and "parallel.activation_checkpointing" in verdicts[0.9][1]
    assert verdicts[1.05][1].startswith("tight") and verdicts[1.2][1].startswith("fits")
    monkeypatch.setattr(hardware, "available_memory", lambda: 10 * 2**20)
    assert dry_run(SMOKE, ["--device", "cpu"])["fits"] is False
    if not torch.cuda.is_available():
        assert dry_run(SMOKE, ["--processes", "2"])["fits"] is None


def test_the_advice_is_for_the_largest_part() -> None:
    def advice(largest: str, **more: object) -> str:
        moments = {"x": {largest: 2, "other": 1}}
        return module.advise({"moments": moments, "peak_moment": "x", "activation_checkpointing": False, **more})

    assert "reduce_each_micro_batch" in advice("gradients before they are shared out (float32)")
    assert "parallel.activation_checkpointing" in advice("activations of the trunk")
    assert advice("activations of the trunk", activation_checkpointing=True).startswith("Halve batch.rows")
    assert "--processes" in advice("optimizer state")


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("80 GB", 80 * 10**9), ("512mib", 2**29), ("1.5TiB", 3 * 2**39), ("1e9", 10**9)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0"], "--processes is 0; it must be at least 1"),
        (["--processes", "3"], "= 8 rows a step cannot be shared by 3 processes"),
        (["--device-memory", "80XB"], "--device-memory '80XB' is no size; write it as 80GiB"),
        (["--device-memory", "lots"], "is no size"),
        (["--device-memory", "1.2.3GiB"], "is no size"),
        (["--device-memory", "0GiB"], "must be above 0"),
        (["--mfu", "0"], "--mfu is 0.0; it must be above 0 and at most 1"),
        (["--model.heads", "9"], "leave no layer"),
    ],
)
def test_wrong_use_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dry_run(SMOKE, arguments)


def test_without_data_it_needs_the_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 3\ndata: {path: nowhere}\nmodel: {preset: 1M}\n")
    with pytest.raises(UsageError, match=r"nowhere: no such folder.*; or give model.vocab_size, which is all"):
        dry_run(path, [])
    assert dry_run(path, ["--model.vocab-size", "4000"])["parameters"] > 10**6
    path.write_text("steps: 3\ndata: {path: nowhere}\nmodel: {preset: 1X}\n")
    with pytest.raises(UsageError, match=r"no size is called '1X'"):
        dry_run(path, [])
