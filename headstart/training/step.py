"""One optimiser step: count the targets, walk the tree of heads for every micro-batch, clip, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from headstart.data.batches import Batch
from headstart.model.transformer import Transformer
from headstart.objective.step import count_targets, walk_step
from headstart.training.config import RunConfig
from headstart.training.optimizer import set_learning_rate
from headstart.training.spikes import LossHistory


@dataclass
class StepResult:
    losses: list[float]
    """Mean cross-entropy of each head in nats, unweighted; NaN where a head had no target or no weight."""
    accuracies: list[float]
    """Top-1 of each head, ties counted as hits; NaN where a head had no target or no weight, or where the loss backend
    does not count hits."""
    gradient_norm: float
    """Of all parameters together, before clipping."""
    finite: bool
    """Whether losses and gradient were finite."""
    skipped: str
    """Why the weights are as before: what is wrong with the step; empty where they were updated."""


def train_step(
    model: Transformer,
    optimizers: list[Optimizer],
    batches: Sequence[Batch],
    weights: Sequence[float],
    lr: float,
    config: RunConfig,
    history: LossHistory | None = None,
) -> StepResult:
    """Updates the weights once, from micro-batches that lie on the model's device.

    A step that is not finite, or a spike against `history`, is not applied; `history` takes in the others.
    """
    device = batches[0].tokens.device
    # Counted over all micro-batches before the first backward, so that 1 x 4 rows weigh every target as 4 x 1 rows do.
    counts = torch.stack([count_targets(batch.targets) for batch in batches]).sum(0)
    sums, hits = torch.zeros(2, len(counts), device=device)
    for batch in batches:
        documents = batch.documents if config.data.attention_within_documents else None
        with autocast(config, device):
            seen = walk_step(model, batch.tokens, batch.targets, counts, weights, documents, config.loss)
        sums += seen.sums
        hits += math.nan if seen.correct is None else seen.correct
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
    *numbers, gradient_norm = torch.cat([sums, hits, norm.reshape(1).to(sums)]).tolist()  # one wait for the device
    totals, correct = numbers[: len(sums)], numbers[len(sums) :]
    finite = all(map(math.isfinite, [*totals, gradient_norm]))
    asked = [count if weight else 0 for count, weight in zip(counts.tolist(), weights)]
    losses = [total / count if count else math.nan for total, count in zip(totals, asked)]
    skipped = "" if finite else "loss or gradient not finite"
    if finite and history is not None:
        skipped = history.spike(losses, config.optimizer.spike_threshold)
        if not skipped:
            history.add(losses)
    set_learning_rate(optimizers, lr)
    for optimizer in optimizers:
        if not skipped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    accuracies = [hit / count if count else math.nan for hit, count in zip(correct, asked)]
    return StepResult(losses, accuracies, gradient_norm, finite, skipped)


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """Weights stay float32; matrix products run in `config.dtype`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")


def move(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    return Batch(batch.tokens.to(device), batch.targets.to(device), batch.documents.to(device))
