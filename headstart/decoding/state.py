"""The state that lives on the device between passes, and the plan of one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.decoding.cache import KVCache, cache_dtype
from headstart.decoding.constraints import ConstraintRows
from headstart.decoding.drafters.tree import DynamicTree, TreeRows
from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.penalties import PenaltyRows
from headstart.decoding.sampling import SamplingRows
from headstart.decoding.settings import Request
from headstart.decoding.window import Windows
from headstart.model.transformer import Transformer


@dataclass
class PassPlan:
    """The shape of one decoding pass, decided on the host."""

    slots: slice
    """Range of slots in the pass, S of them."""
    rows: int
    """Rows R of each window to feed. Without the compiled kernels a row's last bits depend on this number, so exact
    decoding keeps it at n whatever `heads` is."""
    heads: int
    """Most heads K that any of these slots uses; heads 2..K draft."""
    span: int
    """Number of cached positions that attention reads; more than every position of the pass."""
    starts: list[int] | None = None
    """Lengths of the slots as Python numbers, where the host knows them; negative in slots without a request."""
    tree: TreeRows | DynamicTree | None = None
    """Tree that the rows are nodes of (None: chains)."""
    draft_tree: TreeRows | DynamicTree | None = None
    """Tree of the windows that are drafted (None: chains)."""
    deferred: bool = True
    """True: drafting heads run on the accepted row only, and their keys and values are made for all rows. False: they
    run on every row, for tests to compare."""
    confident: bool = False
    """True: the confidences of the drafts are kept."""
    keep_logits: bool = False
    """True: head 1's logits are kept, before penalties."""
    row_by_row: bool = False
    """True: torch's attention takes the rows of a tree one by one, see `CachedAttention`."""


@dataclass
class DecodingState:
    """Everything that lives on the device between two passes, for S slots."""

    cache: KVCache
    length_S: Tensor
    """(S,) int64: positions whose keys and values count, without the root's; `parked` in a slot without a request."""
    heads_S: Tensor
    """(S,) int64: how many heads the slot uses, head 1 included."""
    windows: Windows
    sampling: SamplingRows
    penalties: PenaltyRows
    constraints: ConstraintRows
    rotary: tuple[Tensor, Tensor]
    """cos and sin (capacity, 1, E) of every position a slot can reach."""
    logits_SRV: Tensor | None = None
    """(S, R, V): head 1's logits of the last pass that kept them, before penalties."""

    @classmethod
    def empty(cls, model: Transformer, slots: int, capacity: int, width: int | None = None) -> DecodingState:
        """Return the state of an engine without requests; `width` is the rows of a full window (None: n)."""
        config, device = model.config, model.device
        width = width or config.heads
        dtype = cache_dtype(model.dtype, device)
        return cls(
            cache=KVCache(config, slots, capacity, dtype, device, compiled=backend_of(model).compiled_cache),
            length_S=torch.zeros(slots, dtype=torch.int64, device=device),
            heads_S=torch.ones(slots, dtype=torch.int64, device=device),
            windows=Windows(slots, width, config.heads, config.vocab_size, device),
            sampling=SamplingRows(slots, device),
            penalties=PenaltyRows(slots, config.vocab_size, device),
            constraints=ConstraintRows(slots, width, config.vocab_size),
            rotary=model.rotary(torch.arange(capacity, device=device), model.dtype),
        )

    def positions(self, length_S: Tensor, rows: int, starts: list[int] | None = None) -> Tensor:
        """Return the positions (S, rows) of windows that begin at `length_S`; `starts` are the same on the host."""
        if starts is not None and len(starts) == 1:  # fewer operators
            return torch.arange(starts[0], starts[0] + rows, device=length_S.device)[None]
        return length_S[:, None] + torch.arange(rows, device=length_S.device)

    def rotary_at(self, positions: Tensor, starts: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """Return cos and sin (S, W, 1, E) at positions (S, W); `starts` is their first column if the host knows it."""
        cos, sin = self.rotary
        if starts is not None and len(starts) == 1:  # slices are cheaper than an index
            rows = slice(starts[0], starts[0] + positions.shape[1])
            return cos[None, rows], sin[None, rows]
        return cos[positions], sin[positions]

    @property
    def parked(self) -> int:
        """The length of a slot without a request.

        Passes run over such slots too: their windows lie before the first position, where they change nothing.
        """
        return -self.windows.tokens_SW.shape[1]

    def begin(self, slot: int, request: Request, heads: int) -> None:
        """Put a request into a slot: its prompt but the last token is cached, the last one is the root of a window."""
        prompt = torch.tensor(request.prompt, device=self.length_S.device)
        self.length_S[slot] = len(request.prompt) - 1
        self.windows.tokens_SW[slot] = 0
        self.windows.tokens_SW[slot, 0] = prompt[-1]
        self.windows.drafted_S[slot] = 0
        self.windows.clear_tree(slot)
        self.heads_S[slot] = heads
        self.sampling.set(slot, request.sampling, request.acceptance)
        self.penalties.set(slot, request.penalties, prompt)
        self.constraints.set(slot, request.masked)

    def clear(self, slot: int) -> None:
        """Park a slot whose request has ended."""
        self.length_S[slot] = self.parked
        self.windows.drafted_S[slot] = 0
        self.heads_S[slot] = 1
        self.sampling.clear(slot)
        self.penalties.clear(slot)
        self.constraints.clear(slot)

    def advance(self, slots: slice, length_S: Tensor, root_S: Tensor, heads: int) -> None:
        """Set lengths and new roots after a pass, and how many drafts heads 2..K will make."""
        self.length_S[slots] = length_S
        self.windows.tokens_SW[slots, 0] = root_S
        self.windows.drafted_S[slots] = (self.heads_S[slots] - 1).clamp_max(heads - 1)
