"""Metrics of a run: the line of each step, and everything the run reports while it trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch

from headstart.console import duration, say
from headstart.data.mixture import Source
from headstart.hardware import peak_flops, resident_memory
from headstart.training.adapt.run import flops_per_token
from headstart.training.checkpoint_state import Position
from headstart.training.config import RunConfig
from headstart.training.processes import Processes
from headstart.training.profiling import ProfileConfig, StepProfiler
from headstart.training.run_folder import RunFolder, RunLog
from headstart.training.step import StepResult
from headstart.training.trackers import Trackers, WatchConfig
from headstart.training.validation import describe_sample
from headstart.training.yaml_settings import to_plain


def expected_tokens_per_pass(accuracies: Sequence[float]) -> float:
    """Estimate the tokens that a decoding pass will commit: 1 + sum_k prod_{j=2..k} accuracy_j, from 1 to n.

    It is no measurement: it takes the top-1 accuracies of heads 2..k for the independent acceptance rates of their
    drafts, and training counts them on given text, while decoding drafts the model's own. An accuracy is NaN for a head
    whose hits were not counted, before which the drafts end; with head 1's the result is NaN.
    """
    if math.isnan(accuracies[0]):
        return math.nan
    expected = accepted = 1.0
    for accuracy in accuracies[1:]:
        if math.isnan(accuracy):
            break
        accepted *= accuracy
        expected += accepted
    return expected


def step_record(
    result: StepResult,
    *,
    step: int,
    tokens: int,
    clip: float,
    tokens_per_second: float,
    seconds_at_peak: float,
    memory: int | None,
    tokens_per_pass: float | None = None,
) -> dict[str, Any]:
    """Return the metrics of one optimizer step by name; a number that is not finite, or not known, is None.

    Args:
        result: the step.
        step: steps done so far, this one included.
        tokens: tokens trained on so far, those of this step included.
        clip: largest gradient norm that is not clipped.
        tokens_per_second: rate of this step, over all processes.
        seconds_at_peak: seconds that the matrix products of one token would take on all devices together at their peak:
            `ModelConfig.flops_per_token` / peak. Times tokens_per_second it is the model FLOPs utilization.
        memory: bytes, see `memory_in_use`.
        tokens_per_pass: estimate of `expected_tokens_per_pass`, if there is one.
    """
    record: dict[str, Any] = {"step": step, "tokens": tokens}
    record |= {f"loss/head{k}": loss for k, loss in enumerate(result.losses, start=1)}
    record |= {f"loss/{method}": loss for method, loss in result.auxiliary.items()}
    record |= {f"top1/head{k}": share for k, share in enumerate(result.accuracies, start=1)}
    if tokens_per_pass is not None:
        record["expected_tokens_per_pass"] = tokens_per_pass
    record |= {
        "lr": result.lr,
        "grad_norm": result.gradient_norm,
        # Readers make a share of it; a running share would not survive a resume.
        "clipped": result.finite and result.gradient_norm > clip,
        "tokens_per_second": tokens_per_second,
        "mfu": tokens_per_second * seconds_at_peak,
        "memory_gib": None if memory is None else memory / 2**30,
    }
    return {name: None if value is None or not math.isfinite(value) else value for name, value in record.items()}


def memory_in_use(device: torch.device) -> int | None:
    """Return bytes: on a GPU the peak of tensors so far, on a CPU the resident memory of this process now."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_memory()


class RunReport:
    """Report of a run: lines on the terminal, metrics.jsonl, trackers, a profile. A context manager.

    Every process has one; only that of the first one writes.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, processes: Processes, position: Position) -> None:
        self._config, self._folder, self._processes = config, folder, processes
        self._log = RunLog(folder.metrics, position.step) if processes.main else None
        # The first process measures for all: processes of one machine share its cores or have a GPU each.
        peak, self._peak_source = processes.on_main(
            lambda: peak_flops(config.dtype, str(processes.device), torch.get_num_threads())
        )
        self._flops, self._peak = flops_per_token(config), peak * processes.count
        profile = config.profile if processes.main else ProfileConfig()
        self.profiler = StepProfiler(profile, folder.path / "profile", processes.device, position.step)
        self._trackers = Trackers(WatchConfig(), folder.path, {}, 0)  # none

        def start() -> None:
            self._trackers = Trackers(config.watch, folder.path, to_plain(config), position.step)

        processes.on_main(start)
        self._open = ExitStack()

    def __enter__(self) -> RunReport:
        self._open.enter_context(self._trackers)
        self._open.enter_context(self.profiler)
        if self._log is not None:
            self._open.callback(self._log.close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def write(self, record: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl and pass it to the trackers."""
        if self._log is not None:
            self._log.write(record)
        self._trackers.log(record, record["step"])

    def sync(self) -> None:
        """Flush the lines to disk before a checkpoint, which must not exist without them."""
        if self._log is not None:
            self._log.sync()

    def say_start(self, sources: Sequence[Source], rows_of: Sequence[int]) -> None:
        """Print the model, the machine and the epochs; `rows_of` are the rows of an epoch of each source."""
        config, processes, counts = self._config, self._processes, self._config.model.parameters()
        spread = ""
        if processes.count > 1:
            copies, shared = config.parallel.mesh_shape(processes.count, processes.per_node)
            held = "each whole" if shared == 1 else f"each shared by {shared}"
            spread = f", {processes.count} processes, {copies} {'copy' if copies == 1 else 'copies'} {held}"
        say(
            f"{counts['total']:,} parameters ({config.model.heads} {config.model.head_kind} heads), "
            f"{processes.device.type}, {config.dtype}{spread}"
        )
        say(f"{self._flops / 1e6:,.1f} MFLOP a token, {self._peak / 1e9:,.0f} GFLOP/s at most ({self._peak_source})")
        tokens, total = config.steps * config.tokens_per_step, sum(source.weight for source in sources)
        if config.minutes is not None:
            most = f"at most {config.steps:,} steps of {config.tokens_per_step:,} tokens"
            say(f"{config.minutes:g} minutes, {most}: the learning rate follows the clock")
            return
        visits = []
        for source, rows in zip(sources, rows_of):
            epoch = rows * config.length
            visits.append(f"{tokens * source.weight / total / epoch:.2f} epochs of {epoch:,} tokens")
        steps = f"{config.steps:,} steps of {config.tokens_per_step:,} tokens: "
        if len(visits) == 1:
            say(steps + visits[0])
            return
        say(f"{steps}{len(visits)} sources mixed")
        for source, visit in zip(sources, visits):
            share = f"weight {source.weight:g} ({source.weight / total:.1%})"
            say(f"  {source.name} ({source.train.directory}): {share}, {visit}")

    def step(self, result: StepResult, position: Position) -> None:
        """Write the line of a step, which `position` includes."""
        record = step_record(
            result,
            step=position.step,
            tokens=position.tokens,
            clip=self._config.optimizer.clip,
            tokens_per_second=self._config.tokens_per_step / result.seconds,
            seconds_at_peak=self._flops / self._peak,
            memory=memory_in_use(self._processes.device),
            tokens_per_pass=expected_tokens_per_pass(result.accuracies[: self._config.model.drafting_heads]),
        )
        if self._config.minutes is not None:
            record["seconds"] = position.seconds
        if result.skipped:
            record["skipped"] = position.skipped
            say(f"step {position.step}: {result.skipped}, step skipped ({position.skipped} so far)")
        self.write(record)

    def validation(self, position: Position, scores: dict[str, float], sample: dict[str, Any] | None) -> None:
        """Report the scores of held-out documents, {} if there are none, and the decoded sample, if any."""
        parts = []
        for k in sorted({1, self._config.model.heads}):
            if f"validation/loss/head{k}" in scores:
                bits, top1 = scores[f"validation/bits_per_byte/head{k}"], scores[f"validation/top1/head{k}"]
                parts.append(f"head {k}: {bits:.3f} bits per byte, top-1 {top1:.1%}")
        if parts:
            say(f"step {position.step}: validation, {'; '.join(parts)}")
        if sample is not None:
            say(f"step {position.step}: {describe_sample(sample)}")
        record = scores | ({} if sample is None else {"sample": sample})
        if record:
            self.write({"step": position.step, "tokens": position.tokens, **record})

    def say_end(self, position: Position, steps: int, seconds: float) -> None:
        """Print the end of the run: `steps` taken since its start, in `seconds`."""
        say(f"done: {steps:,} steps, {steps * self._config.tokens_per_step:,} tokens in {duration(seconds)}")
        if position.skipped:
            say(f"{position.skipped} steps were skipped: their loss or gradient was not finite, or their loss a spike")
        if position.skipped_in_a_row:
            say(f"warning: the last {position.skipped_in_a_row} of them, so the weights may be those of a diverged run")
        say(f"{self._folder.result.name} in {self._folder.result}, numbers in {self._folder.metrics}")


def in_short(result: StepResult, tokens_per_second: float) -> dict[str, object]:
    """Return the numbers shown next to the progress bar."""
    # NaN in a finite step: the head is frozen or had no target.
    shown = {k: loss for k, loss in enumerate(result.losses, 1) if not (result.finite and math.isnan(loss))}
    losses = [f"{loss:.3f}" for loss in shown.values()]
    name = "loss" if len(shown) == len(result.losses) else f"loss of heads {', '.join(map(str, shown))}"
    return {
        name: " ".join(losses) if len(losses) <= 4 else f"{losses[0]} .. {losses[-1]}",
        "tokens/s": f"{tokens_per_second:,.0f}",
    }
