"""One optimiser step: count the targets, walk the tree of heads for every micro-batch, clip, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.optim import Optimizer

from headstart.data.batches import Batch
from headstart.model.transformer import Transformer
from headstart.objective.distillation import taught_targets
from headstart.objective.walk import count_targets, walk_step
from headstart.training.auxiliary.losses import ExtraLosses
from headstart.training.auxiliary.masked_inputs import masked
from headstart.training.auxiliary.registers import with_registers
from headstart.training.config import RunConfig
from headstart.training.optimizer import set_learning_rate
from headstart.training.parallel import GradientSums, whole
from headstart.training.processes import Processes
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
    skipped: str = ""
    """Why the weights are as before: what is wrong with the step; empty where they were updated."""
    stop: bool = False
    """Whether a process of the run was asked to stop."""
    extras: dict[str, float] = field(default_factory=dict)
    """Mean loss of what is learnt beside the heads, in nats, by method; see `ExtraLosses`."""
    targets: int = 0
    """Number of targets, of all heads that have a weight."""


def train_step(
    model: Transformer,
    optimizers: list[Optimizer],
    batches: Sequence[Batch],
    weights: Sequence[float],
    lr: float,
    config: RunConfig,
    processes: Processes,
    sums: GradientSums,
    stop: Callable[[], bool] = lambda: False,
    history: LossHistory | None = None,
    known: Callable[[Batch], dict[str, Any]] | None = None,
) -> StepResult:
    """Updates the weights once, from this process's micro-batches, which lie on its device.

    `known(batch)` is what `walk_step` is given beside a batch (see `ExistingModel.known`).

    A step that is not finite, or a spike against `history`, is not applied; `history` takes in the others. `stop()` is
    whether this process was asked to stop; the result says whether any was.
    """
    if config.loss.heads != "cross-entropy":
        offsets = model.config.offset_of_heads
        batches = [replace(batch, targets=taught_targets(batch.targets, offsets)) for batch in batches]
    # Counted over all micro-batches and processes before the first backward, so that 1 x 4 rows weigh every target as
    # 4 x 1 rows do.
    counts = processes.sum(torch.stack([count_targets(batch.targets) for batch in batches]).sum(0))
    losses, hits = torch.zeros(2, len(counts), device=processes.device)
    extras = ExtraLosses(model, config, batches, counts[0], processes)
    asked = sum(weight != 0 for weight in weights)
    for i, batch in enumerate(batches):
        documents = batch.documents if config.data.attention_within_documents else None
        last = i == len(batches) - 1
        with autocast(config, processes.device), sums.micro_batch(last=last, losses=asked):
            tokens = batch.read(model.config.ahead)
            more = extras.of(batch) | ({} if known is None else known(batch))
            seen = walk_step(model, tokens, batch.targets, counts, weights, documents, config.loss, **more)
        losses += seen.sums
        hits += math.nan if seen.correct is None else seen.correct
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip))
    # One wait for the device, and one for the other processes.
    totals = processes.sum(torch.cat([losses, hits, losses.new_tensor([float(stop())])]))
    *numbers, stops, gradient_norm = torch.cat([totals, norm.reshape(1).to(totals)]).tolist()
    head_losses, head_hits = numbers[: len(weights)], numbers[len(weights) :]
    finite = all(map(math.isfinite, [*head_losses, gradient_norm]))
    targets = [count if weight else 0 for count, weight in zip(counts.tolist(), weights)]
    means = [total / count if count else math.nan for total, count in zip(head_losses, targets)]
    accuracies = [hit / count if count else math.nan for hit, count in zip(head_hits, targets)]
    skipped = "" if finite else "loss or gradient not finite"
    if finite and history is not None:
        skipped = history.spike(means, config.optimizer.spike_threshold)
        if not skipped:
            history.add(means)
    set_learning_rate(optimizers, lr)
    for optimizer in optimizers:
        if not skipped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return StepResult(means, accuracies, gradient_norm, finite, skipped, stops > 0, extras.means(), sum(targets))


def inputs_of(batch: Batch, config: RunConfig, step: int) -> Batch:
    """`batch` as step `step` (from 0) of the run reads it: inputs hidden, registers beside, where the run says so."""
    if config.masked_inputs.on:
        batch = masked(batch, config.masked_inputs, config.token_of("masked_inputs"), config.seed, step)
    if config.registers.on:
        batch = with_registers(batch, config.registers, config.token_of("registers"), config.seed, step)
    return batch


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """Weights stay float32; matrix products run in the dtype of the run."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.in_bfloat16)


def move(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    ahead = None if batch.ahead is None else batch.ahead.to(device)
    registers = None if batch.registers is None else batch.registers.to(device)
    tokens, targets, documents = (each.to(device) for each in (batch.tokens, batch.targets, batch.documents))
    return Batch(tokens, targets, documents, ahead, batch.places, registers)
