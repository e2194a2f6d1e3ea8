"""Slow references: the same results by the obvious way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.data.batches import IGNORE
from headstart.model.transformer import Transformer
from headstart.objective.inputs import StepInputs
from headstart.objective.objective import Objective
from headstart.objective.walk import HeadLosses


def joint_step(
    model: Transformer, inputs: StepInputs, counts_n: Tensor, objective: Objective | None = None
) -> HeadLosses:
    """Make the gradients of `walk_step` by ordinary autograd over all heads' logits at once.

    It knows head weights and z-loss. Heads of weight 0 get gradients of 0; the walk leaves them without.
    """
    objective = objective or Objective()
    inputs.check(model)
    n, T, z_loss = model.config.heads, inputs.length, objective.loss.z_loss
    weights, latents = objective.weights_of(n), inputs.latents(model)
    logits_BTnV = torch.stack([model.unembedding(latents[k][:, :T], k) for k in range(1, n + 1)], dim=2)
    losses: list[Tensor] = []
    seen: dict[int, tuple[Tensor, Tensor | None]] = {}
    for k in range(1, n + 1):
        logits, targets = logits_BTnV[..., k - 1, :].flatten(0, 1), inputs.targets[..., k - 1].flatten()
        total = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        valid = targets != IGNORE
        losses.append(total + z_loss * (logits.logsumexp(-1)[valid] ** 2).sum() if z_loss else total)
        if weights[k - 1]:
            logits = logits.detach()  # counting hits is not differentiated, and takes no memory of the graph
            correct = (logits.gather(-1, targets.clamp_min(0)[:, None]) >= logits.amax(-1, keepdim=True))[valid].sum()
            seen[k] = total.detach(), correct
    # Divides in float64 and on its own: a reference that shared the walk's scales would share their errors.
    means = [total.double() / max(1, count) for total, count in zip(losses, counts_n.tolist())]
    torch.stack([weight * mean for weight, mean in zip(weights, means)]).sum().backward()
    return HeadLosses.collect(seen, inputs.targets)
