"""Causal attention of whole rows of text, for training and for `logits`; decoding brings its own, over its cache.

Shape suffixes: B batch, T time (positions), H attention heads, K key/value heads, G = H / K, E width of one head.
"""

from __future__ import annotations

from collections.abc import Callable
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
    return _Blocked.apply(q, k, v).view(B, H, T, E)


class _Blocked(torch.autograd.Function):
    """Attention in blocks, of q (N, G, T, E), k and v (N, T, E), N = B*K.

    It has its own backward, because the backward of a slice fills the rest of the tensor with zeros, which costs all
    that the blocks save.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the mixture (N, G, T, E)."""
        N, G, T, E = q.shape
        y, probabilities = torch.empty_like(q), []
        hidden = torch.full((BLOCK, BLOCK), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
        for start in range(0, T, BLOCK):
            end = min(start + BLOCK, T)
            rows = end - start
            scores = torch.bmm(q[:, :, start:end].reshape(N, G * rows, E), k[:, :end].mT).mul_(E**-0.5)
            scores.view(N, G, rows, end)[..., start:] += hidden[:rows, :rows]
            p = scores.softmax(-1)
            y[:, :, start:end] = torch.bmm(p, v[:, :end]).view(N, G, rows, E)
            probabilities.append(p)
        ctx.save_for_backward(q, k, v, y, *probabilities)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v."""
        q, k, v, y, *probabilities = ctx.saved_tensors
        N, G, T, E = q.shape
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        # What the softmax's backward takes from every score of a row.
        mean = (dy * y).sum(-1, keepdim=True)
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
