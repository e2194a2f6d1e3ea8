"""Validation: what every head knows of held-out documents."""

from __future__ import annotations

import math

import torch

from headstart.data.batches import evaluation_batches
from headstart.data.shards import TokenShards
from headstart.model.transformer import Transformer
from headstart.objective.step import score_step
from headstart.training.config import RunConfig
from headstart.training.step import autocast, move


def validate(model: Transformer, shards: TokenShards, config: RunConfig, device: torch.device) -> dict[str, float]:
    """validation/loss/headK (nats per token), validation/bits_per_byte/headK and validation/top1/headK.

    Sums and counts are added up over all rows and divided once. A head without any target is left out.
    """
    n = config.model.heads
    loss, correct, count = [0.0] * n, [0] * n, [0] * n
    batches = evaluation_batches(
        shards, rows=config.batch.rows, length=config.length, heads=n, limit_rows=config.validation.rows
    )
    for batch in batches:
        batch = move(batch, device)
        with autocast(config, device):
            documents = batch.documents if config.data.attention_within_documents else None
            scores = score_step(model, batch.tokens, batch.targets, documents)
        for k, score in enumerate(scores):
            loss[k] += score.loss.item()
            correct[k] += int(score.correct.item())
            count[k] += int(score.count.item())
    record: dict[str, float] = {}
    for k in range(n):
        if count[k]:
            nats = loss[k] / count[k]
            record[f"validation/loss/head{k + 1}"] = nats
            record[f"validation/bits_per_byte/head{k + 1}"] = nats / math.log(2) / shards.bytes_per_token
            record[f"validation/top1/head{k + 1}"] = correct[k] / count[k]
    return record
