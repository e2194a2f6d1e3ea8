"""`headstart adapt`: new heads on an existing model, trained on text, and how many of their drafts are right."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tyro.conf import Positional, arg

from headstart.commands.evaluate import ACCEPTANCE_FILE, acceptance_of
from headstart.commands.train import check_dry_run
from headstart.console import Progress, format_table, print_result
from headstart.data.manifest import MANIFEST
from headstart.data.mixture import MixturePart, open_sources
from headstart.data.prepare.units import hold_conversations
from headstart.errors import UsageError
from headstart.evaluation.heads import score_documents
from headstart.fileio import write_text
from headstart.formats.hub import local_directory
from headstart.formats.huggingface import load_config, load_model, load_model_tokenizer
from headstart.hardware import use_threads
from headstart.model.config import HeadKindName
from headstart.model.shape import Wiring
from headstart.objective.backends import HeadLoss, LossConfig
from headstart.objective.head_weights import HeadWeights
from headstart.training.adapt.config import AdaptConfig, FrozenDtype, Mode
from headstart.training.adapt.lora import LoraConfig
from headstart.training.adapt.new_heads import config_with_heads
from headstart.training.adapt.run import SOURCE_FILE, check_unchanged, check_vocabulary
from headstart.training.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    RunConfig,
    ValidationConfig,
)
from headstart.training.config import load_config as load_run_config
from headstart.training.estimate import DryRunSettings, estimate_run, format_dry_run
from headstart.training.loop import check_storable, train
from headstart.training.optimizer import OptimizerConfig
from headstart.training.run_folder import RunFolder
from headstart.training.trackers import WatchConfig, check_packages

SCORED_TOKENS = 100_000
"""Of held-out documents, at most about this many are read for the acceptance at the end."""
LENGTH = 512
"""Positions of a row where nothing is said and the model's context allows."""


@dataclass(frozen=True)
class AdaptSettings:
    """Add heads to an existing model and train them, so that it decodes several tokens per pass."""

    model: Positional[Path]
    """A model directory, such as RUN/model or an ordinary Hugging Face model, or OWNER/NAME on the hub. It is only
    read."""
    data: tuple[str, ...]
    """Text like that which the model is to write: files, folders, globs or hf:NAME, as `headstart prepare` takes, also
    conversations with "messages" as `headstart distill-data` writes them; or folders that `prepare` wrote, encoded with
    the model's tokenizer."""
    run_dir: Path
    """Where everything of the run lies: checkpoints/, metrics.jsonl, and the result, model/. The same command goes on
    with a run that was stopped."""
    heads: int = 4
    """Heads in all, the model's own next-token head included."""
    head_kind: HeadKindName = "transformer"
    """transformer: a block per head; linear, medusa, stern: smaller, nearly free to run; sequential: also reads the
    tokens between; replicated: an unembedding per head."""
    wiring: Wiring | None = None
    """Which latent feeds head k: parallel (the trunk's) or causal (head k-1's) (None: parallel; sequential: causal)."""
    shared: bool = True
    """sequential: one module for all heads; medusa: the heads share the unembedding."""
    replace_heads: bool = False
    """Put the new heads in the place of those that the model has beyond the first."""
    mode: Mode = "heads"
    """heads: train the heads alone, the model's own text stays the same to the bit; joint: then everything."""
    heads_first: float = 0.5
    """joint: fraction of the steps that train the heads alone, before everything is trained."""
    self_distilled: bool = False
    """joint: keep head 1 near the model as it was (KL) instead of training it on the text; takes a second copy, but not
    with --lora."""
    lora: int | None = None
    """joint: train products of this rank beside the model's matrices (LoRA; Medusa-2 takes 32), not these themselves;
    RUN/adapter is then a peft adapter, and RUN/model has them added."""
    lora_alpha: float = 16.0
    """The products count alpha / rank."""
    lora_dropout: float = 0.05
    """Of what the products read, while training."""
    loss: HeadLoss = "cross-entropy"
    """What the heads learn from: cross-entropy, the text; kl or total-variation, the model's own next-token
    distribution, which judges their drafts."""
    loss_share: float = 1.0
    """Share of kl or total-variation in their loss; the rest is cross-entropy."""
    head_weight: float | None = None
    """joint: weight of the heads' losses beside head 1's 1 (None: 0.2, and 0.01 reached in a sine ramp where
    self-distilled, as Medusa-2)."""
    head_decay: float = 0.8
    """Factor from each head's weight to the next."""
    steps: int = 1000
    """Optimiser steps."""
    rows: int = 8
    """Rows of a micro-batch."""
    accumulate: int = 1
    """Micro-batches of a step."""
    length: int | None = None
    """Tokens of a row (None: 512, or the model's context)."""
    lr: float | None = None
    """Peak learning rate (None: 1e-3 for the heads alone; joint 5e-5, and the heads' is --head-lr-ratio times that)."""
    head_lr_ratio: float = 4.0
    """joint: learning rate of the heads as a multiple of the rest's."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises (None: 40, at most a tenth of all)."""
    extension: Literal["hold", "rewarm"] = "hold"
    """The learning rate of steps added to a finished run: hold keeps the final rate; rewarm warms up once more."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices."""
    frozen_dtype: FrozenDtype = "float32"
    """What frozen weights are held in; bfloat16 takes half the memory, for models stored so."""
    cache_states: str | None = None
    """heads: keep the hidden states of the frozen trunk in this folder (true: in the run folder) and read them in place
    of running it: faster from the second time that a row is read. Runs may share a folder."""
    cache_gib: float = 50.0
    """At most this many GiB of hidden states."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What matrix products run in."""
    validation_fraction: float = 0.02
    """Fraction of the documents held out (of text; prepared folders have theirs)."""
    validation_every: int = 100
    """Steps between validations."""
    checkpoints_every: int = 200
    """Steps between checkpoints."""
    allow_changed_data: bool = False
    """Resume although the data or its tokenizer is another than when the checkpoint was written."""
    seed: int = 0
    """Of first weights, the order of the data and the documents held out."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    compile: bool | None = None
    """Whether torch.compile fuses each block (None: in long runs)."""
    threads: int | None = None
    """CPU threads (None: as torch chooses)."""
    dry_run: bool = False
    """Train nothing: print the tokens of the run, the memory of one process, and hours."""
    estimate: Annotated[DryRunSettings, arg(name="")] = field(default_factory=DryRunSettings)
    json: bool = False
    """Print the result as JSON."""


def run(settings: AdaptSettings) -> None:
    """Train the heads, or estimate what that would need, and print the result."""
    check_dry_run(settings.dry_run, settings.estimate)
    use_threads(settings.threads)
    if settings.dry_run:
        print_result(estimate_adapt_run(settings, settings.estimate), settings.json, format_dry_run)
    else:
        print_result(adapt(settings), settings.json, format_adapted)


def run_config(settings: AdaptSettings) -> RunConfig:
    """The run that `settings` asks for. Raises UsageError for what cannot be."""
    settings = replace(settings, model=local_directory(settings.model))
    old = load_config(settings.model)
    model = config_with_heads(
        old,
        settings.heads,
        settings.head_kind,
        settings.wiring,
        shared=settings.shared,
        replace_heads=settings.replace_heads,
    )
    joint = settings.mode == "joint"
    lr = (5e-5 if joint else 1e-3) if settings.lr is None else settings.lr
    return RunConfig(
        steps=settings.steps,
        run_dir=settings.run_dir,
        seed=settings.seed,
        device=settings.device,
        dtype=settings.dtype,
        compile=settings.compile,
        threads=settings.threads,
        model=model,
        data=_data(settings),
        batch=BatchConfig(settings.rows, settings.accumulate, settings.length or min(LENGTH, model.context)),
        optimizer=OptimizerConfig(
            lr=lr,
            head_lr_ratio=settings.head_lr_ratio if joint else 1.0,
            warmup_steps=min(40, settings.steps // 10) if settings.warmup_steps is None else settings.warmup_steps,
            weight_decay=settings.weight_decay,
            extension=settings.extension,
        ),
        head_weights=head_weights(settings),
        loss=LossConfig(heads=settings.loss, share=settings.loss_share),
        validation=ValidationConfig(every=settings.validation_every),
        checkpoints=CheckpointConfig(every=settings.checkpoints_every),
        watch=WatchConfig(sample_tokens=0),
        adapt=AdaptConfig(
            model=settings.model,
            mode=settings.mode,
            heads_first=settings.heads_first,
            self_distilled=settings.self_distilled,
            lora=None
            if settings.lora is None
            else LoraConfig(settings.lora, settings.lora_alpha, settings.lora_dropout),
            replace_heads=settings.replace_heads,
            frozen_dtype=settings.frozen_dtype,
            cache_states=_cache(settings),
            cache_gib=settings.cache_gib,
        ),
    )


def _cache(settings: AdaptSettings) -> Path | None:
    if settings.cache_states is None or settings.cache_states.lower() == "false":
        return None
    own = settings.cache_states.lower() == "true"
    return settings.run_dir / "states" if own else Path(settings.cache_states)


def head_weights(settings: AdaptSettings) -> HeadWeights:
    """Medusa's weights (arXiv 2401.10774, section 2.2): head k counts decay^(k-1), times 0.2 beside head 1 in joint
    training, or 0.01 at the end of a sine ramp where that is self-distilled."""
    if settings.mode == "heads":
        if settings.head_weight is not None:
            raise UsageError("--head-weight is for --mode joint: the heads alone have nothing to be weighed against")
        return HeadWeights(decay=settings.head_decay)
    others = settings.heads - 1
    weight = (0.01 if settings.self_distilled else 0.2) if settings.head_weight is None else settings.head_weight
    beside = (1.0, *[weight] * others)
    if settings.self_distilled:
        return HeadWeights(initial=(1.0, *[0.0] * others), final=beside, decay=settings.head_decay, shape="sine")
    return HeadWeights(initial=beside, decay=settings.head_decay)


def _data(settings: AdaptSettings) -> DataConfig:
    if not settings.data:
        raise UsageError("name what to train on: --data FILE, FOLDER ... or folders that headstart prepare wrote")
    prepared = [Path(name) for name in settings.data if (Path(name) / MANIFEST).is_file()]
    if prepared and len(prepared) < len(settings.data):
        raise UsageError(
            f"{prepared[0]}: is prepared, and other --data is not; prepare all, with --tokenizer {settings.model}"
        )
    allow = settings.allow_changed_data
    if len(prepared) == 1:
        return DataConfig(path=prepared[0], allow_changed=allow)
    if prepared:
        return DataConfig(mixture=tuple(MixturePart(path) for path in prepared), allow_changed=allow)
    if load_model_tokenizer(settings.model) is None:
        raise UsageError(
            f"{settings.model}: has no tokenizer to read text with; add a tokenizer.json to the directory, or give "
            "folders that headstart prepare wrote"
        )
    return DataConfig(
        sources=settings.data,
        tokenizer=str(settings.model),
        validation_fraction=settings.validation_fraction,
        allow_changed=allow,
        conversations=_conversations(settings),
    )


def _conversations(settings: AdaptSettings) -> bool:
    """Whether the data holds conversations: as the run was started, else by the first rows."""
    started = RunFolder(settings.run_dir).config
    return load_run_config(started).data.conversations if started.is_file() else hold_conversations(settings.data)


def adapt(settings: AdaptSettings) -> dict[str, Any]:
    """Trains, and gives the path of the model directory and what its drafts are worth on held-out text.

    Raises Interrupted after Ctrl-C or SIGTERM, with a checkpoint saved; UsageError for whatever the user can mend.
    """
    config = run_config(settings)
    path = train(config)
    found: dict[str, Any] = {"model": str(path), "heads": config.model.heads, "head_kind": config.model.head_kind}
    return found | acceptance(config, path)


def estimate_adapt_run(settings: AdaptSettings, more: DryRunSettings) -> dict[str, Any]:
    """Return what the run would need, as `train --dry-run` does. Nothing is trained or written.

    Raises UsageError for settings and run folders that `adapt` refuses before it reads the text.
    """
    config = run_config(settings)
    check_packages(config.watch)
    check_storable(config)
    folder = RunFolder(config.run_dir)
    folder.check(config)
    if folder.started and config.adapt and (folder.path / SOURCE_FILE).is_file():
        check_unchanged(config.adapt.model, folder.path)
    found = estimate_run(config, str(settings.run_dir), more)
    if config.data.prepared:
        sources = open_sources(config.data.prepared)
        check_vocabulary(sources, config.adapt.model if config.adapt else settings.model, config.model.vocab_size)
    return found | {"cache_states_gib": settings.cache_gib if config.adapt and config.adapt.cache_states else None}


def acceptance(config: RunConfig, path: Path) -> dict[str, Any]:
    """What share of drafts of each head would be right if the model wrote the held-out documents of the run's data;
    also put into the model directory, for `headstart inspect`. Of conversations the answers alone count, as in
    validation. {} where nothing is held out."""
    parts = config.data.prepared or (MixturePart(RunFolder(config.run_dir).data),)
    documents: list[list[int]] = []
    counted: list[np.ndarray] = []  # which tokens are targets: of conversations the answers
    size = tokens = 0
    for source in open_sources(parts):
        split = source.validation
        if split is None:
            continue
        share = SCORED_TOKENS // len(parts)
        for index in range(len(split.documents)):
            document = split.document(index)[:share].tolist()
            documents.append(document)
            begin = int(split.documents[index])
            targets = None if split.targets is None else split.targets[begin : begin + len(document)]
            counted.append(np.ones(len(document), dtype=bool) if targets is None else targets)
            tokens += len(document)
            size += round(int(counted[-1].sum()) * split.bytes_per_token)
            share -= len(document)
            if share <= 0:
                break
    if not tokens or not any(each[1:].any() for each in counted):
        return {}
    model = load_model(path).float()
    with Progress("acceptance", tokens, unit="tokens") as bar:
        scores = score_documents(
            model, documents, max(1, size), length=config.length, progress=bar.advance, counted=counted
        )
    found = {"heads": {"prefix": scores.prefix, "tokens_per_pass": scores.tokens_per_pass}}
    write_text(path / ACCEPTANCE_FILE, json.dumps(acceptance_of(found), indent=2) + "\n")
    return {
        "scored_tokens": scores.tokens,
        "top1": scores.top1,
        "acceptance": scores.prefix,
        "tokens_per_pass": scores.tokens_per_pass,
    }


def format_adapted(found: dict[str, Any]) -> str:
    """`adapt`'s result for people."""
    lines = [f"model: {found['model']} ({found['heads']} {found['head_kind']} heads)"]
    if "acceptance" not in found:
        return lines[0] + "\nnothing was held out to measure its drafts on"
    lines.append(f"on {found['scored_tokens']:,} held-out tokens, read with teacher forcing:")
    rows = [
        [str(k), f"{found['top1'][k - 1]:.1%}", "" if k == 1 else f"{found['acceptance'][k - 2]:.1%}",
         f"{found['tokens_per_pass'][k - 1]:.2f}"]
        for k in range(1, found["heads"] + 1)
    ]  # fmt: skip
    lines.append(format_table(["head k", "top-1 right", "heads 2..k right", "tokens per pass with k heads"], rows))
    return "\n".join(lines)
