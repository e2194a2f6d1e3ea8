from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from seeds import trained_seed
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from headstart.data.prepare.pipeline import Preparation, prepare
from headstart.data.tokenizers import load_tokenizer
from headstart.model.config import ModelConfig
from headstart.training.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    RunConfig,
    ValidationConfig,
)
from headstart.training.optimizer import OptimizerConfig
from headstart.training.trackers import WatchConfig


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 small documents."""
    folder = tmp_path_factory.mktemp("corpus") / "files"
    folder.mkdir()
    for i in range(24):
        lines = [f"line {j} of text {i}: the cat sat on mat {(i * j) % 7}\n" for j in range(12)]
        (folder / f"{i:02d}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def shards(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "data"
    prepare([str(corpus)], out, load_tokenizer("bytes"), Preparation(validation_fraction=0.2))
    return out


@pytest.fixture
def tiny(shards: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A run of a few steps that takes a fraction of a second: `tiny("name", steps=6, batch=...)`."""

    def make(name: str = "run", **changes: Any) -> RunConfig:
        config = RunConfig(
            steps=6,
            seed=trained_seed(0),
            run_dir=tmp_path / name,
            device="cpu",
            dtype="float32",
            model=ModelConfig(dim=16, layers=3, attention_heads=2, context=24, heads=2),
            data=DataConfig(path=shards),
            batch=BatchConfig(rows=4),
            optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2),
            validation=ValidationConfig(every=2, rows=8),
            checkpoints=CheckpointConfig(every=2, keep_last=2),
            watch=WatchConfig(sample_tokens=0),
        )
        return replace(config, **changes)

    return make


@pytest.fixture
def metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """Lines of metrics.jsonl without the numbers that depend on the clock and on the process."""
    ours_alone = ("tokens_per_second", "mfu", "memory_gib")

    def read(run_dir: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name not in ours_alone} for line in lines]

    return read


@pytest.fixture
def weights() -> Callable[[Path], dict[str, torch.Tensor]]:
    """The float32 tensors of a run's newest checkpoint: weights and optimizer state."""

    def flat(prefix: str, value: Any) -> dict[str, torch.Tensor]:
        if isinstance(value, dict):
            return {name: v for key, item in value.items() for name, v in flat(f"{prefix}.{key}", item).items()}
        return {prefix: value}

    def read(run_dir: Path) -> dict[str, torch.Tensor]:
        newest = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process is one process
            dcp_to_torch_save(newest, run_dir / "whole.pt")
        return flat("", torch.load(run_dir / "whole.pt", weights_only=True))

    return read
