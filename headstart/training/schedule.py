"""Schedule of a run: its stages, learning rates and head weights, and the steps added to a finished run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from headstart.console import say
from headstart.errors import UsageError
from headstart.objective.head_weights import HeadWeights, draw_head
from headstart.training.checkpoint_state import Position
from headstart.training.config import RunConfig
from headstart.training.optimizer import OptimizerConfig

TIMED_WARM_UP = 0.25
"""Longest warm-up of a run that the clock ends, as a share of its time."""


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of step `step`, 0 <= step < `steps`.

    The last step of the warm-up has the peak, the last step of all the final rate; no step has rate 0 unless the final
    ratio is 0.
    """
    done = step + 1
    if done <= config.warmup_steps:
        return config.lr * done / config.warmup_steps
    if config.schedule == "wsd":
        # A warm-up that reaches into the decay shortens it: the rate never jumps.
        decay = min(max(1.0, steps * config.decay_fraction), steps - config.warmup_steps)
        fall = min(1.0, max(0.0, (done - (steps - decay)) / decay))
    else:
        fraction = (done - config.warmup_steps) / (steps - config.warmup_steps)
        fall = (1 - math.cos(math.pi * fraction)) / 2
    return config.lr * (1 - fall * (1 - config.final_lr_ratio))


def timed_rate(step: int, spent: float, config: OptimizerConfig) -> float:
    """Return the learning rate of step `step` (from 0) of a run that the clock ends, of whose time `spent` is over.

    It falls with the time from the start, times the warm-up: that of `warmup_steps` steps, or of a share of the time on
    a machine that takes longer for them.
    """
    warm = min(1.0, max((step + 1) / max(1, config.warmup_steps), spent / TIMED_WARM_UP))
    if config.schedule == "wsd":
        fall = max(0.0, 1 - (1 - spent) / config.decay_fraction)
    else:
        fall = (1 - math.cos(math.pi * spent)) / 2
    return config.lr * warm * (1 - fall * (1 - config.final_lr_ratio))


def time_spent(position: Position, config: RunConfig) -> float | None:
    """Return the share of a run's time that is over, from 0 to 1, or None if the clock does not end the run."""
    return None if config.minutes is None else min(1.0, position.seconds / (60 * config.minutes))


def is_finished(position: Position, config: RunConfig) -> bool:
    """Say whether a run is over: all its steps are done, or its time, or its drafts have stopped to improve."""
    patience = config.validation.patience
    still = patience > 0 and position.samples_since_best >= patience
    return position.step >= config.steps or time_spent(position, config) == 1.0 or still


def extended_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of step `step` (from 0) of the `steps` added to a run whose schedule has ended.

    It never falls below the final rate, at which the schedule ended.
    """
    final = config.lr * config.final_lr_ratio
    return final if config.extension == "hold" else max(final, learning_rate(step, steps, config))


@dataclass(frozen=True)
class Stage:
    """Consecutive steps that train the same parameters under one schedule."""

    begin: int
    """First step, from 0."""
    steps: int
    heads_alone: bool = False
    """True if only the new heads of an existing model are trained."""


def stage_of(step: int, config: RunConfig, extended: int = 0) -> Stage:
    """Return the stage of step `step` (from 0); steps from `extended` on, unless that is 0, continue the last one."""
    adapt = config.adapt
    heads_alone = adapt is not None and adapt.mode == "heads"
    if extended and step >= extended:
        return Stage(extended, config.steps - extended, heads_alone)
    if adapt is None or heads_alone:
        return Stage(0, config.steps, heads_alone)
    first = round(config.steps * adapt.heads_first)
    return Stage(0, first, True) if step < first else Stage(first, config.steps - first)


def rate_of(step: int, config: RunConfig, extended: int = 0, spent: float | None = None) -> float:
    """Return the learning rate of step `step` (from 0), by `Position.extended` and by `time_spent`."""
    if spent is not None:
        return timed_rate(step, spent, config.optimizer)
    stage = stage_of(step, config, extended)
    rate = extended_rate if stage.begin and stage.begin == extended else learning_rate
    return rate(step - stage.begin, stage.steps, config.optimizer)


def weights_of(step: int, config: RunConfig, extended: int = 0, spent: float | None = None) -> list[float]:
    """Return the head weights of step `step` (from 0), by `Position.extended` and by `time_spent`."""
    stage, weights, n = stage_of(step, config, extended), config.head_weights, config.model.heads
    if stage.heads_alone:
        # Head 1 is frozen: its loss would train nothing. Before joint training all others have their full weight.
        joint = config.adapt is not None and config.adapt.mode == "joint"
        constant = HeadWeights(decay=weights.decay, sampled=weights.sampled) if joint else weights
        now = [0.0, *constant.at(0, n)[1:]]
    else:
        ended = stage.begin and stage.begin == extended
        share = (step - stage.begin) / stage.steps if spent is None else spent
        now = weights.at(1.0 if ended else share, n)
    return draw_head(now, config.seed, step) if weights.sampled else now


def begin_extension(position: Position, config: RunConfig, before: RunConfig | None) -> Position:
    """Return the position, noting whether the next steps extend a finished run, and report the learning rates.

    A run is finished once all steps that were planned are done. `before` is the configuration of its last start, for
    checkpoints that do not record the plan.
    """
    if not position.planned and before is not None:
        position.planned = before.steps
        if position.step and not position.lr:
            position.lr = rate_of(position.step - 1, before)
    planned, position.planned = position.planned, config.steps
    kind, done = config.optimizer.extension, position.step
    if done >= config.steps or config.minutes is not None:
        return position
    changed = bool(position.extended) and position.extension != kind
    if done >= planned > 0 or changed:
        if kind == "hold" and not config.optimizer.final_lr_ratio:
            raise UsageError(
                f"{config.run_dir}: its schedule ended at step {done} with learning rate 0, at which the steps added "
                "would train nothing; take --optimizer.extension rewarm"
            )
        if not position.extended or kind == "rewarm" or changed:
            position.extended, position.extension = done, kind
    if planned and (planned != config.steps or changed):
        _say_rates(position, config, planned)
    return position


def _say_rates(position: Position, config: RunConfig, planned: int) -> None:
    """Print the learning rates of the last step and the next, and the rule for those that follow."""
    done, lr = position.step, rate_of(position.step, config, position.extended)
    rates = f"learning rate {position.lr:.3g} in step {done}, {lr:.3g} in step {done + 1}"
    if not position.extended:
        say(f"{rates}: the schedule is that of {config.steps} steps instead of {planned}")
        return
    flag = "optimizer.extension" if config.adapt is None else "extension"
    warms = f"up to {config.optimizer.lr:.3g} once more"
    if position.extension == "hold":
        rule = f"keep its final rate (--{flag} rewarm warms {warms})"
    else:
        rule = f"warm {warms} (--{flag} hold keeps the final rate)"
    say(f"{rates}: the schedule had ended at step {position.extended}, and the steps added {rule}")
