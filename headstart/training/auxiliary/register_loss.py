"""What register tokens learn (arXiv 2505.10518): the token at the distance that their position tells."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from headstart.data.batches import Registers
from headstart.objective.cross_entropy import LOGITS_BYTES, linear_cross_entropy


@dataclass
class RegisterLoss:
    """What `walk_step` adds to head 1's loss: the cross-entropy of head 1 at the registers behind each row.

    Head 1's summed loss is divided by its targets in the whole step. So this one, to be a mean over the targets of
    registers, is given times one number over the other.
    """

    registers: Registers
    weight: float
    """Of the mean over registers beside head 1's mean."""
    next_tokens: Tensor
    """Valid targets of head 1 in the whole step, scalar."""
    register_targets: Tensor
    """Valid targets of registers in the whole step, scalar."""
    budget: int = LOGITS_BYTES
    total: Tensor | None = None
    """Once it was asked: the summed loss of the registers, unweighted."""

    def __call__(self, x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        targets_BR = self.registers.targets
        x_BRD = x_BTD[:, x_BTD.shape[1] - targets_BR.shape[1] :]
        out = linear_cross_entropy(x_BRD, weight_VD, targets_BR, budget=self.budget)
        self.total = out.total
        scale = self.weight * self.next_tokens.clamp_min(1).to(out.loss.dtype) / self.register_targets.clamp_min(1)
        return out.loss * scale
