"""Causal attention of whole rows of text, for training and for `logits`; decoding brings its own, over its cache.

Shape suffixes: B batch, T time (positions), H attention heads, K key/value heads, G = H / K, E width of one head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

WRITTEN_OUT_LENGTH = 512
"""Up to this many positions, plain products beat torch's fused attention on a CPU: forward and backward take a fifth of
the time at 128 positions and six tenths at 512 in bf16, three quarters at 512 in fp32 (docs/lab-notes.md). They hold
the scores in return."""
BLOCK = 128
"""Rows of `blocked_attention` that share one product. In fp32, rows of no more than that gain nothing over torch's."""


def causal_attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, window: int | None = None) -> Tensor:
    """Attend from each position to itself and all before it; with a `window`, to the last `window` of these."""
    T = q_BHTE.shape[2]
    if window is not None and window < T:
        mask = torch.ones(T, T, dtype=torch.bool, device=q_BHTE.device).tril()
        return _masked_attention(q_BHTE, k_BKTE, v_BKTE, within(mask, window))
    if q_BHTE.device.type == "cpu" and T <= WRITTEN_OUT_LENGTH:
        if q_BHTE.dtype == torch.bfloat16:
            return product_attention(q_BHTE, k_BKTE, v_BKTE)
        if q_BHTE.dtype == torch.float32 and T > BLOCK:
            return blocked_attention(q_BHTE, k_BKTE, v_BKTE)
    grouped = q_BHTE.shape[1] != k_BKTE.shape[1]
    return F.scaled_dot_product_attention(q_BHTE, k_BKTE, v_BKTE, is_causal=True, enable_gqa=grouped)


def within(mask_TT: Tensor, window: int) -> Tensor:
    """Return a causal mask, True where a row sees a column, narrowed to a window."""
    return mask_TT.triu(1 - window)


def _masked_attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, mask: Tensor) -> Tensor:
    grouped = q_BHTE.shape[1] != k_BKTE.shape[1]
    return F.scaled_dot_product_attention(q_BHTE, k_BKTE, v_BKTE, attn_mask=mask, enable_gqa=grouped)


def product_attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor) -> Tensor:
    """Compute causal attention as scores, softmax and mixture. The softmax is computed in fp32 and rounded once."""
    B, H, T, E = q_BHTE.shape
    group = H // k_BKTE.shape[1]
    q = (q_BHTE * E**-0.5).reshape(-1, group * T, E)  # the queries of one key head, one after another
    k, v = k_BKTE.reshape(-1, T, E), v_BKTE.reshape(-1, T, E)
    hidden = torch.full((T, T), float("-inf"), dtype=q.dtype, device=q.device).triu(1).repeat(group, 1)
    scores = torch.baddbmm(hidden.expand(q.shape[0], -1, -1), q, k.transpose(1, 2))
    return torch.bmm(scores.softmax(-1), v).view(B, H, T, E)


def blocked_attention(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor) -> Tensor:
    """Compute causal attention in blocks of BLOCK rows, each against the keys up to its own last row.

    With many blocks that is half the arithmetic of `product_attention`, and half its memory.
    """
    B, H, T, E = q_BHTE.shape
    group = H // k_BKTE.shape[1]
    q, k, v = q_BHTE.reshape(-1, group, T, E), k_BKTE.reshape(-1, T, E), v_BKTE.reshape(-1, T, E)
    return _Blocked.apply(q, k, v)[0].view(B, H, T, E)


class _Blocked(torch.autograd.Function):
    """Attention in blocks, of q (N, G, T, E), k and v (N, T, E), N = B*K.

    It has its own backward, because the backward of a slice fills the rest of the tensor with zeros, which costs all
    that the blocks save.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixture (N, G, T, E), and the logarithm of the sum of the scores' exponentials, (N, G, T)."""
        N, G, T, E = q.shape
        y, total, probabilities = torch.empty_like(q), q.new_empty(N, G, T), []
        hidden = torch.full((BLOCK, BLOCK), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
        for start in range(0, T, BLOCK):
            end = min(start + BLOCK, T)
            rows = end - start
            scores = torch.bmm(q[:, :, start:end].reshape(N, G * rows, E), k[:, :end].mT).mul_(E**-0.5)
            scores.view(N, G, rows, end)[..., start:] += hidden[:rows, :rows]
            p = scores.softmax(-1)
            y[:, :, start:end] = torch.bmm(p, v[:, :end]).view(N, G, rows, E)
            # The largest probability of a row is never rounded to 0, so its logarithm is finite.
            total[:, :, start:end] = (scores.amax(-1) - p.amax(-1).log_()).view(N, G, rows)
            probabilities.append(p)
        ctx.save_for_backward(q, k, v, y, *probabilities)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v."""
        q, k, v, y, *probabilities = ctx.saved_tensors
        N, G, T, E = q.shape
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        # What the softmax's backward takes from every score of a row.
        mean = (dy * y).sum(-1, keepdim=True) - dtotal[..., None]
        for p, start in zip(probabilities, range(0, T, BLOCK)):
            end = min(start + BLOCK, T)
            rows = G * (end - start)
            q_rows, dy_rows, mean_rows = (x[:, :, start:end].reshape(N, rows, -1) for x in (q, dy, mean))
            dv[:, :end].baddbmm_(p.mT, dy_rows)
            dscores = torch.bmm(dy_rows, v[:, :end].mT).sub_(mean_rows).mul_(p)
            dq[:, :, start:end] = torch.bmm(dscores, k[:, :end]).mul_(E**-0.5).view(N, G, -1, E)
            dk[:, :end].baddbmm_(dscores.mT, q_rows, alpha=E**-0.5)
        return dq, dk, dv


class DocumentAttention:
    """Causal attention that also stops at document boundaries. `documents_BT` holds a document index per position."""

    def __init__(self, documents_BT: Tensor) -> None:
        T = documents_BT.shape[1]
        causal_TT = torch.ones(T, T, dtype=torch.bool, device=documents_BT.device).tril()
        self.mask = ((documents_BT[:, :, None] == documents_BT[:, None, :]) & causal_TT)[:, None]  # (B, 1, T, T)
        self._within: dict[int, Tensor] = {}  # most layers share a window

    def __call__(self, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, window: int | None = None) -> Tensor:
        """Attend inside documents, to the last `window` positions if given."""
        if window is None or window >= self.mask.shape[-1]:
            return _masked_attention(q_BHTE, k_BKTE, v_BKTE, self.mask)
        if window not in self._within:
            self._within[window] = within(self.mask, window)
        return _masked_attention(q_BHTE, k_BKTE, v_BKTE, self._within[window])


class RegisterAttention:
    """Attention in rows of T tokens with R registers behind them (`training/auxiliary/registers.py`).

    A token sees what `ordinary` lets it see, which includes no register. Register r sees itself, and what a token
    behind position `after_BR[:, r]` would see.
    """

    def __init__(
        self, ordinary: Callable[..., Tensor], length: int, after_BR: Tensor, documents_BT: Tensor | None = None
    ) -> None:
        self._ordinary, self._length = ordinary, length
        R, device = after_BR.shape[1], after_BR.device
        self._distance_BRT = after_BR[..., None] - torch.arange(length, device=device)
        self._seen_BRT = self._distance_BRT >= 0
        if documents_BT is not None:
            self._seen_BRT &= documents_BT.gather(1, after_BR)[..., None] == documents_BT[:, None]
        self._itself_BRR = torch.eye(R, dtype=torch.bool, device=device).expand(len(after_BR), -1, -1)

    def __call__(self, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, window: int | None = None) -> Tensor:
        """Attend in rows of tokens and registers, (B, H, T + R, E)."""
        T, slides = self._length, {} if window is None else {"window": window}
        ordinary = self._ordinary(q_BHTE[:, :, :T], k_BKTE[:, :, :T], v_BKTE[:, :, :T], **slides)
        seen = self._seen_BRT if window is None else self._seen_BRT & (self._distance_BRT < window - 1)
        mask = torch.cat([seen, self._itself_BRR], -1)[:, None]
        return torch.cat([ordinary, _masked_attention(q_BHTE[:, :, T:], k_BKTE, v_BKTE, mask)], 2)


class StepAttention:
    """The attention of steps of one module over one set of keys and values (EAGLE-3, `eagle.py`), in whole rows.

    Row t of step d stands at position t + d - 1. It sees what step 1 wrote up to position t, and behind that what steps
    2 to d wrote in row t: its own drafts, as in decoding. Call it once for each step, in order.

    Args:
        ordinary: the attention of step 1, causal or that of documents.
        detached: whether later steps read detached aliases of the keys and values, whose gradients `gradients` returns.
    """

    def __init__(self, ordinary: Callable[..., Tensor], detached: bool = False) -> None:
        self._ordinary, self._detached = ordinary, detached
        self._mask = ordinary.mask if isinstance(ordinary, DocumentAttention) else None
        self._made: list[tuple[Tensor, Tensor]] = []
        self._read: list[tuple[Tensor, Tensor]] = []
        """Keys and values of each step, and what later steps read of them."""

    def __call__(self, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor) -> Tensor:
        """Attend in the next step."""
        own = [*self._read[1:], (k_BKTE, v_BKTE)]
        if not self._made:
            y = self._ordinary(q_BHTE, k_BKTE, v_BKTE)
        else:
            y = step_attention(q_BHTE, *self._read[0], own, self._mask)
        self._made.append((k_BKTE, v_BKTE))
        self._read.append((self._alias(k_BKTE), self._alias(v_BKTE)))
        return y

    def gradients(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Return what a step (from 0) wrote, with the gradients of the later steps, which have run backward."""
        pairs = zip(self._made[step], self._read[step])
        return [(made, read.grad) for made, read in pairs if self._detached and read.grad is not None]

    def _alias(self, x: Tensor) -> Tensor:
        return x.detach().requires_grad_(x.requires_grad) if self._detached else x


def step_attention(
    q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, own: Sequence[tuple[Tensor, Tensor]], mask: Tensor | None
) -> Tensor:
    """Attend from row t to the rows up to t of `k_BKTE`, and to row t of each pair of keys and values in `own`.

    `mask` (B, 1, T, T) is True where a row sees a row of `k_BKTE` (None: all up to it).
    """
    B, H, T, E = q_BHTE.shape
    K = k_BKTE.shape[1]
    q, k, v = q_BHTE.reshape(B * K, H // K, T, E), k_BKTE.reshape(-1, T, E), v_BKTE.reshape(-1, T, E)
    if mask is None and q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64):
        y, total = _Blocked.apply(q, k, v)
    else:
        y, total = _summed_attention(q, k, v, mask, B)
    # The softmax over two parts of the keys weighs the mixture of each by the sum of its exponentials.
    keys, values = ([x.reshape(-1, 1, T, E) for x in part] for part in zip(*own))
    scores = [(q * key).sum(-1) * E**-0.5 for key in keys]
    weights = torch.stack([total.to(q.dtype), *scores], -1).softmax(-1)
    y = y * weights[..., :1]
    for i, value in enumerate(values, start=1):
        y = y + value * weights[..., i : i + 1]
    return y.view(B, H, T, E)


def _summed_attention(
    q_NGTE: Tensor, k_NTE: Tensor, v_NTE: Tensor, mask: Tensor | None, rows: int
) -> tuple[Tensor, Tensor]:
    """Do what `_Blocked` does in plain products, where `mask` (rows, 1, T, T) is True (None: up to each row)."""
    N, G, T, E = q_NGTE.shape
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q_NGTE.device).tril().expand(rows, 1, T, T)
    scores = torch.bmm(q_NGTE.reshape(N, G * T, E) * E**-0.5, k_NTE.mT).view(rows, -1, T, T)
    scores = scores.masked_fill(~mask, float("-inf"))
    total = scores.float().logsumexp(-1) if scores.dtype != torch.float64 else scores.logsumexp(-1)
    y = torch.bmm(scores.softmax(-1).view(N, G * T, T), v_NTE)
    return y.view(N, G, T, E), total.view(N, G, T)
