"""`ModelConfig.flops_per_token` counts what the training step multiplies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from headstart.model.config import ModelConfig
from headstart.model.presets import preset
from headstart.model.transformer import Transformer
from headstart.objective.inputs import StepInputs, count_targets
from headstart.objective.objective import Objective
from headstart.objective.walk import walk_step

ROWS, LENGTH = 2, 16
SMALL = ModelConfig(vocab_size=50, dim=32, layers=5, attention_heads=4, context=LENGTH, heads=3)
SHAPES = {
    "transformer": SMALL,
    "causal": replace(SMALL, wiring="causal"),
    "extra layers": replace(SMALL, extra_layers=2),
    "linear": replace(SMALL, head_kind="linear"),
    "linear anticausal": replace(SMALL, head_kind="linear", wiring="anticausal"),
    "replicated": replace(SMALL, head_kind="replicated"),
    "medusa": replace(SMALL, head_kind="medusa"),
    "medusa with unembeddings": replace(SMALL, head_kind="medusa", shared=False, tied=True),
    "stern": replace(SMALL, head_kind="stern"),
    "sequential": replace(SMALL, head_kind="sequential", wiring="causal"),
    "sequential apart": replace(SMALL, head_kind="sequential", wiring="causal", shared=False),
    "one sequential head": replace(SMALL, head_kind="sequential", wiring="causal", heads=1),
    "one head": replace(SMALL, heads=1),
    "wide": replace(SMALL, kv_heads=2, head_dim=12, hidden_dim=40, tied=True),
}


@pytest.mark.parametrize("name", SHAPES)
def test_it_equals_what_the_walk_multiplies(name: str) -> None:
    config = SHAPES[name]
    torch.manual_seed(0)
    model = Transformer(config)
    tokens = torch.randint(0, 50, (ROWS, LENGTH + config.ahead))
    targets = torch.randint(0, 50, (ROWS, LENGTH, config.heads))
    # In bf16 on a CPU attention is written out in plain products over all pairs, as PaLM counts it.
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        walk_step(
            model, StepInputs(tokens, targets), count_targets(targets), Objective(budget=4 * 50 * 7)
        )  # several chunks of logits
    assert counter.get_total_flops() == config.flops_per_token(LENGTH) * ROWS * LENGTH


def test_the_rule_of_thumb() -> None:
    """6 FLOPs a parameter and token, for a large model with one head in short rows."""
    config = preset("6.7B")
    assert config.flops_per_token(1) == pytest.approx(6 * config.parameters()["total"], rel=0.03)
