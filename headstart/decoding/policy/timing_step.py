"""A step of the engine on its own: the same windows at the same length, again and again, with all that a step does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headstart.decoding.drafters.tree import DraftTree
from headstart.decoding.engine import Engine
from headstart.decoding.generation import Generation
from headstart.decoding.policy.calibration import EDGES, AcceptanceTable, PassCosts, Tuning
from headstart.decoding.policy.policy import DraftPolicy
from headstart.decoding.settings import Request, Sampling
from headstart.decoding.stopping import Stopper
from headstart.model.transformer import Transformer

ENDLESS = 1 << 40


class Step:
    """A step of an engine that decodes `slots` texts at `length` cached positions; call it to run it.

    What a policy chooses by is what its passes cost the engine: `single_pass.Pass` leaves out the bookkeeping of texts,
    the choice of rows itself, and, greedy, the noise.

    Args:
        rows: of each window; with a `tree` its first ones.
        drafting: whether all heads draft, the rows being chosen as by a policy; False is plain decoding, of one row.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        rows: int = 1,
        drafting: bool = True,
        slots: int = 1,
        length: int = 128,
        sampling: Sampling | None = None,
        tree: DraftTree | None = None,
    ) -> None:
        n, self.length, self.slots = model.config.heads, length, slots
        policy = _Always(rows, n, tree) if drafting else None
        self.engine = Engine(model, slots=slots, context=length + 1, exact=False, policy=policy, tree=tree)
        generator = torch.Generator().manual_seed(0)
        for slot in range(slots):
            prompt = torch.randint(model.config.vocab_size, (length + 1,), generator=generator).tolist()
            request = Request(tuple(prompt), ENDLESS, sampling or Sampling(), None if drafting else 1)
            heads = self.engine.most_heads if drafting else 1
            self.engine.begin(slot, Generation(request, heads, Stopper(ENDLESS)))

    def __call__(self) -> None:
        self.engine.rewind(self.length)
        self.engine.step()


class _Always(DraftPolicy):
    """That many rows in every pass, whatever is found worth it."""

    def __init__(self, rows: int, heads: int, tree: DraftTree | None) -> None:
        bins, ranks = (0.5,) * (len(EDGES) + 1), 0 if tree is None else tree.ranks
        table = AcceptanceTable(
            (0.5,) * (heads - 1),
            (bins,) * (heads - 1),
            ((0.5,) * ranks,) * (heads - 1),
            ((bins,) * ranks,) * (heads - 1),
        )
        costs = PassCosts((1,), (1.0,), ((1.0,) * heads,))
        if tree is not None:
            costs = PassCosts((1,), (1.0,), ((1.0,) * heads,), (tree.rows,), ((1.0,),))
        super().__init__(Tuning(table, table, costs))
        self.rows = rows

    def plan(self, slots: int, prefixes: Sequence[Sequence[float]]) -> tuple[int, bool]:
        super().plan(slots, prefixes)
        return self.rows, True
