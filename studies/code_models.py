"""Train and score byte models of Python's own library, for the studies on heads, sizes and schedules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from headstart.data.prepare.corpora import STDLIB, list_files
from headstart.data.tokenizers import ByteTokenizer
from headstart.evaluation.heads import score_documents
from headstart.model.config import ModelConfig
from headstart.objective.head_weights import HeadWeights
from studies.study import Result, StudySettings, Tell, values
from studies.training import TrainingSettings, in_memory, run_config, stream_of, train_model
from studies.verdicts import Control

HELD_OUT = 20
"""Number of files of which one is held out."""


@dataclass(frozen=True)
class CodeSettings(StudySettings):
    """Settings of studies that train on code."""

    train_bytes: int = 4_000_000
    """Bytes of the library, read again and again if training takes longer."""
    test_pieces: int = 8
    """Number of other files, on which the heads are scored."""
    piece: int = 2000
    """Bytes of each of them, from its middle."""
    training: TrainingSettings = field(default_factory=TrainingSettings)


@cache
def code_bytes(train_bytes: int, test_pieces: int, piece: int) -> tuple[list[bytes], list[bytes]]:
    """Return files for training of `train_bytes` together, and pieces of others; the same with the same Python."""
    # The tables of encodings share their lines, so held-out files would resemble files to train on.
    files = [file for file in list_files([STDLIB]) if file.size > 4000 and "encodings" not in file.path.parts]
    order = np.random.default_rng(0).permutation(len(files))
    training: list[bytes] = []
    pieces: list[bytes] = []
    total = 0
    for place, i in enumerate(order):
        if place % HELD_OUT == 0:
            if len(pieces) < test_pieces:
                content = files[i].path.read_bytes()
                pieces.append(content[len(content) // 2 :][:piece])
        elif total < train_bytes:
            training.append(files[i].path.read_bytes()[: train_bytes - total])
            total += len(training[-1])
    return training, pieces


def train_on_code(
    settings: CodeSettings, model: ModelConfig, seed: int, tell: Tell, head_weights: HeadWeights | None = None
) -> dict[str, Any]:
    """Train a byte model and score it on held-out files, with teacher forcing.

    Returns:
        `losses` (nats, training), `bits_per_byte` and `top1` of head k at k-1; `prefix`, at k-2 the share of positions
        at which heads 2..k are all right, so decoding would accept their drafts; `tokens_per_pass` by number of heads
        used; `clipped`.
    """
    training, pieces = code_bytes(settings.train_bytes, settings.test_pieces, settings.piece)
    end = ByteTokenizer.end_id
    shards = in_memory([np.append(np.frombuffer(content, np.uint8), np.uint8(end)) for content in training])
    config = run_config(settings.training, model, seed, settings.device, head_weights)
    trained = train_model(config, stream_of(shards, config), tell)
    documents = [list(piece) for piece in pieces]
    scores = score_documents(trained.model, documents, sum(map(len, documents)), end_id=end)
    return {
        "losses": trained.losses,
        "bits_per_byte": scores.bits_per_byte,
        "top1": scores.top1,
        "prefix": scores.prefix,
        "tokens_per_pass": scores.tokens_per_pass,
        "clipped": trained.clipped,
    }


def learned(settings: CodeSettings, results: Sequence[Result], head: int = 1, margin: float = 0.02) -> Control:
    """Return the control that some model's `head` is right more often than the most frequent byte, a blank."""
    _, pieces = code_bytes(settings.train_bytes, settings.test_pieces, settings.piece)
    content = b"".join(pieces)
    share = max(content.count(byte) for byte in set(content)) / len(content)
    known = [result.numbers["top1"] for result in results if len(result.numbers["top1"]) >= head]
    best = max((top1[head - 1] for top1 in known), default=0.0)
    return Control(f"best accuracy of head {head} over that of the most frequent byte", best, share + margin)


def next_byte(results: Sequence[Result], **conditions: object) -> list[float]:
    """Return the bits per byte of head 1, by seed."""
    return values(results, lambda result: result.numbers["bits_per_byte"][0], **conditions)


def per_pass(results: Sequence[Result], heads: int, **conditions: object) -> list[float]:
    """Return the bytes per pass with so many heads used, by seed."""
    return values(results, lambda result: result.numbers["tokens_per_pass"][heads - 1], **conditions)
