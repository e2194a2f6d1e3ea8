"""A decoding pass on its own: the same window at the same length, again and again, with nothing around it."""

from __future__ import annotations

import torch

from headstart.decoding.drafters.tree import DraftTree, TreeRows
from headstart.decoding.engine import SPAN, Engine
from headstart.model.transformer import Transformer


class Pass:
    """A decoding pass of `slots` windows of `rows` tokens at `length` cached positions; call it to run it.

    `rows` may exceed the model's heads: the window is widened, so that the same weights can be timed at any width. With
    a `tree` windows are its first `rows` rows, and all of it is drafted.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        rows: int,
        heads: int = 1,
        slots: int = 1,
        length: int = 128,
        deferred: bool = True,
        confident: bool = False,
        tree: DraftTree | None = None,
    ) -> None:
        self.model, self.rows, self.heads, self.length, self.deferred = model, rows, heads, length, deferred
        self.confident = confident
        engine = Engine(model, slots=slots, context=length + rows, exact=False, tree=tree)
        self.state = state = engine.state
        self._decode = engine.decode_pass  # through graphs, where the engine's passes are
        width = max(rows, engine.width)
        device = state.length_S.device
        state.window_SW = torch.randint(model.config.vocab_size, (slots, width), device=device)
        state.heads_S[:] = heads
        self.draft_tree = None if tree is None else TreeRows(tree, device)
        self.tree = None if self.draft_tree is None else self.draft_tree.first(rows)
        self.slots = slice(0, slots)
        self.starts = [length] * slots
        self.span = -(-(length + rows) // SPAN) * SPAN

    @torch.no_grad()
    def __call__(self) -> list[list[int]]:
        self.state.length_S[:] = self.length
        tokens, accepted = self._decode(
            self.slots,
            rows=self.rows,
            heads=self.heads,
            span=self.span,
            starts=self.starts,
            deferred=self.deferred,
            confident=self.confident,
            tree=self.tree,
            draft_tree=self.draft_tree,
        )
        accepted.tolist()
        if self.confident:
            self.state.confidence_SK.tolist()
        return tokens.tolist()  # the engine waits for both, so they belong to the pass
