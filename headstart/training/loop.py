"""The training loop: `train` runs or goes on with a run folder until its last step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch.optim import Optimizer

from headstart.console import Progress, say
from headstart.data.batches import BatchStream
from headstart.data.mixture import Source
from headstart.errors import UsageError
from headstart.formats.assembly import check_names
from headstart.formats.families import family_of
from headstart.formats.huggingface import save_model
from headstart.model.transformer import Transformer
from headstart.objective.head_weights import drawn
from headstart.training import checkpoints
from headstart.training.adapt.run import ExistingModel, check_vocabulary, tokenizer_of
from headstart.training.auxiliary.token_order import add_token_order
from headstart.training.checkpoint_state import Position
from headstart.training.checkpoint_writer import CheckpointWriter
from headstart.training.compilation import blocks_compiled
from headstart.training.config import RunConfig
from headstart.training.extension import begin_extension, rate_of
from headstart.training.interruption import Interrupted, Interruption, watching_signals
from headstart.training.optimizer import build_optimizers
from headstart.training.parallel import GradientSums, materialize, parallelize, whole_model
from headstart.training.processes import Processes, joined
from headstart.training.run_folder import RunFolder
from headstart.training.run_report import RunReport, in_short
from headstart.training.sample import decode_sample, prompt_tokens
from headstart.training.spikes import LossHistory
from headstart.training.step import StepResult, inputs_of, move, train_step
from headstart.training.trackers import check_packages
from headstart.training.validation import long_enough, validate_sources

STEPS_WITHOUT_TARGET = 100
"""So many first steps without anything to predict end a run."""
SKIPS_IN_A_ROW = 20
"""Skipped steps after which a run is given up."""
SAMPLED_TOGETHER = 500_000_000
"""Several processes: up to this many parameters the model is made whole on one of them to decode a sample. The others
wait."""

OTHER = {"tokens": "other tokens", "tokenizer": "another tokenizer"}
"""What has changed in a source, by the names of `TokenShards.digests`."""


def train(config: RunConfig, *, progress: Callable[..., Progress] = Progress) -> Path:
    """Trains until `config.steps` and returns the path of the model directory.

    Goes on by itself, bit for bit, where the run folder holds a checkpoint. Raises Interrupted after Ctrl-C or SIGTERM,
    with a checkpoint saved; UsageError for whatever the user can mend.
    """
    check_packages(config.watch)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = RunFolder(config.run_dir)
    with joined(config.device) as processes:
        config = processes.on_main(lambda: config.on(processes.device.type))
        config.loss.require(processes.device)
        processes.on_main(lambda: check_storable(config))
        with folder.claimed(processes.main):
            before = processes.on_main(lambda: folder.accept(config))
            done = processes.on_main(lambda: max(checkpoints.all_steps(folder.checkpoints), default=0))
            if done < config.steps or not processes.on_main(folder.model.exists):
                run = Run(config, folder, processes, progress, before)
                try:
                    with run.report:
                        run.loop(progress)
                finally:
                    run.writer.close()
            else:
                say(f"{folder.path}: already trained for {done} steps, model in {folder.model}; more with --steps")
    return folder.model


class Run:
    """A run in memory: model, optimisers, data and position."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        processes: Processes,
        progress: Callable[..., Progress],
        before: RunConfig | None = None,
    ) -> None:
        """`before`: the configuration of the run's last start, if there was one."""
        self.config, self.folder, self.processes, self.device = config, folder, processes, processes.device
        self.micro_batches, rows = config.micro_batches(processes.count)
        processes.on_main(lambda: folder.prepare_shards(config, progress))
        self.sources = folder.open_sources(config)
        self.stream = BatchStream(
            [source.train for source in self.sources],
            weights=[source.weight for source in self.sources],
            rows=rows,
            length=config.length,
            heads=config.model.offset_of_heads,
            seed=config.seed,
            rank=processes.rank,
            ranks=processes.count,
        )
        check_answers(self.sources, config)
        self.validated = long_enough(self.sources, config)
        self.existing: ExistingModel | None = None
        if config.adapt is not None:
            check_vocabulary(self.sources, config.adapt.model, config.model.vocab_size)
            self.existing = ExistingModel(config, processes)
            self.existing.cache_states(self.sources, progress)
        self.model, self.sums = build_model(config, processes, self.existing)
        self.optimizers: list[Optimizer] = build_optimizers(self.model, config.optimizer, self.device, config.dtype)
        digests = processes.on_main(lambda: [source.train.digests() for source in self.sources])
        self.position = Position(data=self.stream.state_dict(), planned=config.steps)
        restored = checkpoints.restore_newest(folder.checkpoints, self.model, self.optimizers, processes)
        if restored is not None:
            self.position = processes.on_main(lambda: begin_extension(restored, config, before))
            self.stream.load_state_dict(position_in_data(restored, digests, self.sources, config))
        self.position.sources = digests
        self.history = LossHistory(**self.position.history)
        self.steps, self.targets = 0, 0  # since this process began
        self.writer = CheckpointWriter(folder.checkpoints, self.model, self.optimizers, config.checkpoints, processes)
        self.writer.saved(self.position.step if restored is not None else -1)
        self.tokenizer = self.sources[0].train.tokenizer()
        if config.adapt is not None:
            self.tokenizer = tokenizer_of(config.adapt.model, self.tokenizer)
        prompt_tokens(self.tokenizer, config)
        self.report = RunReport(config, folder, processes, self.position)
        self.report.say_start(self.sources, self.stream.rows_of)

    def loop(self, progress: Callable[..., Progress]) -> None:
        """Steps, validations and checkpoints until the last step; then the model directory."""
        config, position, started = self.config, self.position, time.monotonic()
        first, due = position.step, False
        with (
            watching_signals(alone=self.processes.count == 1) as interruption,
            progress("train", config.steps, unit="steps", start=position.step) as bar,
        ):
            while position.step < config.steps:
                with self.report.profiler.around(position.step + 1):
                    result, seconds = self.step(interruption)
                bar.advance(1, **in_short(result, config.tokens_per_step / seconds))
                last = position.step >= config.steps
                if last or _due(position.step, config.validation.every):
                    self.validate()
                due = due or _due(position.step, config.checkpoints.every)
                # Weights that steps fail with are no place to return to: the first step that is applied is saved.
                if not last and not result.skipped and (result.stop or due):
                    self.save()
                    due = False
                if not last and result.stop:
                    self.writer.wait(needed=True)
                    newest = self.processes.on_main(lambda: checkpoints.latest(self.folder.path))
                    raise Interrupted(self.folder.path, position.step, newest, interruption.signal)
            # The model first: a checkpoint of the last step then means that nothing is left to do.
            self.save_model()
            self.save()
            self.writer.wait(needed=True)
            if not position.skipped_in_a_row:
                self.writer.rotate()
        self.report.say_end(position, position.step - first, time.monotonic() - started)

    def step(self, interruption: Interruption) -> tuple[StepResult, float]:
        """The next optimiser step, and the seconds it took."""
        config, position = self.config, self.position
        began = time.perf_counter()
        read = islice(self.stream, self.micro_batches)
        batches = [move(inputs_of(batch, config, position.step), self.device) for batch in read]
        lr = rate_of(position.step, config, position.extended)
        if self.existing is None:
            fraction = 1.0 if position.extended else position.step / config.steps
            weights = config.head_weights.at(fraction, config.model.heads)
        else:
            weights = self.existing.begin_step(position.step, position.extended)
        if config.head_weights.sampled:
            weights = drawn(weights, config.seed, position.step)
        result = train_step(
            self.model,
            self.optimizers,
            batches,
            weights,
            lr,
            config,
            self.processes,
            self.sums,
            lambda: interruption.requested,
            self.history,
            None if self.existing is None else self.existing.known,
        )
        seconds = time.perf_counter() - began

        position.step += 1
        position.tokens += config.tokens_per_step
        position.lr = lr
        position.data = self.stream.state_dict()
        position.history = dataclasses.asdict(self.history)
        position.skipped_in_a_row = position.skipped_in_a_row + 1 if result.skipped else 0
        position.skipped += bool(result.skipped)
        self.report.step(result, position, lr, seconds)
        self.count_targets(result)
        if position.skipped_in_a_row >= SKIPS_IN_A_ROW:
            raise self.diverged(result)
        if not result.skipped:
            self.writer.rotate()
        return result, seconds

    def count_targets(self, result: StepResult) -> None:
        """Raise UsageError if the first steps, or all of a short run, had nothing to predict."""
        self.targets += result.targets
        self.steps += 1
        if not self.targets and (self.steps == STEPS_WITHOUT_TARGET or self.position.step >= self.config.steps):
            raise UsageError(
                f"{self.folder.path}: {self.steps} steps had no target for any trained head; take longer documents, "
                "conversations with answers to be predicted, or head weights above 0",
                said=not self.processes.main,
            )

    def diverged(self, result: StepResult) -> UsageError:
        """Return the error of a run whose last steps were all skipped; it names the checkpoint from before them."""
        position, root = self.position, self.folder.checkpoints
        self.writer.wait()
        applied = position.step - position.skipped_in_a_row
        before = self.processes.on_main(lambda: checkpoints.set_aside(root, applied))
        if before is None:
            back = f"there is no checkpoint from before them, so move {root} away and start anew"
        else:
            back = f"the same command then resumes from {before}, from before them"
        other = "take dtype float32" if not result.finite else "raise optimizer.spike_threshold (0: skip none)"
        return UsageError(
            f"{self.folder.path}: {position.skipped_in_a_row} steps in a row were skipped, up to step {position.step}: "
            f"{result.skipped}; lower optimizer.lr, raise optimizer.warmup_steps, or {other}; {back}",
            said=not self.processes.main,
        )

    def validate(self) -> None:
        """Scores held-out documents and decodes the sample, whichever of the two this run has."""
        scores: dict[str, float] = {}
        if self.validated:
            scores = validate_sources(self.model, self.validated, self.config, self.processes)
        sample = None
        if self.config.watch.sample_tokens and (
            self.processes.count == 1 or self.config.model.parameters()["total"] <= SAMPLED_TOGETHER
        ):
            whole = self.whole_model()
            if whole is not None:
                sample = decode_sample(whole, self.tokenizer, self.config)
        self.sums.free()
        self.report.validation(self.position, scores, sample)

    def whole_model(self) -> Transformer | None:
        """The model itself, or with several processes a whole copy of it on the first one; all of them call it."""
        if self.existing is not None:
            return self.existing.whole()
        if self.processes.count == 1:
            return self.model
        return whole_model(self.model, torch.bfloat16, keep=self.processes.main)

    def save(self) -> None:
        """Starts a checkpoint of this step; it is written while training goes on."""
        self.report.sync()
        self.writer.save(self.position)

    def save_model(self) -> None:
        """Writes the model directory, on the first process."""
        model = self.whole_model()

        def write() -> None:
            assert model is not None
            if self.existing is not None:
                self.existing.save(model, self.folder.model, self.tokenizer)
            else:
                save_model(model, self.folder.model, self.tokenizer, dtype=torch.bfloat16)

        self.processes.on_main(write)


def check_storable(config: RunConfig) -> None:
    """Raise UsageError where no model directory can hold the model: it is not worth training."""
    family_of(config.model)
    with torch.device("meta"):
        check_names(Transformer(config.model))


def check_answers(sources: Sequence[Source], config: RunConfig) -> None:
    """Raises UsageError where answers are to be hidden that a source does not mark."""
    for source in sources:
        if config.masked_inputs.kind == "teacherless" and source.train.targets is None:
            raise UsageError(
                f"{source.train.directory}: does not say which tokens are answers, so masked_inputs.kind teacherless "
                "would hide all; prepare conversations (headstart prepare), or take kind random"
            )


def position_in_data(
    position: Position, digests: list[dict[str, str]], sources: Sequence[Source], config: RunConfig
) -> dict[str, int]:
    """Return where the stream of batches continues from a checkpoint: where that says, unless the data has changed.

    `digests`: those of `sources` as they are now. Raises UsageError where they are others and the configuration does
    not allow that; where it does, a single source is read from the start of its next epoch.
    """
    if not position.sources:
        say("warning: the checkpoint does not record which data it was trained on; the data is taken for the same")
        return position.data
    changed = [
        f"{source.train.directory} has {' and '.join(names)}"
        for source, now, before in zip(sources, digests, position.sources)
        if (names := [words for name, words in OTHER.items() if now[name] != before.get(name)])
    ]
    if not changed:
        return position.data
    flag = "--data.allow-changed" if config.adapt is None else "--allow-changed-data"
    if not config.data.allow_changed:
        raise UsageError(
            f"{config.run_dir}: was trained on other data: {', '.join(changed)} than at step {position.step}; put the "
            f"old data back, give another --run-dir, or continue on this data with {flag}"
        )
    say(f"continuing on other data, as {flag} says: {', '.join(changed)} than at step {position.step}")
    if "epoch" in position.data:
        return {"epoch": position.data["epoch"] + 1, "row": 0}
    return position.data


def build_model(
    config: RunConfig, processes: Processes, existing: ExistingModel | None = None
) -> tuple[Transformer, GradientSums]:
    """First weights from `config.seed`, the same for every device and number of processes, spread over them; or those
    of an existing model with new heads."""
    torch.manual_seed(config.seed)
    if existing is not None:
        compile = blocks_compiled(config, processes)
        return existing.model, parallelize(existing.model, None, config.parallel, compile=compile, dtype=config.dtype)
    with torch.device("meta"):
        model = Transformer(config.model)
        if config.token_order.on:
            add_token_order(model)
    mesh = processes.mesh(config.parallel.mesh_shape(processes.count, processes.per_node))
    compile = blocks_compiled(config, processes)
    sums = parallelize(model, mesh, config.parallel, compile=compile, dtype=config.dtype)
    materialize(model, processes.device, config.seed)
    return model, sums


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
