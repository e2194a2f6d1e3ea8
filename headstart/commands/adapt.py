"""`headstart adapt`: train new heads on an existing model, and measure how many of their drafts are right."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from tyro.conf import Positional, arg

from headstart.commands.dry_run import DryRunSettings
from headstart.commands.evaluate import ACCEPTANCE_FILE, acceptance_of
from headstart.commands.own_answers import ANSWERS_FILE, OwnAnswers
from headstart.console import Progress, format_table, print_result
from headstart.errors import UsageError
from headstart.fileio import write_text
from headstart.hardware import use_threads
from headstart.model.shape import Wiring
from headstart.objective.head_weights import HeadWeights
from headstart.reports.evaluation import head_table

if TYPE_CHECKING:
    from headstart.training.adapt.config import AdaptConfig
    from headstart.training.config import DataConfig, RunConfig

SCORED_TOKENS = 100_000
"""Most tokens of held-out documents that the acceptance is measured on."""
LENGTH = 512
"""Default tokens of a row, if the model's context allows it."""


@dataclass(frozen=True)
class AdaptSettings:
    """Add heads to an existing model and train them, so that it decodes several tokens per pass."""

    model: Positional[Path]
    """A model directory, such as RUN/model or an ordinary Hugging Face model, a GGUF file, or OWNER/NAME on the hub. It
    is only read."""
    run_dir: Path
    """The run folder: checkpoints/, metrics.jsonl, and the result, model/ (or heads/, see --heads-only). The same
    command resumes a run that was stopped."""
    data: tuple[str, ...] = ()
    """Text like the text that the model will generate: files, folders, globs or hf:NAME, as for `headstart prepare`,
    also conversations with "messages" as `headstart distill-data` writes them; or folders that `prepare` wrote, encoded
    with the model's tokenizer."""
    own_answers: Annotated[OwnAnswers, arg(name="")] = field(default_factory=OwnAnswers)
    heads: int = 4
    """Heads in all, including the model's own next-token head."""
    head_kind: str = "transformer"
    """transformer: a block per head; linear, medusa, stern: smaller, nearly free to run; sequential: also reads the
    tokens between; eagle3: one block that reads three layers, the tokens between, and then its own outputs; replicated:
    an unembedding per head."""
    wiring: Wiring | None = None
    """The latent that feeds head k: parallel (the trunk's) or causal (that of head k-1) (None: parallel; causal for
    sequential and eagle3)."""
    shared: bool = True
    """sequential: use one module for all heads; medusa: the heads share the unembedding."""
    features: str | None = None
    """eagle3: the layers whose inputs the heads read, such as 2,15,27, or last: only the trunk's output (None: 2, L/2
    and L-3 of L layers)."""
    norm_output: bool = False
    """eagle3, sequential: norm what each step hands to the next (EAGLE-3.1, MiMo). Sequential heads then share one
    cache, as engines run them."""
    rollout: int | None = None
    """eagle3, sequential with --norm-output: train this many steps, each on the outputs of the step before (None: all
    of them; 1: teacher forcing, the first step alone, on the model's own states)."""
    replace_heads: bool = False
    """Replace the heads that the model has beyond the first."""
    take_layers: bool = False
    """joint, transformer: the layers of the model before its last become heads 2 and up, in place of new layers (the
    paper's "+0 layers"). The model keeps its size and must learn anew: take --heads-first 0. The paper's plain sum of
    losses is --head-weight 1 --head-decay 1."""
    draft_vocab: int | None = None
    """Number of tokens that the new heads predict, the most frequent in the data, such as 8192 (None: all). Training
    and drafting cost less; the text stays the same."""
    heads_only: bool = False
    """Write RUN/heads, the heads without their model (docs/heads.md), in place of RUN/model. Heads of a GGUF file are
    always written so."""
    mode: Literal["heads", "joint"] = "heads"
    """heads: train the heads alone, and leave the model's own text the same to the bit; joint: then train all
    weights."""
    heads_first: float = 0.5
    """joint: fraction of the steps that train the heads alone, before everything is trained."""
    self_distilled: bool = False
    """joint: keep head 1 near the original model (KL divergence) instead of training it on the text. This takes a
    second copy of the model, except with --lora."""
    lora: int | None = None
    """joint: leave the model's matrices as they are and train low-rank products of this rank that are added to them
    (LoRA; Medusa-2 takes 32). RUN/adapter is then a peft adapter, and RUN/model contains the sums."""
    lora_alpha: float = 16.0
    """Scale of the low-rank products: they are multiplied by alpha / rank."""
    lora_dropout: float = 0.05
    """Dropout of the inputs of the low-rank products in training."""
    lora_head: bool = False
    """--lora: also for the output matrix, as in Medusa-2. RUN/model then has one of its own where the embedding served
    as output matrix."""
    loss: Literal["cross-entropy", "kl", "total-variation", "acceptance"] = "cross-entropy"
    """Loss of the heads: cross-entropy with the text; kl or total-variation, the distance to the model's own next-token
    distribution, which judges their drafts; acceptance, -log of the rate at which it accepts them."""
    loss_share: float = 1.0
    """Share of kl, total-variation or acceptance in the loss of the heads; the rest is cross-entropy."""
    head_weight: float | None = None
    """joint: weight of the heads' losses relative to head 1 (None: 0.2; with --self-distilled 0.01, reached in a sine
    ramp, as in Medusa-2)."""
    head_decay: float = 0.8
    """Factor from each head's weight to the next."""
    sample_heads: bool = False
    """Train one head in each step, drawn from all, with the weight of all (Stern et al.): steps cost less, and more of
    them are needed."""
    steps: int = 1000
    """Optimiser steps."""
    rows: int = 8
    """Rows of a micro-batch."""
    accumulate: int = 1
    """Micro-batches of a step."""
    length: int | None = None
    """Tokens of a row (None: 512, or the model's context)."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon for the matrices inside the heads, with adamw for the rest."""
    lr: float | None = None
    """Peak learning rate (None: 1e-3 for the heads alone; in joint training 5e-5, and --head-lr-ratio times that for
    the heads)."""
    head_lr_ratio: float = 4.0
    """joint: learning rate of the heads as a multiple of that of the other weights."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises (None: 40, at most a tenth of all)."""
    extension: Literal["hold", "rewarm"] = "hold"
    """Learning rate of steps added to a finished run: hold keeps the final rate; rewarm warms up again."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices."""
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of frozen weights; bfloat16 takes half the memory, and is for models stored in it."""
    cache_states: str | None = None
    """heads: keep the hidden states of the frozen trunk in this folder (true: in the run folder) and read them instead
    of running the trunk: faster from the second time that a row is read. Runs may share a folder."""
    cache_gib: float = 50.0
    """The largest size of the cached hidden states, in GiB."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """dtype of matrix products."""
    validation_fraction: float = 0.02
    """Fraction of the documents held out (of text; prepared folders have their own)."""
    validation_every: int = 100
    """Steps between validations."""
    sample_documents: int = 8
    """Number of held-out documents that every validation continues, greedily and with all heads, to measure tokens per
    pass (0: none)."""
    sample_tokens: int = 64
    """Tokens of each continuation."""
    patience: int = 0
    """Validations in a row without more tokens per pass after which training ends (0: never)."""
    checkpoints_every: int = 200
    """Steps between checkpoints."""
    allow_changed_data: bool = False
    """Resume even if the data or its tokenizer is not that of the checkpoint."""
    seed: int = 0
    """Seed of first weights, the order of the data and the documents held out."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    compile: bool | None = None
    """Fuse each block with torch.compile (None: in long runs)."""
    threads: int | None = None
    """CPU threads (None: torch's choice)."""
    dry_run: Annotated[DryRunSettings, arg(name="")] = field(default_factory=DryRunSettings)
    json: bool = False
    """Print the result as JSON."""


def run(settings: AdaptSettings) -> None:
    """Train the heads, or estimate what that would need, and print the result."""
    settings.dry_run.check()
    use_threads(settings.threads)
    if settings.dry_run.dry_run:
        from headstart.training.estimate import format_dry_run

        print_result(estimate_adapt_run(settings), settings.json, format_dry_run)
    else:
        found = adapt(settings)
        if found:
            print_result(found, settings.json, format_adapted)


def run_config(settings: AdaptSettings) -> RunConfig:
    """Return the configuration of the run. Raises UsageError for settings that do not fit the model or each other."""
    from headstart.formats.hub import local_path
    from headstart.formats.registry import load_config
    from headstart.model.heads import HEAD_KINDS
    from headstart.objective.backends import LossConfig
    from headstart.training.adapt.new_heads import config_with_heads
    from headstart.training.config import BatchConfig, CheckpointConfig, RunConfig, ValidationConfig
    from headstart.training.optimizer import OptimizerConfig
    from headstart.training.trackers import WatchConfig

    if settings.head_kind not in HEAD_KINDS:
        raise UsageError(f"--head-kind is {settings.head_kind!r}; take one of {', '.join(HEAD_KINDS)}")
    settings = replace(settings, model=local_path(settings.model))
    old = load_config(settings.model)
    model = config_with_heads(
        old,
        settings.heads,
        settings.head_kind,
        settings.wiring,
        shared=settings.shared,
        replace_heads=settings.replace_heads,
        take_layers=settings.take_layers,
        draft_vocab=settings.draft_vocab,
        features=_features(settings.features, old.next_token_layers),
        norm_output=settings.norm_output,
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
            kind=settings.optimizer,
            lr=lr,
            head_lr_ratio=settings.head_lr_ratio if joint else 1.0,
            warmup_steps=min(40, settings.steps // 10) if settings.warmup_steps is None else settings.warmup_steps,
            weight_decay=settings.weight_decay,
            extension=settings.extension,
        ),
        head_weights=head_weights(settings, model.kind.one_cache),
        loss=LossConfig(heads=settings.loss, share=settings.loss_share),
        validation=ValidationConfig(every=settings.validation_every, patience=settings.patience),
        checkpoints=CheckpointConfig(every=settings.checkpoints_every),
        watch=WatchConfig(
            sample_tokens=settings.sample_tokens if settings.sample_documents else 0,
            sample_documents=settings.sample_documents,
        ),
        adapt=_adapt_config(settings),
    )


def _features(asked: str | None, layers: int) -> tuple[int, ...] | None:
    """Return the layers that --features names. Raises UsageError for anything else."""
    if asked is None:
        return None
    if asked == "last":
        return (layers,)
    try:
        return tuple(int(layer) for layer in asked.split(","))
    except ValueError:
        raise UsageError(f"--features is {asked!r}; give layers such as 2,15,27, or last") from None


def _adapt_config(settings: AdaptSettings) -> AdaptConfig:
    """Return what is trained of the existing model, and how its hidden states are kept."""
    from headstart.training.adapt.config import AdaptConfig
    from headstart.training.adapt.lora import LoraConfig

    if settings.lora_head and settings.lora is None:
        raise UsageError("--lora-head needs --lora RANK; give both, or leave it out")
    options = (settings.lora_alpha, settings.lora_dropout, settings.lora_head)
    lora = None if settings.lora is None else LoraConfig(settings.lora, *options)
    return AdaptConfig(
        model=settings.model,
        mode=settings.mode,
        heads_first=settings.heads_first,
        self_distilled=settings.self_distilled,
        lora=lora,
        replace_heads=settings.replace_heads,
        take_layers=settings.take_layers,
        heads_only=settings.heads_only or settings.model.is_file(),
        frozen_dtype=settings.frozen_dtype,
        cache_states=_cache(settings),
        cache_gib=settings.cache_gib,
    )


def _cache(settings: AdaptSettings) -> Path | None:
    """Return the folder of cached hidden states, if there is one."""
    if settings.cache_states is None or settings.cache_states.lower() == "false":
        return None
    own = settings.cache_states.lower() == "true"
    return settings.run_dir / "states" if own else Path(settings.cache_states)


def head_weights(settings: AdaptSettings, steps: bool = False) -> HeadWeights:
    """Return Medusa's weights (arXiv 2401.10774, section 2.2): decay^(k-1) for head k.

    In joint training they are multiplied by 0.2 relative to head 1, or by a sine ramp up to 0.01 if head 1 is
    self-distilled. `steps` says whether the heads are steps of one module, of which --rollout trains some.
    """
    others = settings.heads - 1
    if settings.rollout is not None and (settings.mode == "joint" or not steps):
        raise UsageError(
            "--rollout is for --mode heads with eagle3 heads, or sequential ones with --norm-output; leave it out"
        )
    if settings.rollout is not None and not 1 <= settings.rollout <= others:
        raise UsageError(f"--rollout is {settings.rollout}; {settings.heads} heads have 1 to {others} steps")
    if settings.mode == "heads":
        if settings.head_weight is not None:
            raise UsageError("--head-weight is for --mode joint: with the heads alone there is no other loss")
        trained = others if settings.rollout is None else settings.rollout
        weights = None if trained == others else (1.0, *[1.0] * trained, *[0.0] * (others - trained))
        return HeadWeights(initial=weights, decay=settings.head_decay, sampled=settings.sample_heads)
    weight = (0.01 if settings.self_distilled else 0.2) if settings.head_weight is None else settings.head_weight
    weights = (1.0, *[weight] * others)
    if settings.self_distilled:
        first = (1.0, *[0.0] * others)
        return HeadWeights(first, weights, settings.head_decay, shape="sine", sampled=settings.sample_heads)
    return HeadWeights(initial=weights, decay=settings.head_decay, sampled=settings.sample_heads)


def _data(settings: AdaptSettings) -> DataConfig:
    """Return where the data is: prepared folders, or text to prepare with the model's tokenizer."""
    from headstart.data.manifest import MANIFEST
    from headstart.data.mixture import MixturePart
    from headstart.formats.registry import load_model_tokenizer
    from headstart.training.config import DataConfig

    settings.own_answers.check(settings.data)
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
        sources=settings.data or (str(settings.run_dir / ANSWERS_FILE),),
        tokenizer=str(settings.model),
        validation_fraction=settings.validation_fraction,
        allow_changed=allow,
        conversations=_conversations(settings),
    )


def _conversations(settings: AdaptSettings) -> bool:
    """Return whether the data holds conversations: as when the run was started, else according to the first rows.

    Raises UsageError for a file of prompts without answers.
    """
    from headstart.data.prepare.units import file_of_prompts, hold_conversations
    from headstart.training.config import load_config
    from headstart.training.run_folder import RunFolder

    if settings.own_answers.asked:
        return settings.own_answers.chat(settings.model)
    started = RunFolder(settings.run_dir).config
    if started.is_file():
        return load_config(started).data.conversations
    if (prompts := file_of_prompts(settings.data)) is not None:
        raise UsageError(
            f"{prompts}: holds prompts without answers; let the model answer them first, with --prompts {prompts} in "
            "place of --data"
        )
    return hold_conversations(settings.data)


def adapt(settings: AdaptSettings) -> dict[str, Any]:
    """Train, and return the path of the result and the acceptance of its drafts on held-out text.

    Of several processes the first one measures, and the others return {}.

    Raises Interrupted after Ctrl-C or SIGTERM, with a checkpoint saved; UsageError for wrong settings or data.
    """
    from headstart.training.loop import train

    config = run_config(settings)
    if settings.own_answers.asked and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "--prompts is for one process; let headstart distill-data answer them, and name its file as --data"
        )
    if settings.own_answers.asked:
        _check_run(config)  # before hours of answering
        settings.own_answers.write(settings.model, settings.run_dir, settings.seed, settings.threads)
    path = train(config)
    if int(os.environ.get("RANK", "0")):
        return {}
    found: dict[str, Any] = {"model": str(path), "heads": config.model.heads, "head_kind": config.model.head_kind}
    if config.adapt is not None and config.adapt.heads_only:
        found |= {"model": str(config.adapt.model), "heads_from": str(path)}
    return found | acceptance(config, path)


def estimate_adapt_run(settings: AdaptSettings) -> dict[str, Any]:
    """Return what the run would need, as `train --dry-run` does; nothing is trained or written.

    Raises UsageError for settings and run folders that `adapt` refuses before it reads the text.
    """
    from headstart.data.mixture import open_sources
    from headstart.training.adapt.run import check_vocabulary

    config = run_config(settings)
    _check_run(config)
    found = settings.dry_run.estimate(config, str(settings.run_dir))
    if config.data.prepared:
        sources = open_sources(config.data.prepared)
        check_vocabulary(sources, config.adapt.model if config.adapt else settings.model, config.model.vocab_size)
    return found | {"cache_states_gib": settings.cache_gib if config.adapt and config.adapt.cache_states else None}


def _check_run(config: RunConfig) -> None:
    """Raise UsageError for packages, settings and run folders that a run refuses before it reads its data."""
    from headstart.training.adapt.run import SOURCE_FILE, check_unchanged
    from headstart.training.loop import check_storable
    from headstart.training.run_folder import RunFolder
    from headstart.training.trackers import check_packages

    check_packages(config.watch)
    check_storable(config)
    folder = RunFolder(config.run_dir, config.result)
    folder.check(config)
    if folder.started and config.adapt and (folder.path / SOURCE_FILE).is_file():
        check_unchanged(config.adapt.model, folder.path)


def acceptance(config: RunConfig, path: Path) -> dict[str, Any]:
    """Return the share of drafts of each head that are right on held-out documents of the run's data.

    It is also put into the result at `path`, for `headstart inspect`. In conversations the answers alone count, as in
    validation. The result is empty if nothing is held out.
    """
    from headstart.data.mixture import MixturePart, open_sources
    from headstart.evaluation.heads import score_documents
    from headstart.formats.registry import load_model
    from headstart.training.run_folder import RunFolder

    parts = config.data.prepared or (MixturePart(RunFolder(config.run_dir).data),)
    documents: list[list[int]] = []
    counted: list[np.ndarray] = []  # which tokens are targets: in conversations the answers
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
    base = config.adapt.model if config.adapt is not None and config.adapt.heads_only else None
    model = (load_model(path) if base is None else load_model(base, heads=path)).float()
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
    """Format the result of `adapt` for people."""
    heads = f"{found['heads']} {found['head_kind']} heads"
    if "heads_from" in found:
        lines = [f"heads: {found['heads_from']} ({heads}, for {found['model']})"]
    else:
        lines = [f"model: {found['model']} ({heads})"]
    if "acceptance" not in found:
        return lines[0] + "\nnothing was held out to measure its drafts on"
    lines.append(f"on {found['scored_tokens']:,} held-out tokens, read with teacher forcing:")
    lines.append(format_table(*head_table(found["top1"], found["acceptance"], found["tokens_per_pass"])))
    return "\n".join(lines)
