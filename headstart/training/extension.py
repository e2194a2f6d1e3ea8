"""Steps added to a run: where an extension begins, the learning rate in it, and what is said of it."""

from __future__ import annotations

from headstart.console import say
from headstart.errors import UsageError
from headstart.training.adapt.run import stage_of
from headstart.training.checkpoint_state import Position
from headstart.training.config import RunConfig
from headstart.training.optimizer import extended_rate, learning_rate


def rate_of(step: int, config: RunConfig, extended: int = 0) -> float:
    """Return the learning rate of step `step` (from 0). `extended`: `Position.extended`."""
    if extended and step >= extended:
        return extended_rate(step - extended, config.steps - extended, config.optimizer)
    if config.adapt is None:
        return learning_rate(step, config.steps, config.optimizer)
    stage = stage_of(step, config)
    return learning_rate(step - stage.begin, stage.steps, config.optimizer)


def begin_extension(position: Position, config: RunConfig, before: RunConfig | None) -> Position:
    """Decide whether the steps after a checkpoint extend a finished run, and say what the learning rate does. Return
    the position with that noted in it.

    A run is finished where all steps that were planned are done. `before`: the configuration of the last start, which
    says it for checkpoints that do not record it.
    """
    if not position.planned and before is not None:
        position.planned = before.steps
        if position.step and not position.lr:
            position.lr = rate_of(position.step - 1, before)
    planned, position.planned = position.planned, config.steps
    kind, done = config.optimizer.extension, position.step
    if done >= config.steps:
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
    """Say a line with the learning rates of the last step and the next, and how the rate goes on."""
    done, lr = position.step, rate_of(position.step, config, position.extended)
    rates = f"learning rate {position.lr:.3g} in step {done}, {lr:.3g} in step {done + 1}"
    if not position.extended:
        say(f"{rates}: the schedule is that of {config.steps} steps instead of {planned}")
        return
    flag = "optimizer.extension" if config.adapt is None else "extension"
    if position.extension == "hold":
        say(
            f"{rates}: the schedule had ended at step {position.extended}, and the steps added keep its final rate "
            f"(--{flag} rewarm warms up to {config.optimizer.lr:.3g} once more)"
        )
    else:
        say(
            f"{rates}: the schedule had ended at step {position.extended}, and the steps added warm up to "
            f"{config.optimizer.lr:.3g} once more (--{flag} hold keeps the final rate)"
        )
