"""The latents of one forward run over cached slots: the trunk's at once, those of heads when they are needed."""

from __future__ import annotations

from torch import Tensor

from headstart.decoding.cache import CachedAttention, gather_row
from headstart.model.heads import PassHead
from headstart.model.transformer import Transformer


class Latents:
    """Latents of the trunk (0) and of heads (1..n) over the rows fed."""

    def __init__(
        self, model: Transformer, tokens_SW: Tensor, rotary: tuple[Tensor, Tensor], attention: CachedAttention
    ) -> None:
        self.model, self.rotary, self.attention = model, rotary, attention
        self.of: dict[int, Tensor] = {0: model.trunk(tokens_SW, rotary, attention)}
        self._heads = list(model.heads)  # to index a ModuleList costs as much as an operator

    def head(self, k: int) -> Tensor:
        """Return the latent of head k on all rows, and run the heads that it hangs on."""
        for step in self.model.path(k):
            if step not in self.of:
                self.run(step)
        return self.of[k]

    def run(self, k: int, row_S: Tensor | None = None) -> None:
        """Run head k on its parent's latent, on all rows or on row `row_S` of each slot."""
        config = self.model.config
        parent, head = self.of[config.parents[k - 1]], self._heads[k - 1]
        select = None if row_S is None else (lambda x: gather_row(x, row_S, 1))
        if isinstance(head, PassHead):
            parent = head(parent)
            self.of[k] = parent if select is None else select(parent)
            return
        layer = config.trunk_layers + k - 1
        attend = self.attention(layer, row_S) if config.kind.has_block(k) else None
        self.of[k] = head(parent, self.rotary, attend, select)
