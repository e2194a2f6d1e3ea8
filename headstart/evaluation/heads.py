"""What every head knows of a text, and how many drafts would be right if the text were what the model writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from headstart.errors import UsageError
from headstart.model.transformer import Transformer

LOGITS_BYTES = 1 << 26
"""Of one head's logits in fp32, at most this many at once."""
NO_TARGET = -1


@dataclass(frozen=True)
class HeadScores:
    """What the heads of a model know of some documents.

    tokens: predicted by head 1; bytes: of UTF-8 in the documents.
    bits_per_byte: of head k at k-1. Nats per token by log 2 and by the mean bytes of a token.
    top1: share of positions at which head k's most probable token is the text's, at k-1.
    prefix: share of positions at which heads 2..k are all right, at k-2: what share of drafts of head k decoding would
        accept if it wrote this text (teacher forcing). Positions without k tokens ahead are left out.
    tokens_per_pass: and how many tokens its passes would commit, by number of heads used, 1..n, at k-1.
    """

    tokens: int
    bytes: int
    bits_per_byte: list[float]
    top1: list[float]
    prefix: list[float]
    tokens_per_pass: list[float]


def score_documents(
    model: Transformer,
    documents: Sequence[Sequence[int]],
    bytes: int,
    *,
    length: int | None = None,
    end_id: int | None = None,
    start_tokens: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
    counted: Sequence[np.ndarray] | None = None,
) -> HeadScores:
    """Scores `documents` (token ids), each read on its own from its beginning.

    Longer documents are read in windows of `length` tokens (None: the model's context) that move by half of it, so that
    every token but a document's first ones is predicted from `length` / 2 tokens at least; each is counted once.

    Args:
        bytes: of UTF-8 in all documents, or in their targets.
        end_id: put before each document, so that its first token is predicted too, and the state of the model is the
            one that it was trained in; None: the first token of each document is only read.
        start_tokens: how many of them each document begins with, which are read and never predicted.
        progress: told how many tokens were read.
        counted: of each document (T,) bool, which of its tokens are targets (None: all).

    Raises:
        UsageError: `length` is out of range, or no document has two tokens.
    """
    n, drafting, offsets_n = model.config.heads, model.config.drafting_heads, np.array(model.config.offset_of_heads)
    length = model.config.context if length is None else length
    if not 2 <= length <= model.config.context:
        raise UsageError(f"length is {length}; it must lie between 2 and the model's context {model.config.context}")
    nats, hits, counts = (torch.zeros(n, dtype=torch.float64) for _ in range(3))
    prefixes, prefix_counts = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    passes, committed = [0] * n, [0] * n
    for number, document in enumerate(documents):
        tokens = np.asarray(([] if end_id is None else [end_id]) + list(document), dtype=np.int64)
        if len(tokens) < 2:
            continue
        right_Tn = np.zeros((len(tokens), n), dtype=bool)
        aims_Tn = np.arange(len(tokens))[:, None] + offsets_n
        known_Tn = (aims_Tn < len(tokens)) & (aims_Tn >= start_tokens)
        spans = [(max(0, start_tokens - 1), len(tokens))]  # of several start tokens the first pass stands on the last
        if counted is not None:
            counts_T = np.concatenate([np.zeros(len(tokens) - len(document), dtype=bool), counted[number]])
            known_Tn &= counts_T[np.minimum(aims_Tn, len(tokens) - 1)]
            known_Tn = np.minimum.accumulate(known_Tn, axis=1)  # a pass stands before an answer and drafts it
            spans = _spans(counts_T)
        for start, first, stop in _windows(len(tokens), length):
            nats_Tn, top_Tn = _read(model, tokens, start, stop)
            new, known = slice(first - start, stop - start), known_Tn[first:stop]
            nats += torch.from_numpy(np.where(known, nats_Tn[new], 0.0).sum(0))
            targets = tokens[np.minimum(np.arange(first, stop)[:, None] + offsets_n, len(tokens) - 1)]
            right_Tn[first:stop] = (top_Tn[new] == targets) & known
            progress(stop - first)
        hits += torch.from_numpy(right_Tn.sum(0).astype(np.float64))
        counts += torch.from_numpy(known_Tn.sum(0).astype(np.float64))
        # Drafts of heads 2..k: head 1's own token is what verification writes, right or not. None behind a gap.
        right_Tn[:, drafting:] = False
        runs_Tn = np.cumprod(np.concatenate([np.ones_like(right_Tn[:, :1]), right_Tn[:, 1:]], 1), 1).astype(bool)
        prefixes += torch.from_numpy((runs_Tn & known_Tn).sum(0).astype(np.float64))
        prefix_counts += torch.from_numpy(known_Tn.sum(0).astype(np.float64))
        for k in range(1, n + 1):
            for begin, stop in spans:
                steps, written = _walk(runs_Tn[begin:stop, :k].sum(1), stop - begin)
                passes[k - 1] += steps
                committed[k - 1] += written
    if not counts[0]:
        raise UsageError("no document has two tokens; there is nothing to predict")
    if counted is None:
        tokens_to_predict = sum(len(document) - start_tokens for document in documents)
    else:
        tokens_to_predict = sum(int(each.sum()) for each in counted)
    per_byte = tokens_to_predict / bytes / math.log(2)  # tokens of a byte, bits of a nat
    return HeadScores(
        tokens=int(counts[0]),
        bytes=bytes,
        bits_per_byte=[_ratio(a, b) * per_byte for a, b in zip(nats.tolist(), counts.tolist())],
        top1=[_ratio(a, b) for a, b in zip(hits.tolist(), counts.tolist())],
        prefix=[_ratio(a, b) for a, b in zip(prefixes.tolist()[1:], prefix_counts.tolist()[1:])],
        tokens_per_pass=[_ratio(a, b) for a, b in zip(committed, passes)],
    )


def _spans(counts_T: np.ndarray) -> list[tuple[int, int]]:
    """Of each run of tokens that count, the position before it, where the first pass stands, and its end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], counts_T.astype(np.int8), [0]])))
    return [(max(0, int(begin) - 1), int(stop)) for begin, stop in zip(edges[::2], edges[1::2])]


def _windows(size: int, length: int) -> Iterator[tuple[int, int, int]]:
    """(start, first, stop): the tokens start..stop are read, those from `first` on count."""
    first = start = 0
    while True:
        stop = min(size, start + length)
        yield start, first, stop
        if stop == size:
            return
        first, start = stop, stop - length + max(1, length // 2)


@torch.no_grad()
def _read(model: Transformer, tokens: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """(T, n) each, of the positions start..stop: nats of the text's tokens k ahead, 0 where there is none, and the most
    probable token of head k."""
    n, device = model.config.heads, model.trunk.embedding.weight.device
    T = stop - start
    read = torch.from_numpy(tokens[start : stop + model.config.ahead])
    latents = model.latents(read[None].to(device), list(range(1, n + 1)))
    rows = max(1, LOGITS_BYTES // (4 * model.config.vocab_size))
    nats, top = np.zeros((T, n)), np.zeros((T, n), dtype=np.int64)
    for k in range(1, n + 1):
        offset = model.config.offset_of_heads[k - 1]
        ahead = tokens[start + offset : stop + offset]
        targets = torch.full((T,), NO_TARGET)
        targets[: len(ahead)] = torch.from_numpy(ahead)
        for row in range(0, T, rows):
            logits = model.unembedding(latents[k][:, row : min(row + rows, T)], k)[0].float()
            losses = torch.nn.functional.cross_entropy(
                logits, targets[row : row + rows].to(device), reduction="none", ignore_index=NO_TARGET
            )
            nats[row : row + rows, k - 1] = losses.cpu().numpy()
            top[row : row + rows, k - 1] = logits.argmax(-1).cpu().numpy()
    return nats, top


def _walk(run_T: np.ndarray, size: int) -> tuple[int, int]:
    """Passes, and tokens that they commit, if the text is what is written: from position t a pass goes on by run_T[t],
    1 + the right drafts of position t."""
    passes = position = 0
    runs = run_T.tolist()
    while position < size - 1:
        position += min(runs[position], size - 1 - position)
        passes += 1
    return passes, size - 1


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan
