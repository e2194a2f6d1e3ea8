"""Every file in configs/ loads, and the small one runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from headstart.training.config import DataConfig, RunConfig, load_config, save_config
from headstart.training.loop import train

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_loads_and_loads_back(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config
    assert config.run_dir == Path("runs") / path.stem
    assert f"configs/{path.name}" in path.read_text()  # the command at its top


def test_there_are_the_ones_that_are_written_about() -> None:
    assert {"smoke", "bytes-8-heads", "causal-4-heads", "paper-7b-4-heads"} <= {path.stem for path in CONFIGS}


def by_name(name: str) -> RunConfig:
    return load_config(next(path for path in CONFIGS if path.stem == name))


def test_the_papers_is_table_s13() -> None:
    config = by_name("paper-7b-4-heads")
    assert config.tokens_per_step == 8 * 2**20
    assert config.steps * config.tokens_per_step == pytest.approx(209.7e9, rel=1e-3)
    o = config.optimizer
    assert (o.lr, o.warmup_steps, o.final_lr_ratio, o.betas, o.weight_decay, o.clip) == (
        3e-4, 2000, 0.03, (0.9, 0.95), 0.1, 1.0,
    )  # fmt: skip
    assert (config.model.dim, config.model.layers, config.model.attention_heads) == (4096, 32, 32)
    assert config.model.parameters()["total"] == pytest.approx(6.7e9, rel=0.01)
    assert (config.model.heads, config.model.trunk_layers) == (4, 28)


@pytest.mark.parametrize("name", ["smoke", "bytes-8-heads", "causal-4-heads"])
def test_it_trains(name: str, tmp_path: Path) -> None:
    config = by_name(name)
    source = DataConfig(
        sources=(str(Path(__file__).parent.parent / "headstart"),),
        attention_within_documents=config.data.attention_within_documents,
    )
    config = replace(
        config,
        steps=2,
        run_dir=tmp_path / "run",
        device="cpu",
        data=source,
        batch=replace(config.batch, rows=2, length=32),
        validation=replace(config.validation, rows=2),
    )
    train(config)
    first = json.loads((config.run_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert 4.5 < first[f"loss/head{config.model.heads}"] < 6.5
