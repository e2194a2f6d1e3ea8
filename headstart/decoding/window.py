"""Windows: the root and the drafts that the next pass feeds, and what is known of each draft.

Row 0 of a window is the root, which is decided but not cached yet; the others are drafts. What is needed to verify a
draft stays on the device (`Windows`): its token, the distribution it was drawn from, its confidence. What is needed to
choose how many rows to feed and to account for them is on the host (`Window`): its drafter and the probability that it
is right. Depth and parent of row r are r and r - 1 in a chain; a tree has them in its `TreeRows`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from headstart.decoding.drafters.tree import DraftTree, TreeRows


class Origin(int):
    """The drafter of a token, as the number that outputs report: k for head k, or one of the constants below."""

    def __init__(self, number: int) -> None:
        self.is_head = number > 0
        """True if a head proposed the token."""


LOOKUP = Origin(0)
"""Origin of a draft that was looked up in the sequence itself."""
FORCED = Origin(-1)
"""Origin of a draft that a constraint left no choice about."""


class Windows:
    """The windows of all slots on the device: S slots, W >= n rows of a full window."""

    def __init__(self, slots: int, width: int, heads: int, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.tokens_SW = torch.zeros((slots, width), dtype=torch.int64, device=device)
        """(S, W) int64: the root and the drafts of heads; where W > n also other drafts."""
        self.drafted_S = torch.zeros(slots, dtype=torch.int64, device=device)
        """(S,) int64: the depth up to which rows hold drafts; later rows are padding and never accepted."""
        self.confidence_SK = torch.zeros(slots, heads - 1, device=device)
        """(S, n-1) fp32: the probability that its head gave each draft, or its expectation where a rule weighs
        drafts."""
        self._q_SKV: Tensor | None = None

    @property
    def q_SKV(self) -> Tensor:
        """(S, W-1, V) fp32: the distribution that each draft was drawn from; allocated when a rule first needs it."""
        if self._q_SKV is None:
            slots, width = self.tokens_SW.shape
            self._q_SKV = self.confidence_SK.new_zeros((slots, width - 1, self.vocab_size))
        return self._q_SKV

    def put(self, slots: slice, tokens_SK: Tensor) -> None:
        """Write the drafts of heads 2..K as chains."""
        self.tokens_SW[slots, 1 : 1 + tokens_SK.shape[1]] = tokens_SK

    def put_tree(self, slots: slice, candidates_SKC: Tensor, tree: TreeRows) -> None:
        """Write the candidates of heads 2..K to the nodes of a tree."""
        flat = candidates_SKC.flatten(1)
        # Nodes of heads that do not draft get any token: `drafted_S` excludes them.
        self.tokens_SW[slots, 1 : tree.rows] = flat[:, tree.candidate_G.clamp_max(flat.shape[1] - 1)]

    def replace(self, slot: int, own: int, drafts: list[int], certain: bool) -> None:
        """Put `drafts` after the first `own` drafts of a slot, in place of the others.

        `certain`: a rule weighs drafts. These were not drawn, so each has probability 1.
        """
        self.tokens_SW[slot, 1 + own : 1 + own + len(drafts)] = torch.tensor(drafts, device=self.tokens_SW.device)
        self.drafted_S[slot] = own + len(drafts)
        if certain:
            rows = self.q_SKV[slot, own : own + len(drafts)].zero_()
            rows[torch.arange(len(drafts)), drafts] = 1


@dataclass
class Window:
    """The window of one generation on the host."""

    drafters: list[Origin] = field(default_factory=list)
    """Drafter of each draft of a chain, or of each depth of a tree."""
    confidences: list[float] = field(default_factory=list)
    """Confidences of the drafts, in a tree of the best draft of each head; empty where nothing asks for them."""
    chances: list[float] = field(default_factory=list)
    """Probabilities that all drafts up to row 1, 2, ... are right, in a tree the path to that row; empty where
    nothing estimates them."""
    depths: dict[int, int] | None = None
    """Depths of the rows that hold drafts in a tree under a constraint; None elsewhere: all rows hold drafts."""
    forced: set[tuple[int, ...]] = field(default_factory=set)
    """Paths of draft tokens whose last one was forced."""
    match: int = 0
    """Length of the match that the looked up drafts follow; 0 without them."""

    def fed(self, rows: int, tree: DraftTree | None) -> tuple[int, int]:
        """Return how many drafts or depths the first `rows` rows hold, and how many drafts in addition to one each."""
        if tree is None:
            return min(len(self.drafters), rows - 1), 0
        if self.depths is None:
            fed = min(len(self.drafters), tree.depth)
            return fed, tree.within(rows, fed) - fed
        depths = [depth for row, depth in self.depths.items() if row < rows]
        fed = max(depths, default=0)
        return fed, len(depths) - fed
