"""Score every head on given documents: bits per byte, top-1, and how many drafts would be right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from headstart.errors import UsageError
from headstart.model.transformer import Transformer

LOGITS_BYTES = 1 << 26
"""The most bytes that one head's logits in float32 take at once."""
NO_TARGET = -1


@dataclass(frozen=True)
class HeadScores:
    """The scores of a model's heads on some documents.

    Attributes:
        tokens: the number of tokens that head 1 predicted.
        bytes: the UTF-8 bytes of the predicted text.
        bits_per_byte: entry k-1 is that of head k: its mean bits per token, times the mean tokens per byte; of a head
            with a draft vocabulary, those of the tokens in it.
        top1: entry k-1 is the share of positions at which head k's most probable token is the right one.
        prefix: entry k-2 is the share of positions at which heads 2..k are all right. Decoding would accept this share
            of the drafts of head k if the model wrote these documents (teacher forcing). Positions without k tokens
            ahead do not count.
        tokens_per_pass: entry k-1 is the number of tokens per pass that decoding with k heads would then commit.
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
    """Score `documents` (token ids), each read from its beginning without the others.

    Longer documents are read in windows of `length` tokens (None: the model's context) that move by half of it. Every
    token but a document's first ones is then predicted from at least `length` / 2 tokens, and each counts once. Raises
    UsageError if `length` is out of range, or no document has two tokens.

    Args:
        model: the model to score.
        documents: token ids of each document.
        bytes: the UTF-8 bytes of all documents, or of their targets if `counted` is given.
        length: tokens of a window.
        end_id: put before each document, so that its first token is predicted too, from the state that the model was
            trained in. With None the first token of each document is only read.
        start_tokens: the number of tokens at the start of each document that are read and never predicted.
        progress: called with numbers of tokens read.
        counted: for each document (T,) bool, its tokens that are targets (None: all).
    """
    length = model.config.context if length is None else length
    if not 2 <= length <= model.config.context:
        raise UsageError(f"length is {length}; it must lie between 2 and the model's context {model.config.context}")
    sums, before = _Sums(model), [] if end_id is None else [end_id]
    for number, document in enumerate(documents):
        tokens = np.asarray([*before, *document], dtype=np.int64)
        if len(tokens) < 2:
            continue
        targets_T = None
        if counted is not None:
            targets_T = np.concatenate([np.zeros(len(before), dtype=bool), counted[number]])
        sums.add(tokens, targets_T, start_tokens, length, progress)
    if not sums.counts_n[0]:
        raise UsageError("no document has two tokens; there is nothing to predict")
    if counted is None:
        predicted = sum(len(document) - start_tokens for document in documents)
    else:
        predicted = sum(int(each.sum()) for each in counted)
    return sums.scores(bytes, predicted / bytes)


class _Sums:
    """Sums over documents, for each of n heads: of nats, hits, targets, right prefixes, passes and committed tokens."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._offsets_n = np.array(model.config.offset_of_heads)
        n = model.config.heads
        self.counts_n = np.zeros(n)
        self._nats_n, self._hits_n, self._prefixes_n = np.zeros(n), np.zeros(n), np.zeros(n)
        self._with_nats_n = np.zeros(n)
        self._passes, self._committed = [0] * n, [0] * n

    def add(
        self,
        tokens: np.ndarray,
        targets_T: np.ndarray | None,
        start_tokens: int,
        length: int,
        progress: Callable[[int], None],
    ) -> None:
        """Read a document and add its scores."""
        last, n = len(tokens) - 1, len(self._offsets_n)
        aims_Tn = np.arange(len(tokens))[:, None] + self._offsets_n
        known_Tn = (aims_Tn <= last) & (aims_Tn >= start_tokens)
        spans = [(max(0, start_tokens - 1), len(tokens))]  # the first pass stands on the last start token
        if targets_T is not None:
            known_Tn &= targets_T[np.minimum(aims_Tn, last)]
            known_Tn = np.minimum.accumulate(known_Tn, axis=1)  # a pass stands before an answer and drafts it
            spans = _spans(targets_T)
        right_Tn = np.zeros((len(tokens), n), dtype=bool)
        for start, first, stop in _windows(len(tokens), length):
            nats_Tn, top_Tn = _read(self._model, tokens, start, stop)
            new, known = slice(first - start, stop - start), known_Tn[first:stop]
            finite = known & np.isfinite(nats_Tn[new])  # not outside a draft vocabulary
            self._nats_n += np.where(finite, nats_Tn[new], 0.0).sum(0)
            self._with_nats_n += finite.sum(0)
            right_Tn[first:stop] = (top_Tn[new] == tokens[np.minimum(aims_Tn[first:stop], last)]) & known
            progress(stop - first)
        self._hits_n += right_Tn.sum(0)
        self.counts_n += known_Tn.sum(0)
        # Drafts come from heads 2..k: head 1's own token is committed, right or not. None drafts behind a gap.
        right_Tn[:, self._model.config.drafting_heads :] = False
        runs_Tn = np.cumprod(np.concatenate([np.ones_like(right_Tn[:, :1]), right_Tn[:, 1:]], 1), 1).astype(bool)
        self._prefixes_n += (runs_Tn & known_Tn).sum(0)
        for k in range(1, n + 1):
            for begin, stop in spans:
                passes, committed = _walk(runs_Tn[begin:stop, :k].sum(1), stop - begin)
                self._passes[k - 1] += passes
                self._committed[k - 1] += committed

    def scores(self, size: int, tokens_per_byte: float) -> HeadScores:
        """Return the scores of all documents added, which have `size` bytes."""
        per_byte = tokens_per_byte / math.log(2)  # bits of a nat
        counts = self.counts_n.tolist()
        return HeadScores(
            tokens=int(counts[0]),
            bytes=size,
            bits_per_byte=[_ratio(a, b) * per_byte for a, b in zip(self._nats_n.tolist(), self._with_nats_n.tolist())],
            top1=[_ratio(a, b) for a, b in zip(self._hits_n.tolist(), counts)],
            prefix=[_ratio(a, b) for a, b in zip(self._prefixes_n.tolist()[1:], counts[1:])],
            tokens_per_pass=[_ratio(a, b) for a, b in zip(self._committed, self._passes)],
        )


def _spans(counts_T: np.ndarray) -> list[tuple[int, int]]:
    """Return for each run of targets the position before it, where its first pass stands, and its end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], counts_T.astype(np.int8), [0]])))
    return [(max(0, int(begin) - 1), int(stop)) for begin, stop in zip(edges[::2], edges[1::2])]


def _windows(size: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, first, stop): the tokens start..stop are read together, and those from `first` on count."""
    first = start = 0
    while True:
        stop = min(size, start + length)
        yield start, first, stop
        if stop == size:
            return
        first, start = stop, stop - length + max(1, length // 2)


@torch.no_grad()
def _read(model: Transformer, tokens: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Return nats of the right token and the most probable token of each head, at positions start..stop: (T, n) each.

    The nats are 0 if the document ends before the token.
    """
    n, device = model.config.heads, model.device
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
    """Return the passes that decoding takes if the model writes these `size` tokens, and the tokens that they commit.

    A pass at position t commits run_T[t] tokens, 1 + the right drafts there.
    """
    passes = position = 0
    runs = run_T.tolist()
    while position < size - 1:
        position += min(runs[position], size - 1 - position)
        passes += 1
    return passes, size - 1


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan
