"""Objective of a training step: the heads' losses by weight, their computation, and auxiliary losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from headstart.model.transformer import Transformer
from headstart.objective.backends import LossConfig
from headstart.objective.cross_entropy import LOGITS_BYTES
from headstart.objective.inputs import StepInputs, draft_targets, mask_untaught


class AuxiliaryLoss(Protocol):
    """A loss of head 1's latent in addition to its cross-entropy."""

    def __call__(self, inputs: StepInputs, x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        """Return a summed loss, scalar, that is added to head 1's and scaled with it.

        Args:
            inputs: the micro-batch.
            x_BTD: head 1's normed latent, (B, T, D), with registers (B, T + R, D).
            weight_VD: its unembedding.
        """
        ...


@dataclass(frozen=True)
class Objective:
    """The weighted sum of the heads' mean losses."""

    weights: Sequence[float] | None = None
    """One weight per head (None: all 1, as in the paper). A head of weight 0 has no loss computed and runs only if a
    head that hangs on it has a weight."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss backend, z-loss, and what heads 2..n learn from."""
    auxiliaries: Sequence[AuxiliaryLoss] = ()
    """Auxiliary losses; the walk does not report them."""
    budget: int = LOGITS_BYTES
    """Bytes of logits held at once."""

    @property
    def distills(self) -> bool:
        """True if heads 2..n learn from head 1."""
        return self.loss.heads != "cross-entropy"

    def weights_of(self, heads: int) -> list[float]:
        """Return the n weights."""
        return [1.0] * heads if self.weights is None else list(self.weights)

    def mask(self, inputs: StepInputs, model: Transformer) -> StepInputs:
        """Leave only the targets that this objective can learn, those of heads 2..n as draft ids.

        Call it once, before targets are counted.
        """
        inputs = draft_targets(inputs, model.unembedding.d2t)
        return mask_untaught(inputs, model.config.offset_of_heads) if self.distills else inputs
