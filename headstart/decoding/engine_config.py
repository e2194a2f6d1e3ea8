"""Settings of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from headstart.arguments import whole_number
from headstart.decoding.drafters.tree import DraftTree, DynamicTree

MOST_LOOKUP = 1024
"""Most drafts of a pass to look up; a window of more rows costs far more than they can bring."""


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine."""

    slots: int = 1
    """Requests decoded at once, rows of the caches; more wait in a queue."""
    context: int | None = None
    """Most positions of a request (None: the model's context)."""
    exact: bool = True
    """True: a request's output is bit for bit the same for every number of heads. With kernels whose rows are exact
    that costs nothing, and holds for every batch too. Elsewhere it fixes the shapes of a pass: all n rows of a window,
    all slots, whole attention blocks. False: every pass is as small as possible, faster with few heads, equal up to
    rounding."""
    deferred: bool = True
    """True: drafting heads run on the accepted row only, see `PassPlan`."""
    lookup: int = 0
    """Most drafts of a window that are looked up in the sequence itself, after those of the heads or in their place."""
    prefill_budget: int | None = 256
    """Most prompt tokens to read before a pass, so that a long prompt does not delay the other requests (None: no
    limit, for batches in which nobody waits)."""
    prefix_reuse: bool = True
    """True: a prompt reuses the keys and values of a sequence that begins like it, in any slot. The output does not
    depend on it."""
    tree: DraftTree | DynamicTree | None = None
    """Tree of the heads' drafts (None: the policy's tree, or chains). Requests whose acceptance rule cannot verify
    trees get chains, and so do requests decoded together with them."""
    graphs: bool | None = None
    """True: passes run through CUDA graphs, see `GraphedPass` (None: on a CUDA device)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", whole_number("slots", self.slots, 1))
        if self.context is not None:
            object.__setattr__(self, "context", whole_number("context", self.context, 1))
        object.__setattr__(self, "lookup", whole_number("lookup", self.lookup, 0, MOST_LOOKUP))
