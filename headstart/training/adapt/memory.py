"""Memory of a run on an existing model: that of `memory.estimate`, without gradients and state of frozen weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from headstart.model.transformer import Transformer
from headstart.training.adapt.lora import LoraConfig
from headstart.training.adapt.new_heads import freeze, new_parameters
from headstart.training.adapt.run import trained_parameters
from headstart.training.config import RunConfig
from headstart.training.memory import FLOAT32, Estimate, Kept, Layout, distributions, estimate
from headstart.training.optimizer import parameter_groups


def estimate_adapt(config: RunConfig, layout: Layout, device: Literal["cpu", "gpu"]) -> Estimate:
    """Return the memory of a step in which the most is trained.

    Frozen weights have neither gradients nor optimizer state; a frozen trunk keeps nothing for a backward pass.
    """
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
    # Autocast keeps its casts of trained weights only; frozen ones are cast one at a time. The embedding is not cast,
    # and the cast of the unembedding belongs to the loss.
    matrices = [p for part in (model.trunk.blocks, model.heads) for p in part.parameters() if p.ndim > 1]
    largest = max((p.numel() for p in matrices if not p.requires_grad), default=0)
    cast = 2 * (sum(p.numel() for p in matrices if p.requires_grad) + largest) if half else 0
    added = _of_lora(model.trunk, adapt.lora, 2 if half else FLOAT32, device) * tokens
    frozen_unembedding = not model.unembedding.weights[0].requires_grad and not config.model.kind.own_unembeddings
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
            elif part == "activations of the trunk" and "end of the trunk" not in name:
                found[part] += 0 if layout.activation_checkpointing else added
            elif part in ("activations of the trunk", "activations computed again"):
                found[part] += added // config.model.trunk_layers
            elif part == "gradients of the loss" and frozen_unembedding:
                found[part] = max(0, parts[part] - matrix * (FLOAT32 + (2 if half else 0)))
        moments[name] = {part: size for part, size in found.items() if size}
    if adapt.self_distilled:
        # Head 1 comes first, when no other head has gradients yet.
        last = moments["the loss of the last head"]
        moments["the loss of head 1"] = {
            **last,
            "gradients (float32)": last["gradients (float32)"] if layout.micro_batches > 1 else 0,
            "distributions of the teacher": distributions(config, tokens, device),
        }
    if trunk_frozen and adapt.cache_states is None:
        kept = Kept(config, 2 if half else FLOAT32, FLOAT32, device)
        moments["the run of the frozen trunk"] = {
            part: size
            for part, size in {
                **own,
                "tokens and targets": whole.moments["the update of the weights"]["tokens and targets"],
                "gradients (float32)": FLOAT32 * count if layout.micro_batches > 1 else 0,
                "one block of the trunk": kept.run_block() * tokens,
            }.items()
            if size
        }
    return Estimate(moments)


def _of_lora(trunk: nn.Module, lora: LoraConfig | None, compute: int, device: Literal["cpu", "gpu"]) -> int:
    """Return the bytes per position that LoRA's products keep for the backward.

    They are the mask of the dropout (on a GPU a byte for each value) and the output of A. The input of A takes the
    place of the input that a trained matrix keeps.
    """
    kept, mask = 0, compute if device == "cpu" else 1
    for module in trunk.modules():
        if lora is not None and isinstance(module, nn.Linear) and hasattr(module, "lora_A"):
            kept += (mask * module.in_features if lora.dropout else 0) + compute * len(module.get_parameter("lora_A"))
    return kept
