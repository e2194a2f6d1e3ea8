"""The training loop: `train` starts or resumes a run and takes its steps up to the last one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from headstart.console import Progress, say
from headstart.data.batches import BatchStream
from headstart.data.mixture import Source
from headstart.errors import UsageError
from headstart.formats.assembly import check_names
from headstart.formats.families import family_of
from headstart.formats.hub import local_path
from headstart.model.transformer import Transformer
from headstart.threads import ThreadControl
from headstart.training import checkpoints
from headstart.training.adapt.run import ExistingModel, check_vocabulary
from headstart.training.checkpoint_state import Position, read_state
from headstart.training.config import RunConfig
from headstart.training.interruption import Interrupted, Interruption, watching_signals
from headstart.training.metrics import RunReport, in_short
from headstart.training.new_model import NewModel
from headstart.training.processes import Processes, joined
from headstart.training.run_folder import RunFolder
from headstart.training.schedule import begin_extension, is_finished, time_spent
from headstart.training.spikes import LossHistory
from headstart.training.step import Callback, Learner, StepResult, take_steps
from headstart.training.trackers import check_packages
from headstart.training.validation import decode_sample, long_enough, sample_prompts, validate_sources

STEPS_WITHOUT_TARGET = 100
"""First steps without any target after which a run ends."""
SKIPS_IN_A_ROW = 20
"""Skipped steps in a row after which a run ends."""
SAMPLED_TOGETHER = 500_000_000
"""Most parameters of a model that several processes gather on one of them to decode a sample, while the others wait."""

OTHER = {"tokens": "other tokens", "tokenizer": "another tokenizer"}
"""Changes of a source, by the names of `TokenShards.digests`."""


def train(
    config: RunConfig, *, progress: Callable[..., Progress] = Progress, clock: Callable[[], float] = time.monotonic
) -> Path:
    """Train until `config.steps` or `config.minutes` and return the path of the model directory, or of heads alone.

    The run resumes if its folder holds a checkpoint, bit for bit unless it has `minutes`. Raises Interrupted after
    Ctrl-C or SIGTERM, with a checkpoint saved, and UsageError for whatever the user can fix.
    """
    check_packages(config.watch)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = RunFolder(config.run_dir, config.result)
    with joined(config.device) as processes:
        config = processes.on_main(lambda: config.on(processes.device.type))
        config.loss.require(processes.device)
        processes.on_main(lambda: check_storable(config))
        with folder.claimed(processes.main):
            before = processes.on_main(lambda: folder.accept(config))
            done = processes.on_main(lambda: steps_of_finished(config, folder))
            if not done:
                run = Run(config, folder, processes, progress, before, clock)
                try:
                    with run.report:
                        run.loop(progress)
                finally:
                    run.writer.close()
            else:
                more = "; more with --steps" if config.minutes is None else ""
                say(f"{folder.path}: already trained for {done} steps, {config.result} in {folder.result}{more}")
    return folder.result


class Run(Callback):
    """A run in memory: learner, position, data and report.

    As a callback it keeps the books of each step: position, report, skipped steps.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        processes: Processes,
        progress: Callable[..., Progress],
        before: RunConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the data, build the model and restore the newest checkpoint.

        Args:
            config: the run.
            folder: its folder, claimed.
            processes: the processes of the run.
            progress: makes progress bars.
            before: the configuration of the run's last start, if there was one.
            clock: returns seconds since some moment.
        """
        self.config, self.folder, self.processes, self._clock = config, folder, processes, clock
        _, rows = config.micro_batches(processes.count)
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
        for auxiliary in config.auxiliaries:
            for source in self.sources:
                auxiliary.check_data(source.train)
        self.validated = long_enough(self.sources, config)
        if config.init_from is not None:
            origin, size = local_path(config.init_from), config.model.vocab_size
            processes.on_main(lambda: check_vocabulary(self.sources, origin, size))
        self.subject: NewModel | ExistingModel
        if config.adapt is None:
            self.subject = NewModel.build(config, processes)
        else:
            self.subject = ExistingModel(config, processes, self.sources, progress)
        self.learner = Learner(self.subject, config, processes, history=LossHistory())
        self.position = self._restore(before)
        self.learner.spent = lambda: time_spent(self.position, config)
        self.steps, self.targets = 0, 0  # since this process began
        # Threads that the user has chosen stay, and so do those of several processes, which share the machine.
        free = config.threads is None and processes.count == 1 and processes.device.type == "cpu"
        self.threads = ThreadControl(torch.get_num_threads() if free else 1, torch.set_num_threads)
        self._began = clock() - self.position.seconds
        self.tokenizer = self.subject.tokenizer(self.sources[0].train.tokenizer())
        self.prompts = sample_prompts(self.sources, self.tokenizer, config)
        self.report = RunReport(config, folder, processes, self.position)
        self.report.say_start(self.sources, self.stream.rows_of)

    def _restore(self, before: RunConfig | None) -> Position:
        """Load the newest checkpoint, if there is one, and start the writer of further ones."""
        config, folder, learner, processes = self.config, self.folder, self.learner, self.processes
        digests = processes.on_main(lambda: [source.train.digests() for source in self.sources])
        position = Position(data=self.stream.state_dict(), planned=config.steps)
        restored = checkpoints.restore_newest(folder.checkpoints, learner.model, learner.optimizers, processes)
        if restored is not None:
            position = processes.on_main(lambda: begin_extension(restored, config, before))
            self.stream.load_state_dict(position_in_data(restored, digests, self.sources, config))
        position.sources = digests
        learner.history, learner.extended = LossHistory(**position.history), position.extended
        self.writer = checkpoints.CheckpointWriter(
            folder.checkpoints, learner.model, learner.optimizers, config.checkpoints, processes
        )
        self.writer.saved(position.step if restored is not None else -1)
        return position

    def loop(self, progress: Callable[..., Progress]) -> None:
        """Take the remaining steps, with validations and checkpoints; then write the model directory."""
        config, position = self.config, self.position
        first, before = position.step, position.seconds
        self._began = self._clock() - before
        if config.minutes is None:
            made = progress("train", config.steps, unit="steps", start=position.step)
        else:
            made = progress("train", round(60 * config.minutes), unit="seconds", start=int(before))
        watching = watching_signals(alone=self.processes.count == 1)
        with watching as interruption, self.threads, made as bar:
            self.learner.stop = lambda: interruption.requested
            self.advance(config.steps - position.step, _Watch(self, bar, interruption))
            # The model is saved first, so that a checkpoint of the last step means that nothing is left to do.
            self.save_model()
            self.save()
            self.writer.wait(needed=True)
            if not position.skipped_in_a_row:
                self.writer.rotate()
        self.report.say_end(position, position.step - first, self._clock() - self._began - before)

    def advance(self, steps: int, *callbacks: Callback) -> None:
        """Take the next `steps` steps, fewer if the run is over before."""
        first = self.position.step

        def left() -> Iterator[int]:
            for step in range(first, first + steps):
                if is_finished(self.position, self.config):
                    return
                yield step

        take_steps(self.learner, self.stream, left(), [self.report.profiler, self, *callbacks])

    def after_step(self, step: int, result: StepResult) -> None:
        """Note the step in the position and the report; give up after too many skipped ones."""
        config, position = self.config, self.position
        position.step += 1
        position.tokens += config.tokens_per_step
        position.lr = result.lr
        position.seconds = self._seconds()
        position.data = self.stream.state_dict()
        assert self.learner.history is not None
        position.history = dataclasses.asdict(self.learner.history)
        position.skipped_in_a_row = position.skipped_in_a_row + 1 if result.skipped else 0
        position.skipped += bool(result.skipped)
        self.report.step(result, position)
        self.count_targets(result)
        if line := self.threads.after_step(config.tokens_per_step):
            say(line)
        if position.skipped_in_a_row >= SKIPS_IN_A_ROW:
            raise self.diverged(result)
        if not result.skipped:
            self.writer.rotate()

    def _seconds(self) -> float:
        """Return the seconds of training so far; where the schedule follows them, those of the first process."""
        if self.config.minutes is None:
            return self._clock() - self._began
        return self.processes.on_main(lambda: self._clock() - self._began)

    def count_targets(self, result: StepResult) -> None:
        """Raise UsageError if the first steps, or all of a short run, had nothing to predict."""
        self.targets += result.targets
        self.steps += 1
        last = is_finished(self.position, self.config)
        if not self.targets and (self.steps == STEPS_WITHOUT_TARGET or last):
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
        """Score held-out documents and decode the sample, if the run has them."""
        scores: dict[str, float] = {}
        if self.validated:
            complete = self.subject.complete_held_out
            scores = validate_sources(self.learner.model, self.validated, self.config, self.processes, complete)
        sample = None
        if self.config.watch.sample_tokens and (
            self.processes.count == 1 or self.config.model.parameters()["total"] <= SAMPLED_TOGETHER
        ):
            whole = self.subject.whole()
            if whole is not None:
                sample = decode_sample(whole, self.tokenizer, self.prompts, self.config)
        self.subject.sums.free()
        self.report.validation(self.position, scores, sample)
        found = self.processes.on_main(lambda: 0.0 if sample is None else float(sample["tokens_per_pass"]))
        best, since = self.position.best_tokens_per_pass, self.position.samples_since_best
        self.position.best_tokens_per_pass = max(found, best)
        self.position.samples_since_best = 0 if found > best or not found else since + 1

    def save(self) -> None:
        """Start a checkpoint of this step; it is written while training continues."""
        self.report.sync()
        self.writer.save(self.position)

    def save_model(self) -> None:
        """Write the model directory, on the first process."""
        whole = self.subject.whole()

        def write() -> None:
            assert whole is not None
            self.subject.save(whole, self.folder.result, self.tokenizer)

        self.processes.on_main(write)


class _Watch(Callback):
    """Progress, validations, checkpoints and the stop after a signal."""

    def __init__(self, run: Run, bar: Progress, interruption: Interruption) -> None:
        self.run, self.bar, self.interruption = run, bar, interruption
        self.due = False
        """True if a checkpoint is due that a skipped step has put off."""

    def after_step(self, step: int, result: StepResult) -> None:
        """Do what is due after the step. Raises Interrupted, with a checkpoint saved, if a stop was requested."""
        run, config, done = self.run, self.run.config, self.run.position.step
        shown = in_short(result, config.tokens_per_step / result.seconds)
        if config.minutes is None:
            self.bar.advance(1, **shown)
        else:
            self.bar.update(min(int(run.position.seconds), round(60 * config.minutes)), None, step=done, **shown)
        if is_finished(run.position, config) or _due(done, config.validation.every):
            run.validate()
        last = is_finished(run.position, config)
        self.due = self.due or _due(done, config.checkpoints.every)
        # A run must not resume from weights with which steps fail, so the first step that is applied is saved.
        if not last and not result.skipped and (result.stop or self.due):
            run.save()
            self.due = False
        if not last and result.stop:
            run.writer.wait(needed=True)
            newest = run.processes.on_main(lambda: checkpoints.latest(run.folder.path))
            raise Interrupted(run.folder.path, done, newest, self.interruption.signal)


def steps_of_finished(config: RunConfig, folder: RunFolder) -> int:
    """Return the steps of a run that is over and has its result; 0 for any other."""
    done = max(checkpoints.all_steps(folder.checkpoints), default=0)
    if not folder.result.exists():
        return 0
    early = config.minutes is not None or config.validation.patience > 0
    newest = checkpoints.latest(folder.path) if early else None
    over = done >= config.steps or (newest is not None and is_finished(read_state(newest).position, config))
    return done if over else 0


def check_storable(config: RunConfig) -> None:
    """Raise UsageError if no model directory can hold the model, before it is trained."""
    family_of(config.model)
    with torch.device("meta"):
        check_names(Transformer(config.model))


def position_in_data(
    position: Position, digests: list[dict[str, str]], sources: Sequence[Source], config: RunConfig
) -> dict[str, int]:
    """Return the position in the data from which a checkpoint continues.

    If the data has changed and the configuration allows it, a single source continues with its next epoch; if it is not
    allowed, UsageError.

    Args:
        position: the checkpoint's position.
        digests: digests of `sources` as they are now.
        sources: the data.
        config: the run.
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


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
