"""Measure our training loop against Hugging Face's Trainer on the same model, weights and batch."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import fresh_process
from bench.report import Bar, Findings
from bench.train_steps import TrainSettings, from_plain, run_config
from headstart.console import Progress
from headstart.data.batches import Batch
from headstart.errors import UsageError
from headstart.formats.huggingface import load_peer, save_model
from headstart.training.config import DataConfig, RunConfig
from headstart.training.loop import Run
from headstart.training.processes import joined
from headstart.training.run_folder import RunFolder
from headstart.training.step import Callback, StepResult, autocast
from headstart.training.yaml_settings import to_plain

SPEED_BAR = Bar(">=", 1.2)
SAME_BAR = Bar("<=", 0.01)
WARMUP = 2
EAGER, COMPILED = "headstart", "headstart, compiled"


def check_installed() -> None:
    """Raise UsageError if a package of the peer is missing."""
    for package, fix in (("transformers", "pip install 'headstart[hf]'"), ("accelerate", "pip install accelerate")):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"{package} is not installed, and the part trainer needs it; {fix}, or leave it out")


def trainer(settings: TrainSettings) -> Findings:
    """Measure the tokens per second of both loops, in turns, and the difference of their first step."""
    found = Findings("trainer")
    batches = ((256, settings.rows), (settings.large_vocabulary, settings.large_rows))
    for vocab_size, batch_rows in batches:
        model = replace(settings.model(), vocab_size=vocab_size)
        config = run_config(model, batch_rows, **settings.run_fields())
        answer = fresh_process.call(
            trainer_case,
            {"config": to_plain(config), "repetitions": settings.repetitions, "steps": settings.steps},
            threads=settings.threads,
        )
        what, theirs = f"V = {vocab_size:,}", answer["theirs"]
        for name, values in (answer["ours"] | {"transformers Trainer": theirs}).items():
            found.measure(f"{what}: {name}", values, "tokens/s")
        for name, values in answer["ours"].items():
            found.ratio(f"{what}: {name} / Trainer", values, theirs, SPEED_BAR)
        loss, norm = answer["loss"], answer["gradient_norm"]
        difference = max(abs(a / b - 1) for a, b in (loss, norm))
        what = f"{what}: same weights and batch, difference of loss and gradient norm"
        found.measure(what, [difference], bar=SAME_BAR, loss=loss, gradient_norm=norm)
    sizes = " and ".join(f"{batch_rows} x {settings.length} (V = {v:,})" for v, batch_rows in batches)
    found.note(
        f"n = 1, batches of {sizes}, {settings.dtype} autocast, clipping at 1, AdamW; turns of "
        f"{settings.steps} steps in one process, the loops of both around them (reading batches, bookkeeping), nothing "
        "logged or saved by Trainer. Ours writes its line of metrics.jsonl each step. Compiled: as `headstart train` "
        "does by default in runs long enough to win by it. Trainer has `optim=adamw_torch_fused`, its fastest; else "
        "its defaults, and so is not compiled" + (", but for this report it is." if settings.compile else ".")
    )
    found.note("the difference is relative, of the first step, the larger one of the two.")
    return found


def trainer_case(case: dict[str, Any]) -> dict[str, Any]:
    """Return the tokens/s of turns of our loop, eager and compiled, and of Trainer, and the first step of both."""
    config, steps = from_plain(case["config"]), case["steps"]
    variants = (COMPILED,) if config.compile else (EAGER, COMPILED)
    with tempfile.TemporaryDirectory() as name, joined(config.device) as processes, ExitStack() as stack:
        folder = Path(name)
        data = _random_data(folder, config)
        runs: dict[str, Run] = {}
        for variant in variants:
            own = replace(config, run_dir=folder / variant, data=data, compile=variant == COMPILED)
            stack.enter_context(RunFolder(own.run_dir).claimed())
            run = runs[variant] = Run(own, RunFolder(own.run_dir), processes, Progress)
            stack.enter_context(run.report)
            stack.enter_context(closing(run.writer))
        first = runs[variants[0]]
        save_model(first.learner.model, folder / "model", dtype=torch.float32)
        peer = load_peer(folder / "model", torch.float32, config.device)
        batch = next(copy.deepcopy(first.stream))
        theirs = first_step(peer, batch, config)
        results: list[StepResult] = []
        for run in runs.values():
            run.advance(1, Collect(results))
        ours = {variant: partial(run.advance, steps) for variant, run in runs.items()}
        turns = Turns(config, steps, case["repetitions"] + WARMUP, ours)
        turns.run(peer, batch, folder)
    tokens = steps * config.tokens_per_step
    return {
        "ours": {name: [tokens / seconds for seconds in values[WARMUP:]] for name, values in turns.ours.items()},
        "theirs": [tokens / seconds for seconds in turns.theirs[WARMUP:]],
        "loss": (results[0].losses[0], theirs[0]),
        "gradient_norm": (results[0].gradient_norm, theirs[1]),
    }


class Collect(Callback):
    """Keep the results of steps."""

    def __init__(self, results: list[StepResult]) -> None:
        self.results = results

    def after_step(self, step: int, result: StepResult) -> None:
        """Keep `result`."""
        self.results.append(result)


def first_step(peer: Any, batch: Batch, config: RunConfig) -> tuple[float, float]:
    """Return the loss and the gradient norm of transformers' model, and clear its gradients."""
    device = torch.device(config.device)
    tokens, targets = batch.tokens.to(device), batch.targets[..., 0].to(device)
    with autocast(config, device):
        loss = peer(input_ids=tokens, labels=targets, shift_labels=targets).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(peer.parameters(), float("inf"))
    peer.zero_grad()
    return loss.item(), norm.item()


class Turns:
    """One `Trainer.train()` in which each of our loops takes a turn after each turn of its steps."""

    def __init__(self, config: RunConfig, steps: int, count: int, ours: Mapping[str, Callable[[], None]]) -> None:
        self.ours: dict[str, list[float]] = {name: [] for name in ours}
        self.theirs: list[float] = []
        self._began = 0.0
        self._config, self._steps, self._count, self._our_turns = config, steps, count, ours

    def run(self, peer: Any, batch: Batch, folder: Path) -> None:
        """Train `peer` on `batch` until all turns are over."""
        from transformers import Trainer, TrainerCallback, TrainingArguments

        turns = self

        class Clock(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                turns._began = _now(turns._config.device)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step % turns._steps == 0:
                    turns.change()

        settings = self._config.optimizer
        total, rows = self._steps * self._count, self._config.batch.rows
        arguments = TrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=total,
            per_device_train_batch_size=rows,
            bf16=self._config.dtype == "bfloat16",
            use_cpu=self._config.device == "cpu",
            torch_compile=bool(self._config.compile),
            optim="adamw_torch_fused",
            learning_rate=settings.lr,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.clip,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=self._config.device != "cpu",
        )
        examples = [{"input_ids": row, "labels": row} for row in batch.tokens]
        Trainer(peer, arguments, train_dataset=examples * total, callbacks=[Clock()]).train()

    def change(self) -> None:
        """Note the end of Trainer's turn and take ours."""
        began = _now(self._config.device)
        self.theirs.append(began - self._began)
        for name, take in self._our_turns.items():
            take()
            ended = _now(self._config.device)
            self.ours[name].append(ended - began)
            began = ended
        self._began = began


def _now(device: str) -> float:
    """Return the time, once the device has done its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def _random_data(folder: Path, config: RunConfig) -> DataConfig:
    """Return one document for a few steps. With a larger vocabulary most ids stay unused; the work is the same."""
    generator = torch.Generator().manual_seed(0)
    count = 4 * config.tokens_per_step + config.model.heads
    text = folder / "text.txt"
    text.write_bytes(bytes(torch.randint(97, 123, (count,), generator=generator).tolist()))
    return DataConfig(sources=(str(text),), validation_fraction=0.0)
