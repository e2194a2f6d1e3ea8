"""Validation: what every head knows of held-out documents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice

import torch

from headstart.data.batches import IGNORE, Batch, evaluation_batches
from headstart.data.shards import TokenShards
from headstart.model.transformer import Transformer
from headstart.objective.step import score_step
from headstart.training.config import RunConfig
from headstart.training.processes import Processes
from headstart.training.step import autocast, move


def validate(model: Transformer, shards: TokenShards, config: RunConfig, processes: Processes) -> dict[str, float]:
    """validation/loss/headK (nats per token), validation/bits_per_byte/headK and validation/top1/headK.

    Sums and counts are added up over all rows and processes and divided once. A head without any target is left out.
    """
    n = config.model.heads
    totals = torch.zeros(3, n, dtype=torch.float64, device=processes.device)  # loss, hits, targets
    batches = evaluation_batches(
        shards, rows=config.batch.rows, length=config.length, heads=n, limit_rows=config.validation.rows
    )
    for batch in _shared_out(batches, processes):
        batch = move(batch, processes.device)
        with autocast(config, processes.device):
            documents = batch.documents if config.data.attention_within_documents else None
            scores = score_step(model, batch.tokens, batch.targets, documents)
        totals += torch.stack([torch.stack([s.loss.double(), s.correct, s.count]) for s in scores], dim=1)
    record: dict[str, float] = {}
    for k, (loss, correct, count) in enumerate(processes.sum(totals).T.tolist(), start=1):
        if count:
            record[f"validation/loss/head{k}"] = loss / count
            record[f"validation/bits_per_byte/head{k}"] = loss / count / math.log(2) / shards.bytes_per_token
            record[f"validation/top1/head{k}"] = correct / count
    return record


def _shared_out(batches: Iterable[Batch], processes: Processes) -> Iterator[Batch]:
    """This process's batches. Every process gets as many, for each pass gathers weights from all: at the end some get
    one without targets."""
    batches = iter(batches)
    while group := list(islice(batches, processes.count)):
        if processes.rank < len(group):
            yield group[processes.rank]
        else:
            yield replace(group[0], targets=torch.full_like(group[0].targets, IGNORE))
