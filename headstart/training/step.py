"""One optimizer step: count the targets, walk the tree of heads for every micro-batch, clip, update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from headstart.data.batches import Batch
from headstart.data.shards import TokenShards
from headstart.model.transformer import Transformer
from headstart.objective.inputs import StepInputs, count_targets
from headstart.objective.objective import Objective
from headstart.objective.walk import HeadLosses, walk_step
from headstart.training.auxiliary.base import StepAuxiliaries
from headstart.training.config import RunConfig
from headstart.training.optimizer import build_optimizers, set_learning_rate
from headstart.training.parallel import GradientSums, whole
from headstart.training.processes import Processes
from headstart.training.schedule import rate_of, weights_of
from headstart.training.spikes import LossHistory

Walk = Callable[[Transformer, StepInputs, Tensor, Objective], HeadLosses]
"""The signature of `walk_step`."""


@dataclass
class StepResult:
    """The numbers of one optimizer step."""

    losses: list[float]
    """Mean cross-entropy of each head in nats, unweighted; NaN if a head has no target or no weight."""
    accuracies: list[float]
    """Top-1 of each head, ties counted as hits; NaN if a head has no target or no weight, or the loss backend does not
    count hits."""
    gradient_norm: float
    """Norm of the gradient of all parameters together, before clipping."""
    finite: bool
    """True if losses and gradient are finite."""
    lr: float
    """Learning rate."""
    skipped: str = ""
    """Reason for which the weights were not updated; empty if they were."""
    stop: bool = False
    """True if a process of the run was asked to stop."""
    auxiliary: dict[str, float] = field(default_factory=dict)
    """Mean auxiliary losses in nats, by name."""
    targets: int = 0
    """Number of targets, of all heads that have a weight."""
    seconds: float = math.nan
    """Duration of the step, reading its batches included."""


class Subject(Protocol):
    """The model that a run trains."""

    model: Transformer
    sums: GradientSums

    def begin_step(self, step: int, extended: int) -> None:
        """Freeze what step `step` (from 0) does not train; `extended` is `Position.extended`."""

    def complete(self, inputs: StepInputs) -> StepInputs:
        """Add what the model knows about the rows: the trunk's output, or a teacher of head 1."""

    def complete_held_out(self, inputs: StepInputs, split: TokenShards) -> StepInputs:
        """Add what the model knows about rows of a validation split."""


class Learner:
    """A model with its optimizers and objective; it takes optimizer steps."""

    def __init__(
        self,
        subject: Subject,
        config: RunConfig,
        processes: Processes,
        *,
        history: LossHistory | None = None,
        walk: Walk | None = None,
    ) -> None:
        """Build the optimizers.

        The dtype of `config` is decided (`RunConfig.on`). Spikes are judged by the loss `history`, which is updated by
        each step; None: no step is a spike. `walk` makes the gradients of a micro-batch (None: `walk_step`).
        """
        self.subject, self.config, self.processes, self.walk = subject, config, processes, walk or walk_step
        self.model = subject.model
        self.optimizers = build_optimizers(self.model, config.optimizer, processes.device, config.dtype)
        self.auxiliaries = config.auxiliaries
        self.history = history
        self.extended = 0
        """`Position.extended` of the run."""
        self.stop: Callable[[], bool] = lambda: False
        """Returns true once this process was asked to stop."""
        self.spent: Callable[[], float | None] = lambda: None
        """Returns `time_spent` of the run."""

    def step(self, batches: Iterable[Batch], step: int) -> StepResult:
        """Take step `step` (from 0) of the schedule on this process's micro-batches."""
        began = time.perf_counter()
        inputs = [self.inputs(batch, step) for batch in batches]
        self.subject.begin_step(step, self.extended)
        at = (step, self.config, self.extended, self.spent())
        result = self.update(inputs, weights_of(*at), rate_of(*at))
        result.seconds = time.perf_counter() - began
        return result

    def inputs(self, batch: Batch, step: int) -> StepInputs:
        """Return a micro-batch as step `step` reads it, on the device."""
        within = self.config.data.attention_within_documents
        inputs = StepInputs.of_batch(batch, self.model.config.ahead, attention_within_documents=within)
        for auxiliary in self.auxiliaries:
            inputs = auxiliary.inputs(inputs, step)
        return inputs.to(self.processes.device)

    def update(self, micro_batches: Sequence[StepInputs], weights: Sequence[float], lr: float) -> StepResult:
        """Update the model once, at learning rate `lr`, unless the step is not finite or a spike."""
        config, processes, model = self.config, self.processes, self.model
        objective = Objective(weights, config.loss)
        micro_batches = [objective.mask(inputs, model) for inputs in micro_batches]
        # Counted over all micro-batches and processes before the first backward, so that 1 x 4 rows weigh every target
        # as 4 x 1 rows do.
        counts = processes.sum(torch.stack([count_targets(inputs.targets) for inputs in micro_batches]).sum(0))
        auxiliaries = StepAuxiliaries(self.auxiliaries, model, micro_batches, counts[0], processes)
        objective = replace(objective, auxiliaries=auxiliaries.losses)
        losses, hits = torch.zeros(2, len(counts), device=processes.device)
        for i, inputs in enumerate(micro_batches):
            last, trained = i == len(micro_batches) - 1, sum(weight != 0 for weight in weights)
            with autocast(config, processes.device), self.subject.sums.micro_batch(last=last, losses=trained):
                seen = self.walk(model, self.subject.complete(inputs), counts, objective)
            losses += seen.sums
            hits += math.nan if seen.correct is None else seen.correct
        norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip))
        # One wait for the device, and one for the other processes.
        totals = processes.sum(torch.cat([losses, hits, losses.new_tensor([float(self.stop())])]))
        *numbers, stops, gradient_norm = torch.cat([totals, norm.reshape(1).to(totals)]).tolist()
        n = len(weights)
        finite = all(map(math.isfinite, [*numbers[:n], gradient_norm]))
        targets = [count if weight else 0 for count, weight in zip(counts.tolist(), weights)]
        means, accuracies = (
            [total / count if count else math.nan for total, count in zip(part, targets)]
            for part in (numbers[:n], numbers[n:])
        )
        skipped = self._judge(means, finite)
        self._apply(lr, skip=bool(skipped))
        return StepResult(
            means, accuracies, gradient_norm, finite, lr, skipped, stops > 0, auxiliaries.means(), sum(targets)
        )

    def _judge(self, losses: list[float], finite: bool) -> str:
        """Return the reason to skip the step, if any; else add it to the history."""
        if not finite:
            return "loss or gradient not finite"
        if self.history is None:
            return ""
        spike = self.history.spike(losses, self.config.optimizer.spike_threshold)
        if not spike:
            self.history.add(losses)
        return spike

    def _apply(self, lr: float, skip: bool) -> None:
        """Run the optimizers unless `skip`, and free the gradients."""
        set_learning_rate(self.optimizers, lr)
        for optimizer in self.optimizers:
            if not skip:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)


class Callback(Protocol):
    """Work of a training loop around each optimizer step. The defaults do nothing."""

    def before_step(self, step: int) -> None:
        """Run before step `step` (from 0)."""
        return None

    def after_step(self, step: int, result: StepResult) -> None:
        """Run after step `step` (from 0)."""
        return None


def take_steps(
    learner: Learner, batches: Iterable[Batch], steps: Iterable[int], callbacks: Sequence[Callback] = ()
) -> None:
    """Take `steps` (from 0), each on the next micro-batches of `batches`, with the callbacks in order around each."""
    stream = iter(batches)
    count, _ = learner.config.micro_batches(learner.processes.count)
    for step in steps:
        for callback in callbacks:
            callback.before_step(step)
        result = learner.step((next(stream) for _ in range(count)), step)
        for callback in callbacks:
            callback.after_step(step, result)


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """Run matrix products in the dtype of the run; weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.in_bfloat16)
