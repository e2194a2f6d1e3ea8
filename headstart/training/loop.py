"""The training loop: `train` runs or goes on with a run folder until its last step."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from headstart.data.batches import BatchStream, evaluation_batches
from headstart.data.shards import TokenShards
from headstart.data.tokenizers import load_tokenizer
from headstart.errors import UsageError
from headstart.model.layers import Block
from headstart.model.transformer import Transformer
from headstart.storage.model_directory import save_model
from headstart.terminal import Progress, duration, say
from headstart.training import checkpoints
from headstart.training.checkpoints import Position
from headstart.training.config import RunConfig
from headstart.training.interruption import Interrupted, watching_signals
from headstart.training.optimizer import build_optimizers, learning_rate
from headstart.training.run_folder import RunFolder, RunLog
from headstart.training.spikes import LossHistory
from headstart.training.step import StepResult, move, train_step
from headstart.training.validation import validate

SKIPS_IN_A_ROW = 20
"""Skipped steps after which a run is given up."""


def train(config: RunConfig, *, progress: Callable[..., Progress] = Progress) -> Path:
    """Trains until `config.steps` and returns the path of the model directory.

    Goes on by itself, bit for bit, where the run folder holds a checkpoint. Raises Interrupted after Ctrl-C or SIGTERM,
    with a checkpoint saved; UsageError for whatever the user can mend.
    """
    folder = RunFolder(config.run_dir)
    device = pick_device(config.device)
    config.loss.require(device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with folder.claimed():
        folder.accept(config)
        done = max(checkpoints.all_steps(folder.checkpoints), default=0)
        if done >= config.steps and folder.model.exists():
            say(f"{folder.path}: already trained for {done} steps, the model is in {folder.model}; more with --steps")
            return folder.model
        run = Run(config, folder, device, progress)
        try:
            run.loop(progress)
        finally:
            run.log.close()
        return folder.model


class Run:
    """A run in memory: model, optimisers, data and position."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, device: torch.device, progress: Callable[..., Progress]
    ) -> None:
        self.config, self.folder, self.device = config, folder, device
        self.shards, self.validation_shards = folder.open_shards(config, progress)
        self.stream = BatchStream(
            self.shards, rows=config.batch.rows, length=config.length, heads=config.model.heads, seed=config.seed
        )
        self.validation_shards = _long_enough(self.validation_shards, config)
        self.model = build_model(config, device)
        # Here, and only here, goes what spreads the model over devices: after compiling, before the optimiser exists.
        self.optimizers: list[Optimizer] = build_optimizers(self.model, config.optimizer, device)
        self.position = Position(data=self.stream.state_dict())
        restored = checkpoints.restore_newest(folder.checkpoints, self.model, self.optimizers)
        if restored is not None:
            self.position = restored
            self.stream.load_state_dict(restored.data)
        self.history = LossHistory(**self.position.history)
        self.saved_step = self.position.step if restored is not None else -1
        self.log = RunLog(folder.metrics, self.position.step)
        self._say_start()

    def loop(self, progress: Callable[..., Progress]) -> None:
        """Steps, validations and checkpoints until the last step; then the model directory."""
        config, position, started = self.config, self.position, time.monotonic()
        first = position.step
        with (
            watching_signals() as interruption,
            progress("train", config.steps, unit="steps", start=position.step) as bar,
        ):
            while position.step < config.steps:
                result, seconds = self.step()
                bar.advance(1, **_shown(result, config.tokens_per_step / seconds))
                last = position.step >= config.steps
                if last or _due(position.step, config.validation.every):
                    self.validate()
                if not last and (interruption.requested or _due(position.step, config.checkpoints.every)):
                    self.save()
                if not last and interruption.requested:
                    checkpoint = self.folder.checkpoints / checkpoints.name_of(position.step)
                    raise Interrupted(self.folder.path, position.step, checkpoint)
            # The model first: a checkpoint of the last step then means that nothing is left to do.
            tokenizer = load_tokenizer(self.shards.directory / "tokenizer")
            save_model(self.model, self.folder.model, tokenizer, dtype=torch.bfloat16)
            self.save()
        steps, elapsed = position.step - first, time.monotonic() - started
        say(f"done: {steps:,} steps, {steps * config.tokens_per_step:,} tokens in {duration(elapsed)}")
        if position.skipped:
            say(f"{position.skipped} steps were skipped: their loss or gradient was not finite, or their loss a spike")
        say(f"model in {self.folder.model}, numbers in {self.folder.metrics}")

    def step(self) -> tuple[StepResult, float]:
        """The next optimiser step, and the seconds it took."""
        config, position = self.config, self.position
        began = time.perf_counter()
        batches = [move(batch, self.device) for batch in islice(self.stream, config.batch.accumulate)]
        weights = config.head_weights.at(position.step / config.steps, config.model.heads)
        lr = learning_rate(position.step, config.steps, config.optimizer)
        result = train_step(self.model, self.optimizers, batches, weights, lr, config, self.history)
        seconds = time.perf_counter() - began

        position.step += 1
        position.tokens += config.tokens_per_step
        position.data = self.stream.state_dict()
        position.history = dataclasses.asdict(self.history)
        position.skipped_in_a_row = position.skipped_in_a_row + 1 if result.skipped else 0
        position.skipped += bool(result.skipped)
        record: dict[str, Any] = {"step": position.step, "tokens": position.tokens}
        for k, loss in enumerate(result.losses, start=1):
            record[f"loss/head{k}"] = loss
        record |= {"lr": lr, "grad_norm": result.gradient_norm, "tokens_per_second": config.tokens_per_step / seconds}
        record = {name: value if math.isfinite(value) else None for name, value in record.items()}
        if result.skipped:
            record["skipped"] = position.skipped
            say(f"step {position.step}: {result.skipped}, step skipped ({position.skipped} so far)")
        self.log.write(record)
        if position.skipped_in_a_row >= SKIPS_IN_A_ROW:
            raise UsageError(
                f"{self.folder.path}: {SKIPS_IN_A_ROW} steps in a row were skipped, up to step {position.step}: "
                f"{result.skipped}; lower optimizer.lr, raise optimizer.warmup_steps, "
                + (
                    "or take dtype float32"
                    if not result.finite
                    else "or raise optimizer.spike_threshold (0: skip none)"
                )
            )
        return result, seconds

    def validate(self) -> None:
        if self.validation_shards is None:
            return
        record = validate(self.model, self.validation_shards, self.config, self.device)
        self.log.write({"step": self.position.step, "tokens": self.position.tokens, **record})
        parts = []
        for k in sorted({1, self.config.model.heads}):
            if f"validation/loss/head{k}" in record:
                bits, top1 = record[f"validation/bits_per_byte/head{k}"], record[f"validation/top1/head{k}"]
                parts.append(f"head {k}: {bits:.3f} bits per byte, top-1 {top1:.1%}")
        say(f"step {self.position.step}: validation, {'; '.join(parts)}")

    def save(self) -> None:
        if self.saved_step == self.position.step:
            return
        self.log.sync()
        keep = self.config.checkpoints.keep_last
        checkpoints.save(self.folder.checkpoints, self.model, self.optimizers, self.position, keep_last=keep)
        self.saved_step = self.position.step

    def _say_start(self) -> None:
        config, counts = self.config, self.config.model.parameters()
        epoch = self.stream.rows_per_epoch * config.length
        say(
            f"{counts['total']:,} parameters ({config.model.heads} {config.model.head_kind} heads), "
            f"{self.device}, {config.dtype}"
        )
        say(
            f"{config.steps:,} steps of {config.tokens_per_step:,} tokens: "
            f"{config.steps * config.tokens_per_step / epoch:.2f} times over {epoch:,} tokens"
        )


def build_model(config: RunConfig, device: torch.device) -> Transformer:
    """First weights from `config.seed`, the same on every device; blocks compiled one by one where asked for."""
    torch.manual_seed(config.seed)
    model = Transformer(config.model).to(device)
    if config.compile:
        # Block by block, never the step as a whole: its backward passes begin and end inside the walk.
        for block in (*model.trunk.blocks, *model.heads):
            if isinstance(block, Block):
                block.compile()
    return model


def pick_device(name: str) -> torch.device:
    """auto is a GPU where torch sees one. Raises UsageError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} is not usable here; take auto or cpu") from error
    return device


def _long_enough(shards: TokenShards | None, config: RunConfig) -> TokenShards | None:
    """None, with a line, where the held-out documents do not fill one row: small corpora can still be trained on."""
    if shards is not None:
        try:
            evaluation_batches(shards, rows=1, length=config.length, heads=config.model.heads, limit_rows=1)
        except UsageError as error:
            say(f"nothing is validated: {error}")
            return None
    return shards


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _shown(result: StepResult, tokens_per_second: float) -> dict[str, object]:
    losses = [f"{loss:.3f}" for loss in result.losses]
    shown = " ".join(losses) if len(losses) <= 4 else f"{losses[0]} .. {losses[-1]}"
    return {"loss": shown, "tokens/s": f"{tokens_per_second:,.0f}"}
