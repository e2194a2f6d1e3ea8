"""Validation: what every head knows of held-out documents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch

from headstart.console import say
from headstart.data.batches import IGNORE, Batch, evaluation_batches
from headstart.data.mixture import Source
from headstart.data.shards import TokenShards
from headstart.errors import UsageError
from headstart.model.transformer import Transformer
from headstart.objective.walk import score_step
from headstart.training.auxiliary.losses import ExtraLosses
from headstart.training.auxiliary.masked_inputs import masked
from headstart.training.auxiliary.registers import with_registers
from headstart.training.config import RunConfig
from headstart.training.processes import Processes
from headstart.training.step import autocast, move


def long_enough(sources: Sequence[Source], config: RunConfig) -> list[Source]:
    """The sources whose held-out documents fill one row; a line says which do not: small corpora can be trained on."""
    kept = []
    for source in sources:
        if source.validation is None:
            say(f"{source.train.directory}: has no validation documents, so it is left out of validation")
            continue
        try:
            evaluation_batches(
                source.validation, rows=1, length=config.length, heads=config.model.offset_of_heads, limit_rows=1
            )
        except UsageError as error:
            say(f"left out of validation: {error}")
            continue
        kept.append(source)
    if not kept:
        say("nothing is validated")
    return kept


def validate_sources(
    model: Transformer, sources: Sequence[Source], config: RunConfig, processes: Processes
) -> dict[str, float]:
    """What `validate` gives for the mixture as a whole; where there are several sources, also validation/NAME/... each.

    Every source is scored on `config.validation.rows` rows of its own, so that a rare one is known as well as the
    others. The whole is their mean by weight: what rows taken in proportion to weight would give, with less noise.
    Bits per byte of the whole are all nats over all bytes of such rows.
    """
    scores = [
        (source, source.validation.bytes_per_token, validate(model, source.validation, config, processes))
        for source in sources
        if source.validation is not None
    ]
    if len(config.data.prepared) <= 1:
        return scores[0][-1]
    whole: dict[str, float] = {}
    # A head may have no target in documents that are all short.
    for name in dict.fromkeys(name for *_, record in scores for name in record):
        scored = [(source.weight, size, record) for source, size, record in scores if name in record]
        total = sum(weight for weight, _, _ in scored)
        whole[name] = sum(weight * record[name] for weight, _, record in scored) / total
        if "/bits_per_byte/" in name:
            nats = name.replace("/bits_per_byte/", "/loss/")
            bytes_per_token = sum(weight * size for weight, size, _ in scored) / total
            whole[name] = whole[nats] / math.log(2) / bytes_per_token
    for source, _, record in scores:
        whole |= {key.replace("validation", f"validation/{source.name}", 1): value for key, value in record.items()}
    return whole


def validate(model: Transformer, shards: TokenShards, config: RunConfig, processes: Processes) -> dict[str, float]:
    """validation/loss/headK (nats per token), validation/bits_per_byte/headK and validation/top1/headK;
    validation/loss/METHOD of what is learnt beside heads.

    Sums and counts are added up over all rows and processes and divided once. What has no target is left out.
    A model that is trained without its own answers is scored without them.
    """
    n = config.model.heads
    totals = torch.zeros(3, n, dtype=torch.float64, device=processes.device)  # loss, hits, targets
    found = evaluation_batches(
        shards,
        rows=config.batch.rows,
        length=config.length,
        heads=config.model.offset_of_heads,
        limit_rows=config.validation.rows,
    )
    batches = [move(_inputs_of(batch, config), processes.device) for batch in _shared_out(found, processes)]
    next_tokens = processes.sum(torch.stack([(batch.targets[..., 0] != IGNORE).sum() for batch in batches]).sum())
    extras = ExtraLosses(model, config, batches, next_tokens, processes)
    for batch in batches:
        with autocast(config, processes.device):
            documents = batch.documents if config.data.attention_within_documents else None
            tokens = batch.read(model.config.ahead)
            scores = score_step(model, tokens, batch.targets, documents, **extras.of(batch))
        totals += torch.stack([torch.stack([s.loss.double(), s.correct, s.count]) for s in scores], dim=1)
    record: dict[str, float] = {}
    for k, (loss, correct, count) in enumerate(processes.sum(totals).T.tolist(), start=1):
        if count:
            record[f"validation/loss/head{k}"] = loss / count
            record[f"validation/bits_per_byte/head{k}"] = loss / count / math.log(2) / shards.bytes_per_token
            record[f"validation/top1/head{k}"] = correct / count
    more = {f"validation/loss/{method}": loss for method, loss in extras.means().items()}
    return record | {name: loss for name, loss in more.items() if math.isfinite(loss)}


def _inputs_of(batch: Batch, config: RunConfig) -> Batch:
    """As the model is meant to be used, and its registers where they are trained; every validation draws the same."""
    if config.masked_inputs.in_use:
        batch = masked(batch, config.masked_inputs, config.token_of("masked_inputs"), config.seed, step=0)
    if config.registers.on:
        batch = with_registers(batch, config.registers, config.token_of("registers"), config.seed, step=0)
    return batch


def _shared_out(batches: Iterable[Batch], processes: Processes) -> Iterator[Batch]:
    """This process's batches. Every process gets as many, for each pass gathers weights from all: at the end some get
    one without targets."""
    batches = iter(batches)
    while group := list(islice(batches, processes.count)):
        if processes.rank < len(group):
            yield group[processes.rank]
        else:
            yield replace(group[0], targets=torch.full_like(group[0].targets, IGNORE))
