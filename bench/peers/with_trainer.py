"""Hugging Face's Trainer and our training loop, which take turns on the same model, weights and batch."""

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

from headstart.console import Progress
from headstart.data.batches import Batch
from headstart.errors import UsageError
from headstart.formats.huggingface import load_peer, save_model
from headstart.settings_loader import load_settings
from headstart.training.config import DataConfig, RunConfig
from headstart.training.loop import Run
from headstart.training.processes import joined
from headstart.training.run_folder import RunFolder

WARMUP = 2
EAGER, COMPILED, TRAINER = "headstart", "headstart, compiled", "transformers Trainer"


def check_installed() -> None:
    """Raise UsageError if a package of the peer is missing."""
    for package, fix in (("transformers", "pip install 'headstart[hf]'"), ("accelerate", "pip install accelerate")):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"{package} is not installed, and the part trainer needs it; {fix}, or leave it out")


def trainer_case(case: dict[str, Any]) -> dict[str, list[float]]:
    """Return the tokens/s of turns of our loop, eager and compiled, and of Trainer."""
    config, steps = load_settings(RunConfig, case["config"], Path("benchmark")), case["steps"]
    with tempfile.TemporaryDirectory() as name, joined(config.device) as group, ExitStack() as stack:
        folder = Path(name)
        data = _random_data(folder, config)
        runs: dict[str, Run] = {}
        for variant in (COMPILED,) if config.compile else (EAGER, COMPILED):
            own = replace(config, run_dir=folder / variant, data=data, compile=variant == COMPILED)
            stack.enter_context(RunFolder(own.run_dir).claimed())
            run = runs[variant] = Run(own, RunFolder(own.run_dir), group, Progress)
            stack.enter_context(run.report)
            stack.enter_context(closing(run.writer))
        first = next(iter(runs.values()))
        save_model(first.learner.model, folder / "model", dtype=torch.float32)
        peer = load_peer(folder / "model", torch.float32, config.device)
        ours = {variant: partial(run.advance, steps) for variant, run in runs.items()}
        batch = next(copy.deepcopy(first.stream))
        seconds = train_in_turns(peer, batch, config, steps, case["repetitions"] + WARMUP, ours, folder)
    tokens = steps * config.tokens_per_step
    return {name: [tokens / each for each in values[WARMUP:]] for name, values in seconds.items()}


def train_in_turns(
    peer: Any,
    batch: Batch,
    config: RunConfig,
    steps: int,
    turns: int,
    ours: Mapping[str, Callable[[], None]],
    folder: Path,
) -> dict[str, list[float]]:
    """Train `peer` on `batch` by one `Trainer.train()`, and take our turns after each of its turns of `steps` steps.

    Returns:
        The seconds of every turn.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    seconds: dict[str, list[float]] = {name: [] for name in (*ours, TRAINER)}

    def now() -> float:
        if config.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    class Clock(TrainerCallback):
        began = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = now()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % steps == 0:
                for name, take in {TRAINER: lambda: None, **ours}.items():
                    take()
                    ended = now()
                    seconds[name].append(ended - self.began)
                    self.began = ended

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps * turns,
        per_device_train_batch_size=config.batch.rows,
        bf16=config.dtype == "bfloat16",
        use_cpu=config.device == "cpu",
        torch_compile=bool(config.compile),
        optim="adamw_torch_fused",
        learning_rate=config.optimizer.lr,
        adam_beta1=config.optimizer.betas[0],
        adam_beta2=config.optimizer.betas[1],
        weight_decay=config.optimizer.weight_decay,
        max_grad_norm=config.optimizer.clip,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=config.device != "cpu",
    )
    examples = [{"input_ids": row, "labels": row} for row in batch.tokens]
    Trainer(peer, arguments, train_dataset=examples * steps * turns, callbacks=[Clock()]).train()
    return seconds


def _random_data(folder: Path, config: RunConfig) -> DataConfig:
    """Return one document for a few steps. With a larger vocabulary most ids stay unused; the work is the same."""
    generator = torch.Generator().manual_seed(0)
    count = 4 * config.tokens_per_step + config.model.heads
    text = folder / "text.txt"
    text.write_bytes(bytes(torch.randint(97, 123, (count,), generator=generator).tolist()))
    return DataConfig(sources=(str(text),), validation_fraction=0.0)
