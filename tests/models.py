"""Small models with random weights, and the head kinds and wirings that tests go through."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

WIRINGS = [
    ("transformer", "parallel"),
    ("transformer", "causal"),
    ("transformer", "anticausal"),
    ("linear", "parallel"),
    ("linear", "causal"),
    ("linear", "anticausal"),
    ("replicated", "parallel"),
    ("medusa", "parallel"),
    ("medusa-own", "parallel"),
    ("stern", "parallel"),
    ("sequential", "causal"),
    ("sequential-own", "causal"),
    ("eagle3", "causal"),
]
"""(head kind, wiring) of every kind; "-own" is a kind whose heads do not share their weights."""
every_wiring = pytest.mark.parametrize(("kind", "wiring"), WIRINGS)


def with_heads_of(base: ModelConfig, kind: str, wiring: str = "parallel", **changes: Any) -> ModelConfig:
    """Return `base` with heads of a kind and wiring of `WIRINGS`."""
    return replace(base, head_kind=kind.removesuffix("-own"), shared="-own" not in kind, wiring=wiring, **changes)


def random_model(
    config: ModelConfig, *, dtype: torch.dtype = torch.float32, scale: float = 0.2, seed: int = 0
) -> Transformer:
    """Return a model none of whose weights is 0 or 1: normal around 1 in norms, around 0 elsewhere."""
    model, generator = Transformer(config).to(dtype), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            mean = float(parameter.ndim == 1 and bool(parameter.mean() == 1))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + mean)
    return model
