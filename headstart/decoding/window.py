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

from headstart.decoding.drafters.tree import Branches, DraftTree, DynamicTree, RowPaths, TreeRows


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
        self.depth_SW: Tensor | None = None
        self.path_SWD: Tensor | None = None
        """(S, W) and (S, W, D + 1) int64: the trees of the slots as in `RowPaths`, if each has its own."""
        self.worth_SW: Tensor | None = None
        """(S, W) fp32: the confidences of the paths to their rows."""

    def hold_trees(self, tree: DynamicTree) -> None:
        """Allocate a tree for each slot, at first of drafts that all follow the root."""
        slots, width = self.tokens_SW.shape
        self.depth_SW = torch.ones_like(self.tokens_SW)
        self.path_SWD = self.depth_SW.new_zeros(slots, width, tree.depth + 1)
        self.worth_SW = torch.zeros_like(self.tokens_SW, dtype=torch.float32)
        for slot in range(slots):
            self.clear_tree(slot)

    def clear_tree(self, slot: int) -> None:
        """Make all drafts of a slot follow the root."""
        if self.depth_SW is not None and self.path_SWD is not None:
            self.depth_SW[slot] = 1
            self.depth_SW[slot, 0] = 0
            self.path_SWD[slot] = torch.arange(self.path_SWD.shape[1], device=self.path_SWD.device)[:, None]
            self.path_SWD[slot, :, 0] = 0

    def trees(self, slots: slice, rows: int, tree: TreeRows | DynamicTree | None) -> RowPaths | None:
        """Return the trees that the first rows of windows are nodes of (None: chains)."""
        if tree is None or isinstance(tree, TreeRows):
            return tree
        assert self.depth_SW is not None and self.path_SWD is not None
        # Copies, because the pass drafts the next trees before the accepted paths are moved.
        depth_SR, path_SRD = (x[slots, :rows].clone() for x in (self.depth_SW, self.path_SWD))
        return RowPaths(depth_SR, path_SRD)

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

    def depths(self, slots: slice, tree: DynamicTree) -> list[list[int]]:
        """Return the depths of the rows of each slot's tree."""
        assert self.depth_SW is not None
        return self.depth_SW[slots, : tree.rows].tolist()

    def branches(self, slot: int, tree: DynamicTree | None) -> Branches | None:
        """Return the tree of a slot on the host (None: a chain)."""
        if tree is None or self.depth_SW is None or self.path_SWD is None:
            return None
        one = slice(slot, slot + 1)
        return Branches(
            RowPaths(self.depth_SW[one, : tree.rows], self.path_SWD[one, : tree.rows]).parent_SR[0].tolist()
        )

    def worths(self, slots: slice, tree: DynamicTree) -> list[list[float]]:
        """Return the confidences of the paths to the rows of each slot's tree, without the root."""
        assert self.worth_SW is not None
        return self.worth_SW[slots, 1 : tree.rows].tolist()

    def put_trees(self, slots: slice, tokens_SN: Tensor, worth_SN: Tensor, tree: RowPaths) -> None:
        """Write the nodes of trees, one for each slot, whose root is row 0."""
        assert self.depth_SW is not None and self.path_SWD is not None and self.worth_SW is not None
        rows, deep = tree.path_SRD.shape[1:]
        self.tokens_SW[slots, 1:rows] = tokens_SN
        self.worth_SW[slots, 1:rows] = worth_SN
        self.depth_SW[slots, :rows] = tree.depth_SR
        self.path_SWD[slots, :rows, :deep] = tree.path_SRD
        self.path_SWD[slots, :rows, deep:] = tree.path_SRD[..., -1:]

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
    """Confidences of the drafts, in a static tree of the best draft of each head, in a dynamic one of the paths to its
    rows; empty where nothing asks for them."""
    chances: list[float] = field(default_factory=list)
    """Probabilities that all drafts up to row 1, 2, ... are right, in a tree the path to that row; empty where
    nothing estimates them."""
    depths: dict[int, int] | None = None
    """Depths of the rows that hold drafts in a tree under a constraint or in a dynamic one; None elsewhere: all rows
    hold drafts."""
    forced: set[tuple[int, ...]] = field(default_factory=set)
    """Paths of draft tokens whose last one was forced."""
    match: int = 0
    """Length of the match that the looked up drafts follow; 0 without them."""

    def fed(self, rows: int, tree: DraftTree | DynamicTree | None) -> tuple[int, int]:
        """Return how many drafts or depths the first `rows` rows hold, and how many drafts in addition to one each."""
        if tree is None:
            return min(len(self.drafters), rows - 1), 0
        if self.depths is None and isinstance(tree, DraftTree):
            fed = min(len(self.drafters), tree.depth)
            return fed, tree.within(rows, fed) - fed
        depths = [depth for row, depth in (self.depths or {}).items() if row < rows]
        fed = max(depths, default=0)
        return fed, len(depths) - fed
