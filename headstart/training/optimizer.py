"""Optimisers: AdamW as in the paper, or Muon for the matrices inside the blocks; and the learning rate over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from headstart.errors import UsageError
from headstart.training.sharded_muon import ShardedMuon


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights are updated. The defaults are the paper's (Table S13 and its caption); it does not give epsilon."""

    kind: Literal["adamw", "muon"] = "adamw"
    """adamw for everything, or muon for the matrices inside trunk blocks and heads with adamw for the rest."""
    lr: float = 3e-4
    """Peak learning rate."""
    muon_lr: float | None = None
    """Peak learning rate of muon's matrices (None: `lr`, to whose scale muon's updates are matched)."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly to its peak."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up: cosine falls until the end; wsd stays at the peak, then falls linearly."""
    decay_fraction: float = 0.2
    """Fraction of all steps, at the end, over which wsd falls."""
    final_lr_ratio: float = 0.03
    """Learning rate of the last step, as a fraction of the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the two moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    momentum: float = 0.95
    """Muon's momentum (Nesterov)."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; embeddings, norms and biases have none."""
    clip: float = 1.0
    """Largest norm of the gradient of all parameters together (.inf: never clipped)."""

    def __post_init__(self) -> None:
        for name in ("lr", "muon_lr", "eps", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"optimizer.{name} is {value}; it must be above 0")
        for name in ("warmup_steps", "weight_decay", "final_lr_ratio"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"optimizer.{name} is {getattr(self, name)}; it must not be negative")
        for name, value in (("betas", self.betas[0]), ("betas", self.betas[1]), ("momentum", self.momentum)):
            if not 0 <= value < 1:
                raise UsageError(f"optimizer.{name} holds {value}; it must be at least 0 and below 1")
        if not 0 < self.decay_fraction <= 1:
            raise UsageError(f"optimizer.decay_fraction is {self.decay_fraction}; it must be above 0 and at most 1")
        if self.kind not in ("adamw", "muon"):
            raise UsageError(f"optimizer.kind {self.kind!r} is unknown; take adamw or muon")
        if self.schedule not in ("cosine", "wsd"):
            raise UsageError(f"optimizer.schedule {self.schedule!r} is unknown; take cosine or wsd")


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Of step `step`, 0 <= step < `steps`. The peak is reached in the last step of the warm-up, the final rate in the
    last step of all; no step has rate 0 unless the final ratio says so."""
    done = step + 1
    if done <= config.warmup_steps:
        return config.lr * done / config.warmup_steps
    if config.schedule == "wsd":
        decay = max(1.0, steps * config.decay_fraction)
        fall = min(1.0, max(0.0, (done - (steps - decay)) / decay))
    else:
        fraction = (done - config.warmup_steps) / (steps - config.warmup_steps)
        fall = (1 - math.cos(math.pi * fraction)) / 2
    return config.lr * (1 - fall * (1 - config.final_lr_ratio))


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> dict[str, dict[str, nn.Parameter]]:
    """Every trainable parameter once, by name, under "muon", "decayed" or "plain" (no weight decay).

    A matrix is decayed unless it is the embedding; a tied unembedding is the embedding.
    """
    groups: dict[str, dict[str, nn.Parameter]] = {"muon": {}, "decayed": {}, "plain": {}}
    for name, parameter in model.named_parameters():  # a tied matrix comes once, under the embedding's name
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or name == "trunk.embedding.weight":
            groups["plain"][name] = parameter
        elif config.kind == "muon" and name.startswith(("trunk.blocks.", "heads.")):
            groups["muon"][name] = parameter
        else:
            groups["decayed"][name] = parameter
    return groups


def build_optimizers(model: nn.Module, config: OptimizerConfig, device: torch.device) -> list[Optimizer]:
    """One optimiser, or two for muon; between them they hold every trainable parameter once."""
    groups = parameter_groups(model, config)
    optimizers: list[Optimizer] = []
    if groups["muon"]:
        # q, k and v (and gate and up) are stacked in one matrix and orthogonalised together. Apart would need slices of
        # a parameter as parameters of their own, which neither sharding nor checkpoints know; match_rms_adamw gives
        # the stack the same size of update per weight either way.
        sharded = isinstance(next(iter(groups["muon"].values())), DTensor)
        optimizers.append(
            (ShardedMuon if sharded else torch.optim.Muon)(
                list(groups["muon"].values()),
                lr=config.lr,
                momentum=config.momentum,
                nesterov=True,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
        for group in optimizers[0].param_groups:
            group["lr_scale"] = 1.0 if config.muon_lr is None else config.muon_lr / config.lr
    adamw_groups = [
        {"params": list(groups[kind].values()), "weight_decay": decay}
        for kind, decay in (("decayed", config.weight_decay), ("plain", 0.0))
        if groups[kind]
    ]
    optimizers.append(
        torch.optim.AdamW(
            adamw_groups,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=device.type in ("cpu", "cuda"),
        )
    )
    return optimizers


def set_learning_rate(optimizers: list[Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
