"""Token order prediction (arXiv 2508.19228): one more matrix says which tokens come next, the nearest first.

It reads what the unembedding reads for head 1, and is trained by ListNet: token v, next seen at distance d from a
position, has score W - d there, tokens that are not seen within the window W have none, and the softmax of the scores
is what the softmax of the matrix's logits is compared with. That is exp(-d) for each, normalised, so that what lies
further than REACH changes nothing in any dtype, and the targets of a position are at most REACH pairs of token and
probability: no (B, T, V) tensor exists, for targets or for logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headstart.data.batches import IGNORE
from headstart.errors import UsageError
from headstart.model.transformer import Transformer, compute_dtype
from headstart.objective.cross_entropy import LOGITS_BYTES, LinearLoss, chunk_rows

REACH = 40
"""exp(-40) of a probability is below what float64 can tell from nothing."""


@dataclass(frozen=True)
class TokenOrderConfig:
    """Token order prediction beside the next token."""

    weight: float = 0.0
    """Of its loss in head 1's, which counts 1 (0: none; the paper takes 1)."""
    window: int | None = None
    """How many tokens ahead are looked for (None: the row's)."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise UsageError(f"token_order.weight is {self.weight}; it must be finite and not negative (0: none)")
        if self.window is not None and self.window < 1:
            raise UsageError(f"token_order.window is {self.window}; it must be at least 1, or left out")

    @property
    def on(self) -> bool:
        return self.weight > 0


def add_token_order(model: Transformer) -> None:
    """Gives a model its matrix, which lasts as long as its training: no model directory holds it, for nothing decodes
    with it."""
    model.unembedding.order = nn.Parameter(torch.empty_like(model.unembedding.weights[0]))


@dataclass
class TokenOrderLoss:
    """What `walk_step` adds to head 1's loss: see `linear_token_order`."""

    model: Transformer
    targets_BT: Tensor
    """Of head 1."""
    documents_BT: Tensor
    config: TokenOrderConfig
    budget: int = LOGITS_BYTES
    total: Tensor | None = None
    """Once it was asked: the summed loss of the targets, unweighted."""

    def __call__(self, x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        order = self.model.unembedding.order
        assert order is not None
        order_VD = order if torch.is_grad_enabled() else order.detach()  # or its gradient would be computed
        x_BTD = x_BTD if x_BTD.shape[1] == self.targets_BT.shape[1] else x_BTD[:, : self.targets_BT.shape[1]]
        given = self.targets_BT, self.documents_BT, self.config.window
        loss = linear_token_order(x_BTD, order_VD, *given, budget=self.budget)
        self.total = loss.detach()
        return self.config.weight * loss


def linear_token_order(
    x_BTD: Tensor,
    weight_VD: Tensor,
    targets_BT: Tensor,
    documents_BT: Tensor,
    window: int | None = None,
    *,
    budget: int = LOGITS_BYTES,
) -> Tensor:
    """Summed cross-entropy of the softmax of `x @ weight.T` against that of the order scores.

    Args:
        x_BTD: (B, T, D), floating.
        weight_VD: (V, D).
        targets_BT: (B, T) int64, the next token of each position, `IGNORE` where it is no target: such a position
            counts for nothing, and such a token is looked for by none.
        documents_BT: (B, T) int64, beyond whose ends nothing is looked for.
        window: W, in tokens (None: T).
        budget: bytes of logits held at once.

    Returns:
        The sum over all positions with a target, an fp32 scalar (fp64 for fp64 input) with the gradients of both.
    """
    dtype = compute_dtype(x_BTD)
    with torch.autocast(x_BTD.device.type, enabled=False):
        upcoming = _Upcoming(targets_BT, documents_BT, window)
        rows = chunk_rows(weight_VD.shape[0], budget, 4 if x_BTD.is_cuda else dtype.itemsize)

        def differentiate(logits_RV: Tensor, where: slice, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
            tokens_RW, share_RW = upcoming.at(where, wide)
            log_q = logits_RV.to(wide).log_softmax(-1)
            total = -(log_q.gather(1, tokens_RW) * share_RW).sum()
            gradient = log_q.exp_().mul_(share_RW.sum(1, keepdim=True)).scatter_add_(1, tokens_RW, -share_RW)
            logits_RV.copy_(gradient)
            return total, total, tokens_RW.new_zeros(())

        loss: Tensor = LinearLoss.apply(x_BTD.flatten(0, 1), weight_VD, dtype, rows, differentiate)[0]
        return loss


class _Upcoming:
    """Which tokens lie ahead of each position, and what their scores make of them."""

    def __init__(self, targets_BT: Tensor, documents_BT: Tensor, window: int | None) -> None:
        B, T = targets_BT.shape
        rows = torch.arange(B, device=targets_BT.device)[:, None]
        self.targets_N = targets_BT.flatten()
        self.documents_N = (documents_BT + rows * (documents_BT.max() + 1)).flatten()
        self.ahead_W = torch.arange(min(window or T, T, REACH), device=targets_BT.device)
        # Where each token was the target before: what has been seen since a position is not seen there a second time.
        values, order = self.targets_N.sort(stable=True)
        self.before_N = torch.full_like(order, -1)
        self.before_N[order[1:]] = torch.where(values[1:] == values[:-1], order[:-1], -1)

    def at(self, where: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(R, W) int64 tokens, and (R, W) their probabilities, 0 where there is none; a row without target is all 0."""
        N = len(self.targets_N)
        here_R1 = torch.arange(where.start, where.stop, device=self.targets_N.device)[:, None]
        ahead_RW = here_R1 + self.ahead_W
        index = ahead_RW.clamp_max(N - 1)
        tokens = self.targets_N[index]
        first = (tokens != IGNORE) & (self.before_N[index] < here_R1) & (ahead_RW < N)
        first &= self.documents_N[index] == self.documents_N[here_R1]
        first &= self.targets_N[here_R1] != IGNORE
        share = first * torch.exp(-self.ahead_W.to(dtype))
        return tokens.clamp_min(0), share / share.sum(1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
