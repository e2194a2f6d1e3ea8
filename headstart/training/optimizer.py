"""Optimizers: AdamW as in the paper, or Muon for the matrices inside the blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from headstart.arguments import AT_LEAST_0, FRACTION, POSITIVE, SHARE, check_fields
from headstart.errors import UsageError


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning rate. The defaults are the paper's (Table S13); it does not give epsilon."""

    kind: Literal["adamw", "muon"] = "adamw"
    """adamw for everything, or muon for the matrices inside trunk blocks and heads with adamw for the rest."""
    lr: float = 3e-4
    """Peak learning rate."""
    muon_lr: float | None = None
    """Peak learning rate of muon's matrices (None: `lr`; muon's updates are matched to its scale)."""
    head_lr_ratio: float = 1.0
    """Learning rate of heads 2..n, and of unembeddings of their own, as a multiple of the rest's (Medusa-2 takes 4)."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly to its peak."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up: cosine falls until the end; wsd stays at the peak, then falls linearly."""
    decay_fraction: float = 0.2
    """Fraction of all steps, at the end, over which wsd falls."""
    final_lr_ratio: float = 0.03
    """Learning rate of the last step, as a fraction of the peak."""
    extension: Literal["hold", "rewarm"] = "hold"
    """Learning rate of the steps added to a run whose schedule has ended: hold keeps the final rate; rewarm warms up to
    the peak once more and falls over the added steps."""
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
    spike_threshold: float = 10.0
    """Standard deviations above the running mean loss from which a step is skipped (0: none is)."""

    def __post_init__(self) -> None:
        positive = dict.fromkeys(("lr", "muon_lr", "head_lr_ratio", "eps", "clip"), POSITIVE)
        at_least_0 = dict.fromkeys(("warmup_steps", "weight_decay", "final_lr_ratio", "spike_threshold"), AT_LEAST_0)
        betas = (lambda betas: all(0 <= beta < 1 for beta in betas), "two numbers of at least 0 and below 1")
        check_fields(self, "optimizer.", **positive, **at_least_0, betas=betas, momentum=FRACTION, decay_fraction=SHARE)


@dataclass
class ParameterGroup:
    """Parameters with the same update rule."""

    muon: bool
    """True for Muon, false for AdamW."""
    decayed: bool
    """True if the weights decay."""
    lr_scale: float
    """Learning rate as a multiple of `lr`."""
    parameters: dict[str, nn.Parameter]
    """Parameters by name."""


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[ParameterGroup]:
    """Group every trainable parameter once: those of heads 2..n and those of the path to head 1, both in three kinds.

    A matrix is decayed unless it is the embedding; a tied unembedding is the embedding. Groups without parameters are
    left out.
    """
    muon_scale = 1.0 if config.muon_lr is None else config.muon_lr / config.lr
    groups: list[ParameterGroup] = []
    for ratio in (1.0, config.head_lr_ratio):
        groups.append(ParameterGroup(True, True, ratio * muon_scale, {}))
        groups += [ParameterGroup(False, decayed, ratio, {}) for decayed in (True, False)]
    for name, parameter in model.named_parameters():  # a tied matrix comes once, under the embedding's name
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or name == "trunk.embedding.weight":
            kind = 2
        elif config.kind == "muon" and name.startswith(("trunk.blocks.", "heads.", "unembedding.residuals.")):
            kind = 0
        else:
            kind = 1
        groups[kind + 3 * _is_of_a_further_head(name)].parameters[name] = parameter
    return [group for group in groups if group.parameters]


def _is_of_a_further_head(name: str) -> bool:
    """Return whether a parameter belongs to one of the heads 2..n alone."""
    first, second, third, *_ = [*name.split("."), "", ""]
    if first == "unembedding":
        return second == "residuals" or (second == "weights" and third != "0")
    return first == "heads" and second != "0"


def build_optimizers(
    model: nn.Module, config: OptimizerConfig, device: torch.device, dtype: str = "bfloat16"
) -> list[Optimizer]:
    """Build one optimizer, or two for muon, which together hold every trainable parameter once.

    `set_learning_rate` sets their rate before each step; until then it is 0. Muon's products run in `dtype`.
    """
    groups = parameter_groups(model, config)
    optimizers: list[Optimizer] = []
    if muon := [_torch_group(group, config) for group in groups if group.muon]:
        # q, k and v (and gate and up) are stacked in one matrix and orthogonalized together. Separating them
        # would need parameters that are slices of a parameter, which neither sharding nor checkpoints support.
        # match_rms_adamw gives the stack the same size of update per weight either way.
        if not hasattr(torch.optim, "Muon"):
            raise UsageError(f"optimizer.kind muon needs a torch with torch.optim.Muon, this is {torch.__version__}")
        from headstart.training.muon import Muon  # imports torch.distributed.tensor, which takes seconds

        optimizers.append(Muon(muon, config.momentum, getattr(torch, dtype)))
    if adamw := [_torch_group(group, config) for group in groups if not group.muon]:
        fused = device.type in ("cpu", "cuda")
        optimizers.append(torch.optim.AdamW(adamw, lr=0.0, betas=config.betas, eps=config.eps, fused=fused))
    for optimizer in optimizers:
        _make_state(optimizer)
    return optimizers


def _torch_group(group: ParameterGroup, config: OptimizerConfig) -> dict[str, Any]:
    decay = config.weight_decay if group.decayed else 0.0
    return {"params": list(group.parameters.values()), "weight_decay": decay, "lr_scale": group.lr_scale}


def _make_state(optimizer: Optimizer) -> None:
    """Make the state that a first step would make, for every parameter.

    Optimizers make it at a parameter's first gradient. A head of weight 0 has had none; a checkpoint would then lack
    its state, and could not be read back.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # at rate 0
    for parameter in parameters:
        parameter.grad = None
        if "step" in optimizer.state[parameter]:
            optimizer.state[parameter]["step"].zero_()


def set_learning_rate(optimizers: list[Optimizer], lr: float) -> None:
    """Set the learning rate of every group to `lr` times its scale."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
