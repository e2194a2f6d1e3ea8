"""Memory of a run on an existing model: that of `memory.estimate`, without gradients and state of frozen weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from headstart.model.transformer import Transformer
from headstart.training.adapt.config import AdaptConfig
from headstart.training.adapt.lora import LoraConfig
from headstart.training.adapt.new_heads import freeze, new_parameters
from headstart.training.adapt.run import trained_parameters
from headstart.training.config import RunConfig
from headstart.training.memory import FLOAT32, Estimate, Kept, Layout, count_parameters, distributions, estimate
from headstart.training.optimizer import parameter_groups


def estimate_adapt(config: RunConfig, layout: Layout, device: Literal["cpu", "gpu"]) -> Estimate:
    """Return the memory of a step in which the most is trained.

    Frozen weights have neither gradients nor optimizer state; a frozen trunk keeps nothing for a backward pass.
    """
    adapt = config.adapt
    assert adapt is not None
    sizes = _Sizes(config, adapt, layout, device)
    whole = estimate(replace(config, adapt=None), layout, device)
    moments = {
        name: sizes.moment(name, parts)
        for name, parts in whole.moments.items()
        if not (sizes.trunk_frozen and "trunk's backward" in name)
    }
    accumulated = FLOAT32 * sizes.count if layout.micro_batches > 1 else 0
    if adapt.self_distilled:
        # Head 1 comes first, when no other head has gradients yet.
        moments["the loss of head 1"] = {
            **moments["the loss of the last head"],
            "gradients (float32)": accumulated,
            "distributions of the teacher": distributions(config, sizes.tokens, device),
        }
    if sizes.trunk_frozen and adapt.cache_states is None:
        kept = Kept(config, 2 if sizes.half else FLOAT32, FLOAT32, device)
        parts = {
            **sizes.weights,
            "tokens and targets": whole.moments["the update of the weights"]["tokens and targets"],
            "gradients (float32)": accumulated,
            "one block of the trunk": kept.run_block() * sizes.tokens,
        }
        moments["the run of the frozen trunk"] = {part: size for part, size in parts.items() if size}
    return Estimate(moments)


class _Sizes:
    """The sizes in which a step on an existing model differs from one on a new model."""

    def __init__(self, config: RunConfig, adapt: AdaptConfig, layout: Layout, device: Literal["cpu", "gpu"]) -> None:
        with torch.device("meta"):
            model = Transformer(config.model)
        old = count_parameters(model.parameters()) - count_parameters(
            model.get_parameter(name) for name in new_parameters(model)
        )
        freeze(model, trained_parameters(model, adapt, config.seed)[0])
        frozen = count_parameters(p for p in model.parameters() if not p.requires_grad)
        self.config, self.layout, self.half = config, layout, config.in_bfloat16
        self.count = count_parameters(p for p in model.parameters() if p.requires_grad)
        """Trained parameters."""
        groups = parameter_groups(model, config.optimizer)
        muon = sum(count_parameters(group.parameters.values()) for group in groups if group.muon)
        self.trunk_frozen = not any(p.requires_grad for p in model.trunk.parameters())
        self.tokens = layout.rows * config.positions
        self.weights = {
            "weights (float32)": FLOAT32 * self.count,
            f"frozen weights ({adapt.frozen_dtype})": (2 if adapt.frozen_dtype == "bfloat16" else FLOAT32) * frozen,
            "the model as it was (float32)": FLOAT32 * old if adapt.self_distilled and adapt.lora is None else 0,
            "optimizer state": FLOAT32 * (2 * self.count - muon),
        }
        """Bytes of weights and optimizer state by use."""
        # Autocast keeps its casts of trained weights only; frozen ones are cast one at a time. The embedding is not
        # cast, and the cast of the unembedding belongs to the loss.
        matrices = [p for part in (model.trunk.blocks, model.heads) for p in part.parameters() if p.ndim > 1]
        largest = max((p.numel() for p in matrices if not p.requires_grad), default=0)
        self.cast = 2 * (count_parameters(p for p in matrices if p.requires_grad) + largest) if self.half else 0
        self.added = _of_lora(model.trunk, adapt.lora, 2 if self.half else FLOAT32, device) * self.tokens
        """Activations of LoRA's products."""
        self.frozen_unembedding = (
            not model.unembedding.weights[0].requires_grad
            and not config.model.kind.own_unembeddings
            and not (adapt.lora is not None and adapt.lora.head)
        )

    def moment(self, name: str, parts: dict[str, int]) -> dict[str, int]:
        """Return the bytes of a moment by use, given those of a new model."""
        found, shape = {**parts, **self.weights}, self.config.model
        for part in parts:
            if part == "gradients (float32)":
                found[part] = FLOAT32 * self.count
            elif part.startswith("weights gathered or cast"):
                found[part] = self.cast
            elif part == "activations of the trunk" and self.trunk_frozen:
                found[part] = FLOAT32 * shape.state_dim * self.tokens
            elif part == "activations of the trunk" and "end of the trunk" not in name:
                found[part] += 0 if self.layout.activation_checkpointing else self.added
            elif part in ("activations of the trunk", "activations computed again"):
                found[part] += self.added // shape.trunk_layers
            elif part == "gradients of the loss" and self.frozen_unembedding:
                of_matrix = shape.vocab_size * shape.dim * (FLOAT32 + (2 if self.half else 0))
                found[part] = max(0, parts[part] - of_matrix)
        return {part: size for part, size in found.items() if size}


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
