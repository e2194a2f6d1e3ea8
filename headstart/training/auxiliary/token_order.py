"""Token order prediction (arXiv 2508.19228): one more matrix ranks the tokens that come next, the nearest first.

The matrix reads what the unembedding reads for head 1 and is trained by ListNet. A token that occurs next at distance d
from a position has the score W - d there; tokens that do not occur within the window W have none. The loss compares the
softmax of the matrix's logits with the softmax of the scores, which is exp(-d), normalised. So a distance beyond REACH
changes nothing in any dtype, and a position has at most REACH pairs of token and probability as its target: no
(B, T, V) tensor exists, for targets or for logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headstart.arguments import AT_LEAST_1, COEFFICIENT, check_fields
from headstart.data.batches import IGNORE
from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer, compute_dtype
from headstart.objective.cross_entropy import LOGITS_BYTES, LinearLoss, chunk_rows
from headstart.objective.inputs import StepInputs
from headstart.training.auxiliary.base import Auxiliary, AuxiliarySettings

REACH = 40
"""Largest distance that counts: exp(-40), as a share, is below the resolution of float64."""


@dataclass(frozen=True)
class TokenOrderConfig(AuxiliarySettings):
    """Token order prediction in addition to the next token."""

    name = "token_order"
    why_not_adapted = "where heads learn before the trunk that it is to teach"
    with_sequential_heads = True

    weight: float = 0.0
    """Weight of its loss, relative to head 1's (0: none; the paper takes 1)."""
    window: int | None = None
    """Distance up to which tokens are ranked (None: the length of a row)."""

    def __post_init__(self) -> None:
        check_fields(self, "token_order.", weight=COEFFICIENT, window=AT_LEAST_1)

    def auxiliary(self, token: int, seed: int) -> TokenOrder:
        """Return the objective."""
        return TokenOrder(self, token, seed)

    def extra_flops(self, model: ModelConfig) -> int:
        """Count the FLOPs of one more unembedding."""
        return 6 * model.vocab_size * model.dim

    def check(self, *, adapted: bool, sampled: bool, ahead: int) -> None:
        """Raise UsageError also if steps can leave out head 1's loss."""
        super().check(adapted=adapted, sampled=sampled, ahead=ahead)
        if sampled:
            raise UsageError(
                "token_order is part of head 1's loss, which head_weights.sampled leaves out at times; take one"
            )


@dataclass(frozen=True)
class TokenOrder(Auxiliary):
    """Token order prediction: see `linear_token_order`."""

    settings: TokenOrderConfig

    def add_parameters(self, model: Transformer) -> None:
        """Give the model its matrix. No model directory holds it, because nothing decodes with it."""
        model.unembedding.order = nn.Parameter(torch.empty_like(model.unembedding.weights[0]))

    def loss(self, model: Transformer, inputs: StepInputs, x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        """Return the loss of the matrix, summed."""
        order = model.unembedding.order
        assert order is not None and inputs.documents is not None
        order_VD = order if torch.is_grad_enabled() else order.detach()  # or its gradient would be computed
        x_BTD = x_BTD if x_BTD.shape[1] == inputs.length else x_BTD[:, : inputs.length]
        return linear_token_order(x_BTD, order_VD, inputs.targets[..., 0], inputs.documents, self.settings.window)


def linear_token_order(
    x_BTD: Tensor,
    weight_VD: Tensor,
    targets_BT: Tensor,
    documents_BT: Tensor,
    window: int | None = None,
    *,
    budget: int = LOGITS_BYTES,
) -> Tensor:
    """Return the summed cross-entropy of the softmax of `x @ weight.T` against that of the order scores.

    Args:
        x_BTD: (B, T, D), floating.
        weight_VD: (V, D).
        targets_BT: (B, T) int64, the next token of each position, `IGNORE` if it is no target: such a position counts
            for nothing, and no position ranks such a token.
        documents_BT: (B, T) int64; no position ranks tokens of another document.
        window: W, in tokens (None: T).
        budget: bytes of logits held at once.

    Returns:
        The sum over all positions with a target: an fp32 scalar (fp64 for fp64 input), differentiable in both.
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
    """The tokens ahead of each position, with the softmax of their scores."""

    def __init__(self, targets_BT: Tensor, documents_BT: Tensor, window: int | None) -> None:
        B, T = targets_BT.shape
        rows = torch.arange(B, device=targets_BT.device)[:, None]
        self.targets_N = targets_BT.flatten()
        self.documents_N = (documents_BT + rows * (documents_BT.max() + 1)).flatten()
        self.ahead_W = torch.arange(min(window or T, T, REACH), device=targets_BT.device)
        # The position at which each token was the target before: only its first occurrence ahead of a position counts.
        values, order = self.targets_N.sort(stable=True)
        self.before_N = torch.full_like(order, -1)
        self.before_N[order[1:]] = torch.where(values[1:] == values[:-1], order[:-1], -1)

    def at(self, where: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return tokens (R, W) int64 and their probabilities (R, W), 0 for none; a row without a target is all 0."""
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
