"""How much memory a run on an existing model needs: `memory.estimate`, less what frozen weights do not take."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from headstart.model.transformer import Transformer
from headstart.training.adapt.new_heads import freeze, new_parameters
from headstart.training.adapt.run import trained_parameters
from headstart.training.config import RunConfig
from headstart.training.memory import FLOAT32, Estimate, Layout, estimate
from headstart.training.optimizer import parameter_groups


def estimate_adapt(config: RunConfig, layout: Layout, device: Literal["cpu", "gpu"]) -> Estimate:
    """Return the memory of a step in which the most is trained. Frozen weights have neither gradients nor optimizer
    state; a frozen trunk keeps nothing for a backward pass."""
    adapt = config.adapt
    assert adapt is not None
    whole = estimate(replace(config, adapt=None), layout, device)
    with torch.device("meta"):
        model = Transformer(config.model)
    old = sum(p.numel() for p in model.parameters()) - sum(
        model.get_parameter(name).numel() for name in new_parameters(model)
    )
    freeze(model, trained_parameters(model, adapt, config.seed)[0])
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    count, groups = sum(p.numel() for p in trained), parameter_groups(model, config.optimizer)
    muon = sum(p.numel() for group in groups if group.muon for p in group.parameters.values())
    trunk_frozen = not any(p.requires_grad for p in model.trunk.parameters())
    matrix, half = config.model.vocab_size * config.model.dim, config.in_bfloat16
    tokens = layout.rows * config.positions
    own = {
        "weights (float32)": FLOAT32 * count,
        f"frozen weights ({adapt.frozen_dtype})": (2 if adapt.frozen_dtype == "bfloat16" else FLOAT32) * frozen,
        "the model as it was (float32)": FLOAT32 * old if adapt.self_distilled and adapt.lora is None else 0,
        "optimizer state": FLOAT32 * (2 * count - muon),
    }
    # Autocast keeps what it casts of trained weights only; of frozen ones the largest is cast at a time.
    largest = max((p.numel() for p in model.parameters() if not p.requires_grad and p.ndim > 1), default=0)
    cast = 2 * (sum(p.numel() for p in trained if p.ndim > 1) + largest) if half else 0
    frozen_unembedding = not model.unembedding.weights[0].requires_grad and config.model.head_kind != "replicated"
    moments: dict[str, dict[str, int]] = {}
    for name, parts in whole.moments.items():
        if trunk_frozen and "trunk's backward" in name:
            continue
        found = {**parts, **own}
        for part in parts:
            if part == "gradients (float32)":
                found[part] = FLOAT32 * count
            elif part.startswith("weights gathered or cast"):
                found[part] = cast
            elif part == "activations of the trunk" and trunk_frozen:
                found[part] = FLOAT32 * config.model.dim * tokens
            elif part == "gradients of the loss" and frozen_unembedding:
                found[part] = max(0, parts[part] - matrix * (FLOAT32 + (2 if half else 0)))
        moments[name] = {part: size for part, size in found.items() if size}
    if trunk_frozen and adapt.cache_states is None:
        block = whole.moments["the end of the trunk's backward"]["activations of the trunk"]
        moments["the run of the frozen trunk"] = {
            part: size
            for part, size in {
                **own,
                "tokens and targets": whole.moments["the update of the weights"]["tokens and targets"],
                "gradients (float32)": FLOAT32 * count if layout.micro_batches > 1 else 0,
                "one block of the trunk": block,
            }.items()
            if size
        }
    return Estimate(moments)
