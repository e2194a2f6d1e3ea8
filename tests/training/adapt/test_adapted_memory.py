"""The estimate of `adapt --dry-run` against bytes counted in real steps on an existing model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from live_tensors import LiveTensors

from headstart.data.batches import Batch
from headstart.formats.huggingface import save_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.objective.backends import LossConfig
from headstart.training.adapt.config import AdaptConfig
from headstart.training.adapt.lora import LoraConfig
from headstart.training.adapt.new_heads import config_with_heads
from headstart.training.adapt.run import ExistingModel
from headstart.training.adapted_memory import estimate_adapt
from headstart.training.config import BatchConfig, RunConfig
from headstart.training.memory import layout
from headstart.training.processes import Processes
from headstart.training.step import Learner

ALONE = Processes(torch.device("cpu"))
OLD = ModelConfig(vocab_size=1024, dim=64, layers=4, attention_heads=4, context=96)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old") / "model"
    save_model(Transformer(OLD), folder)
    return folder


def measured(config: RunConfig) -> int:
    """Peak bytes of the second of two steps in the run's last stage."""
    shape, rows = config.model, config.batch.rows
    draw = partial(torch.randint, 0, shape.vocab_size, generator=torch.Generator().manual_seed(0))

    def batch() -> Batch:
        tokens, targets = draw((rows, config.length)), draw((rows, config.length, shape.heads))
        return Batch(tokens, targets, torch.zeros_like(tokens), draw((rows, shape.heads)))

    with LiveTensors() as live:
        learner = Learner(ExistingModel(config, ALONE, sources=()), config, ALONE)
        for _ in range(2):
            live.peak = live.now
            learner.step([batch() for _ in range(config.batch.accumulate)], config.steps - 1)
    return live.peak


LORA, SMALL = LoraConfig(rank=32), LoraConfig(rank=8, dropout=0)


@pytest.mark.parametrize(
    ("dtype", "kind", "loss", "adapt"),
    [
        pytest.param("float32", "transformer", "cross-entropy", {}, id="heads alone"),
        pytest.param("bfloat16", "medusa", "kl", {}, id="heads that learn from the model"),
        pytest.param("float32", "medusa", "cross-entropy", {"mode": "joint", "lora": LORA}, id="lora"),
        pytest.param("bfloat16", "medusa", "cross-entropy", {"mode": "joint", "lora": LORA}, id="lora, bfloat16"),
        pytest.param("float32", "medusa", "cross-entropy", {"mode": "joint", "lora": SMALL}, id="lora, no dropout"),
        pytest.param(
            "float32",
            "transformer",
            "cross-entropy",
            {"mode": "joint", "self_distilled": True, "lora": SMALL},
            id="near the model as it was",
        ),
    ],
)
def test_it_is_what_a_step_takes(dtype: Any, kind: Any, loss: Any, adapt: Any, model: Path, tmp_path: Path) -> None:
    config = RunConfig(
        steps=2,
        run_dir=tmp_path,
        device="cpu",
        dtype=dtype,
        model=config_with_heads(OLD, 3, kind, None),
        batch=BatchConfig(rows=4),
        loss=LossConfig(heads=loss),
        adapt=AdaptConfig(model=model, **adapt),
    )
    assert estimate_adapt(config, layout(config, 1), "cpu").peak == pytest.approx(measured(config), rel=0.12)
