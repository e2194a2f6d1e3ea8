"""Train inside a case: the library's own step on batches that lie in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from headstart.data.batches import Batch, BatchStream
from headstart.data.shards import SplitTokens, TokenShards
from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.model.presets import PRESETS
from headstart.model.transformer import Transformer
from headstart.objective.head_weights import HeadWeights
from headstart.training.config import BatchConfig, RunConfig
from headstart.training.new_model import NewModel
from headstart.training.optimizer import OptimizerConfig
from headstart.training.parallel import GradientSums
from headstart.training.processes import joined
from headstart.training.step import Callback, Learner, StepResult, take_steps
from studies.resume import next_training
from studies.study import Case, Tell, crossed

SIZES = {
    "0.06M": ModelConfig(dim=32, layers=5, attention_heads=2),
    "0.25M": ModelConfig(dim=64, layers=5, attention_heads=4),
    "0.55M": ModelConfig(dim=96, layers=5, attention_heads=4),
} | PRESETS
"""Sizes by name: those of Table S14, and smaller ones that a CPU trains in minutes. Their names are
12 x layers x dim^2, like the first seven of Table S14."""
LAST = 0.1
"""Last share of the steps, over which losses are averaged."""


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of training, the same for all conditions of a study."""

    steps: int = 100
    rows: int = 32
    length: int = 128
    accumulate: int = 1
    """Micro-batches of `rows` rows in a step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """The paper's optimizer, or the one that needs fewer steps."""
    lr: float = 1e-3
    warmup_steps: int = 20
    final_lr_ratio: float = 0.03
    clip: float = 1.0
    """Largest norm of the gradient for each head: n heads sum n losses, and are clipped at n times this (.inf: never).
    """
    dtype: Literal["auto", "bfloat16", "float32"] = "float32"


class StopTraining(Exception):
    """Raised by a watcher of `train_model`: what was to be learned is learned."""


@dataclass
class Trained:
    """A trained model, in evaluation mode on the device of the run."""

    model: Transformer
    losses: list[float]
    """Mean loss of each head over the last tenth of the steps, in nats."""
    curve: list[list[float]] = field(repr=False)
    """Losses of each head at every step."""
    clipped: float = 0.0
    """Share of the steps whose gradient was clipped: the sum of more losses makes it larger."""
    seen: list[Any] = field(default_factory=list)
    """Plain data that the watcher collected."""


def sized(size: str, **changes: object) -> ModelConfig:
    """Return a size by its name, with `changes` to any field. Raises UsageError for an unknown name."""
    if size not in SIZES:
        raise UsageError(f"the size {size!r} is unknown; take one of {', '.join(SIZES)}")
    return replace(SIZES[size], **changes)  # type: ignore[arg-type]


def at_depth(depth: str, size: str, n: int, **changes: object) -> ModelConfig:
    """Return a model of a size with n heads, or a control of its depth.

    matched: the paper's parameter matching, heads take their layers from the trunk. shallow: a next-token model with as
    many blocks as the n-head model has on the path to head 1. +layers: n heads on top of a whole trunk.
    """
    whole = sized(size)
    if depth == "shallow":
        return replace(whole, layers=whole.layers - n + 1, **changes)  # type: ignore[arg-type]
    extra = n - 1 if depth == "+layers" and whole.kind.takes_layers else 0
    return replace(whole, heads=n, extra_layers=extra, **changes)  # type: ignore[arg-type]


DEPTHS = ("matched", "shallow", "+layers")
SHALLOW = DEPTHS[:2]
"""Parameter matching, and the control that every such comparison needs."""
DEPTH_NOTE = (
    "By the paper's parameter matching head 1 of n heads stands behind n - 1 blocks fewer than that of n = 1. The "
    'control "shallow" is a next-token model with as many blocks as there are on the path to head 1 of n heads.'
)


def with_depths(
    seeds: Sequence[int], depths: Sequence[str], heads: Sequence[int], **others: Sequence[Any]
) -> list[Case]:
    """Return the cases of all conditions, with the controls of depth of every number of heads above 1."""
    cases = crossed(seeds, **others, n=heads, depth=depths)
    return [case for case in cases if case.conditions["n"] != 1 or case.conditions["depth"] == "matched"]


def run_config(
    settings: TrainingSettings,
    model: ModelConfig,
    seed: int,
    device: str = "auto",
    head_weights: HeadWeights | None = None,
) -> RunConfig:
    """Return the settings of a training run, as `headstart train` reads them."""
    return RunConfig(
        steps=settings.steps,
        seed=seed,
        device=device,
        dtype=settings.dtype,
        compile=False,
        model=model,
        batch=BatchConfig(settings.rows, settings.accumulate, settings.length),
        optimizer=OptimizerConfig(
            kind=settings.optimizer,
            lr=settings.lr,
            warmup_steps=settings.warmup_steps,
            final_lr_ratio=settings.final_lr_ratio,
            clip=settings.clip * model.heads,
        ),
        head_weights=head_weights or HeadWeights(),
    )


def in_memory(
    documents: Sequence[Sequence[int] | np.ndarray], targets_from: Sequence[int] | None = None
) -> TokenShards:
    """Return a split of token shards that is not on disk. Each document ends with its end token.

    Args:
        documents: the documents' tokens.
        targets_from: place in each document from which on its tokens are targets (None: all are).
    """
    starts = np.cumsum([0, *map(len, documents[:-1])], dtype=np.int64)
    tokens = np.concatenate([np.asarray(document, dtype=np.uint32) for document in documents])
    is_target = None
    if targets_from is not None:
        pieces = [np.arange(len(document)) >= first for document, first in zip(documents, targets_from)]
        is_target = SplitTokens([np.concatenate(pieces)])
    return TokenShards(Path("memory"), "train", {}, tokens, starts, 1.0, is_target)


def stream_of(
    shards: TokenShards | Sequence[TokenShards], config: RunConfig, weights: Sequence[float] | None = None
) -> BatchStream:
    """Return the rows that `headstart train` would read; several splits are mixed by weight."""
    rows, length, heads = config.batch.rows, config.length, config.model.offset_of_heads
    return BatchStream(shards, rows=rows, length=length, heads=heads, seed=config.seed, weights=weights)


def train_model(
    config: RunConfig,
    batches: Iterator[Batch],
    tell: Tell,
    *,
    model: Transformer | None = None,
    watch: Callable[[int, Transformer, list[Any]], None] | None = None,
) -> Trained:
    """Train until `config.steps`, from the checkpoint of the case if it has one (`studies.resume`).

    Args:
        config: the run.
        batches: endless micro-batches; (B, T) tokens with their targets.
        tell: shows the step and the loss.
        model: the model to train (None: first weights from `config.seed`).
        watch: called after each step with the number of steps done, the model, and the list to which it adds plain
            data; StopTraining ends the training.

    Raises:
        UsageError: losses or gradients were not finite at the end.
    """
    state = next_training()
    with joined(config.device) as processes:
        config = config.on(processes.device.type)
        if model is None:
            subject = NewModel.build(config, processes)
        else:
            subject = NewModel(model.to(processes.device), GradientSums(model, False), processes)
        trained = subject.model.train()

        learner = Learner(subject, config, processes)
        state.restore(learner)

        class Watch(Callback):
            def after_step(self, step: int, result: StepResult) -> None:
                state.results.append(result)
                tell(step=f"{step + 1}/{config.steps}", loss=f"{result.losses[0]:.3f}")
                if watch is not None:
                    watch(step + 1, trained, state.seen)
                state.save_if_due(learner)

        done = len(state.results)
        batches = islice(batches, done * config.micro_batches(processes.count)[0], None)
        with suppress(StopTraining):
            take_steps(learner, batches, range(done, config.steps), [Watch()])
    results = state.results
    if results and not results[-1].finite:
        raise UsageError(f"step {config.steps}: {results[-1].skipped}; lower the learning rate (--training.lr)")
    curve = [result.losses for result in results]
    clipped = sum(result.gradient_norm > config.optimizer.clip for result in results)
    tail = np.array(curve[-max(1, round(LAST * len(curve))) :])
    losses = [_mean(column) for column in tail.T]
    return Trained(trained.eval(), losses, curve, clipped / max(1, len(curve)), state.seen)


def _mean(column: np.ndarray) -> float:
    """Return the mean over the steps in which the head had a weight."""
    known = column[~np.isnan(column)]
    return float(known.mean()) if len(known) else math.nan


@torch.no_grad()
def written_right(
    model: Transformer, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], rows: int = 256
) -> list[list[bool]]:
    """Return which tokens of each answer head 1 finds most probable after the prompt and the answer's earlier tokens.

    All tokens of an answer are right exactly if greedy decoding from the prompt writes the answer: up to its first
    wrong token it reads the same tokens. So the share of answers without a wrong token is the exact match of free
    running, measured in one pass.
    """
    device = model.trunk.embedding.weight.device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(answers[i]))
    right: list[list[bool]] = [[] for _ in prompts]
    for begin in range(0, len(order), rows):
        some = order[begin : begin + rows]
        sequences = [[*prompts[i], *answers[i]] for i in some]
        tokens_BT = torch.zeros(len(some), max(map(len, sequences)), dtype=torch.int64)
        for row, text in enumerate(sequences):
            tokens_BT[row, : len(text)] = torch.tensor(text)
        # Attention is causal: scored tokens do not see the padding.
        chosen_BT = model(tokens_BT.to(device)).argmax(-1).cpu()
        for row, i in enumerate(some):
            first = len(prompts[i])
            for at, token in enumerate(answers[i], start=first):
                right[i].append(int(chosen_BT[row, at - 1]) == token)
    return right
