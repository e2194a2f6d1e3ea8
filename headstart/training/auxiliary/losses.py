"""What a step learns beside its heads: token order, registers (docs/methods.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headstart.data.batches import IGNORE, Batch
from headstart.model.transformer import Transformer
from headstart.training.auxiliary.register_loss import RegisterLoss
from headstart.training.auxiliary.token_order import TokenOrderLoss
from headstart.training.config import RunConfig
from headstart.training.processes import Processes


class ExtraLosses:
    """Those of one optimiser step, over its micro-batches and processes; of most runs there are none."""

    def __init__(
        self,
        model: Transformer,
        config: RunConfig,
        batches: Sequence[Batch],
        next_tokens: Tensor,
        processes: Processes,
    ) -> None:
        """`next_tokens`: valid targets of head 1 in the whole step, scalar."""
        self._model, self._config, self._processes = model, config, processes
        self._counts: dict[str, Tensor] = {}
        if config.token_order.on:
            self._counts["token_order"] = next_tokens
        if config.registers.on:
            targets = [batch.registers.targets for batch in batches if batch.registers is not None]
            mine = torch.stack([(each != IGNORE).sum() for each in targets]).sum()
            self._counts["registers"] = processes.sum(mine)
        self._next_tokens = next_tokens
        self._asked: list[TokenOrderLoss | RegisterLoss] = []

    def of(self, batch: Batch) -> dict[str, Any]:
        """What `walk_step` is given for them beside a batch."""
        extras: list[TokenOrderLoss | RegisterLoss] = []
        if "token_order" in self._counts:
            extras.append(TokenOrderLoss(self._model, batch.targets[..., 0], batch.documents, self._config.token_order))
        if batch.registers is not None:
            counts = self._next_tokens, self._counts["registers"]
            extras.append(RegisterLoss(batch.registers, self._config.registers.weight, *counts))
        self._asked += extras
        return {"registers": batch.registers, "extras": extras} if extras else {}

    def means(self) -> dict[str, float]:
        """Mean loss of each in nats, unweighted, of the micro-batches walked; NaN where it has no target."""
        if not self._counts:
            return {}
        kinds = [TokenOrderLoss if name == "token_order" else RegisterLoss for name in self._counts]
        sums = [
            sum((each.total for each in self._asked if isinstance(each, kind) and each.total is not None), start=0)
            for kind in kinds
        ]
        totals = self._processes.sum(torch.stack([torch.as_tensor(s, device=self._next_tokens.device) for s in sums]))
        counts = torch.stack(list(self._counts.values())).tolist()
        return {
            name: total / count if count else math.nan
            for name, total, count in zip(self._counts, totals.tolist(), counts)
        }
