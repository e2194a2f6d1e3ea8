"""The claim of the paper's section 2: memory grows neither with the number of heads nor with the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from live_tensors import LiveTensors

from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.objective.cross_entropy import LOGITS_BYTES
from headstart.objective.inputs import StepInputs, count_targets
from headstart.objective.objective import Objective
from headstart.objective.walk import score_step, walk_step
from tests.reference import joint_step

B, T, V = 2, 64, 4096
# Every head is added on top, so that trunks are the same for all n and only heads differ.
SMALL = ModelConfig(vocab_size=V, dim=32, layers=4, attention_heads=4, context=T)
BUDGET = 16 * 4 * V
WIRINGS = [
    ("transformer", "parallel"),
    ("transformer", "causal"),
    ("transformer", "anticausal"),
    ("linear", "parallel"),
    ("linear", "causal"),
    ("replicated", "parallel"),
]


def measure(config: ModelConfig, step: Callable[..., Any], budget: int = LOGITS_BYTES) -> LiveTensors:
    model = Transformer(config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # gradients are parameters' memory, not the step's
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, V, (B, T), generator=generator)
    targets = torch.randint(0, V, (B, T, config.heads), generator=generator)
    counts = count_targets(targets)
    arguments = [] if step is score_step else [counts, Objective(budget=budget)]
    step(model, StepInputs(tokens, targets), *arguments)
    with LiveTensors() as live:
        step(model, StepInputs(tokens, targets), *arguments)
    return live


def with_heads(kind: str, wiring: str, n: int) -> ModelConfig:
    extra = n - 1 if kind == "transformer" else 0
    return replace(SMALL, head_kind=kind, wiring=wiring, heads=n, extra_layers=extra)


def test_the_counter_counts() -> None:
    with LiveTensors() as live:
        a = torch.ones(1000)
        b = a.view(10, 100).add_(1)
        assert live.now == 4000
        c = b * 2
        assert live.now == 8000
        del c
        assert live.now == 4000
        x = torch.ones(1000, requires_grad=True)
        y = x.exp().exp()  # the inner exponential is kept for the backward alone
        assert live.now == 16000
        y.sum().backward()
        del y
        assert live.now == 12000  # a, x and its gradient
    assert live.peak >= 16000 and live.largest == 1000


@pytest.mark.parametrize("kind", ["transformer", "linear", "replicated"])
def test_the_walk_needs_as_much_for_eight_heads_as_for_one(kind: str) -> None:
    one, eight = (measure(with_heads(kind, "parallel", n), walk_step, budget=BUDGET).peak for n in (1, 8))
    assert eight < 1.05 * one, (one, eight)
    # What it is compared with: joint autograd holds every head's logits.
    joint_one, joint_eight = (measure(with_heads(kind, "parallel", n), joint_step).peak for n in (1, 8))
    assert joint_eight > joint_one + 7 * B * T * V * 4
    assert eight < joint_eight / 8


@pytest.mark.parametrize(("kind", "wiring"), WIRINGS)
def test_no_tensor_is_as_large_as_the_logits(kind: str, wiring: str) -> None:
    live = measure(with_heads(kind, wiring, 4), walk_step, budget=BUDGET)
    assert live.largest < B * T * V
    # Chains keep the activations of the heads on the way, never their logits.
    assert live.peak < B * T * V * 4 + measure(with_heads(kind, wiring, 1), walk_step, budget=BUDGET).peak
    assert measure(with_heads(kind, wiring, 4), joint_step).largest >= B * T * V * 4


def test_memory_follows_the_budget() -> None:
    config = with_heads("transformer", "parallel", 2)
    small, large = (measure(config, walk_step, budget=budget) for budget in (BUDGET, 8 * BUDGET))
    # One chunk of fp32 logits and the temporaries of its softmax.
    assert 7 * BUDGET * 0.5 < large.peak - small.peak < 7 * BUDGET * 3


def test_scoring_holds_one_head_at_a_time() -> None:
    one, eight = (measure(with_heads("replicated", "parallel", n), score_step).peak for n in (1, 8))
    assert eight < 1.05 * one
