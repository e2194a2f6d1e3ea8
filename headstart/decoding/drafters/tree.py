"""Draft trees: several candidates of each head in one window, verified together (Medusa, 2401.10774, section 2.1.2).

A node at depth j is a candidate of head j+1: its best, its second best, ... Heads 2..n are independent given the past,
so the candidates of a depth are the same under every parent, and a tree is a set of paths of ranks: 0.1 is the second
best of head 3 after the best of head 2. The acceptance rate of each rank is known before anything is drafted, so the
tree is static.
"""

from __future__ import annotations

import functools
import heapq
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.arguments import any_whole_number
from headstart.decoding.kernels import cpu
from headstart.errors import UsageError

Path = tuple[int, ...]

MOST_NODES = 1024
"""Most nodes of a draft tree. A window of more rows costs far more than its drafts can bring."""

TYPICAL = (0.6, 0.15, 0.07, 0.04, 0.03, 0.02, 0.015, 0.01)
"""Acceptance rate of each rank of a head where nothing was measured: roughly those of Medusa's first head."""


@dataclass(frozen=True)
class DraftTree:
    """The nodes of a tree in the order of their rows, without the root, which is row 0.

    Every prefix of the list is a tree: parents come before their children, better ranks before worse ones. With the
    best nodes first, a window of fewer rows has the best tree of its size.
    """

    paths: tuple[Path, ...]
    """The ranks from the root to each node; their number is its depth."""

    def __post_init__(self) -> None:
        seen: set[Path] = {()}
        if not self.paths:
            raise UsageError("a draft tree has at least one node, such as 0, the best draft of head 2")
        _check_size(len(self.paths))
        for path in self.paths:
            name = ".".join(map(str, path))
            if not path or min(path) < 0:
                raise UsageError(f"draft tree: {name or 'a node without ranks'!r} is not a node; ranks count from 0")
            if path in seen:
                raise UsageError(f"draft tree: node {name} is there twice; leave one out")
            for before in (path[:-1], (*path[:-1], path[-1] - 1)):
                if before not in seen and before[-1:] != (-1,):
                    missing = ".".join(map(str, before))
                    raise UsageError(f"draft tree: node {name} needs {missing} before it")
            seen.add(path)

    @classmethod
    def parse(cls, text: str) -> DraftTree:
        """Parse "0,1,0.0": the best two of head 2, and the best of head 3 after the first. Raises UsageError."""
        try:
            return cls(tuple(tuple(map(int, node.split("."))) for node in text.split(",")))
        except ValueError as error:
            shown = text if len(text) <= 60 else text[:57] + "..."
            raise UsageError(f"draft tree {shown!r}: write its nodes as ranks, such as 0,1,0.0,0.1") from error

    def __str__(self) -> str:
        return ",".join(".".join(map(str, path)) for path in self.paths)

    @property
    def rows(self) -> int:
        """Rows of a window: the root and the nodes."""
        return 1 + len(self.paths)

    @functools.cached_property
    def depth(self) -> int:
        """Depth of the deepest node: heads 2..depth+1 draft."""
        return max(map(len, self.paths))

    @functools.cached_property
    def ranks(self) -> int:
        """Most candidates of a head."""
        return 1 + max(map(max, self.paths))

    @property
    def is_chain(self) -> bool:
        """True if each head has one candidate."""
        return self.ranks == 1

    def rows_within(self, depth: int) -> int:
        """Return the rows of the shortest window that holds every node of at most this depth."""
        return max((row for row, path in enumerate(self.paths, start=1) if len(path) <= depth), default=0) + 1

    def within(self, rows: int, depth: int) -> int:
        """Return how many of the first `rows` rows are nodes of at most this depth."""
        return sum(len(path) <= depth for path in self.paths[: rows - 1])

    def chances(self, ranks: Sequence[Sequence[float]]) -> list[float]:
        """Return the probability of each node that its whole path is right.

        `ranks` holds the acceptance rates of the ranks of each depth where the path before is right; those that it
        lacks count as 0.
        """
        return [_product(path, ranks) for path in self.paths]

    def shares(self, true: Sequence[Sequence[int]]) -> list[float]:
        """Return the share of samples in which the whole path of each node was right; their sum is the mean accepted.

        Each sample holds the ranks of the right tokens, entry j-1 at depth j.
        """
        counts = Counter(tuple(ranks[:depth]) for ranks in true for depth in range(1, self.depth + 1))
        return [counts[path] / len(true) for path in self.paths]


def _product(path: Path, ranks: Sequence[Sequence[float]]) -> float:
    chance = 1.0
    for depth, rank in enumerate(path):
        chance *= ranks[depth][rank] if depth < len(ranks) and rank < len(ranks[depth]) else 0.0
    return chance


def grow(ranks: Sequence[Sequence[float]], nodes: int) -> DraftTree:
    """Return the tree with the most accepted drafts in expectation, best nodes first (Medusa, section 2.3.3).

    `ranks` holds acceptance rates: [j-1][r] is that of rank r at depth j where the path before is right. The tree has
    fewer than `nodes` if there are no more.

    A node's value is the product along its path; the expected number of accepted drafts is the sum of the values. Ranks
    are sorted, so no node has a higher value than its parent or its better sibling, and it is optimal to add the best
    node next to the tree again and again.
    """
    _check_size(nodes)
    sorted_ranks = [sorted(depth, reverse=True) for depth in ranks]
    if nodes < 1 or not sorted_ranks or not sorted_ranks[0]:
        raise UsageError(f"a draft tree of {nodes} nodes for {len(ranks)} drafting heads; both must be at least 1")
    frontier: list[tuple[float, int, Path]] = [(-sorted_ranks[0][0], 1, (0,))]
    paths: list[Path] = []
    while frontier and len(paths) < nodes:
        worth, depth, path = heapq.heappop(frontier)
        paths.append(path)
        siblings = sorted_ranks[depth - 1]
        if path[-1] + 1 < len(siblings):
            sibling = (*path[:-1], path[-1] + 1)
            heapq.heappush(frontier, (-_product(sibling, sorted_ranks), depth, sibling))
        if depth < len(sorted_ranks) and sorted_ranks[depth]:
            heapq.heappush(frontier, (worth * sorted_ranks[depth][0], depth + 1, (*path, 0)))
    return DraftTree(tuple(paths))


def _check_size(nodes: int) -> None:
    if nodes > MOST_NODES:
        raise UsageError(f"a draft tree of more than {MOST_NODES:,} nodes is too large; take fewer")


def parse_tree(given: int | str, heads: int, ranks: Sequence[Sequence[float]] = ()) -> DraftTree | None:
    """Return the tree that an argument names: a number of nodes (0: no tree), or nodes as for `DraftTree.parse`.

    `ranks` holds acceptance rates as for `grow`, if they were measured. Raises UsageError if there is no such tree for
    a model of so many `heads`.
    """
    if isinstance(given, str):
        if not re.fullmatch(r"-?[0-9]{1,12}", given):
            return DraftTree.parse(given)
        given = int(given)
    nodes = any_whole_number("tree", given)
    return grow(ranks or [TYPICAL] * (heads - 1), nodes) if nodes else None


class TreeRows:
    """The rows of a tree's window as tensors, made once and read by every pass: R rows, D its depth, C its ranks."""

    def __init__(self, tree: DraftTree, device: torch.device | str) -> None:
        self.tree, self.device = tree, device
        row_of = {path: row for row, path in enumerate(tree.paths, start=1)}
        row_of[()] = 0
        nodes: list[Path] = [(), *tree.paths]
        R, D, C = tree.rows, tree.depth, tree.ranks

        def tensor(values: object) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        self.depth_R = tensor([len(path) for path in nodes])
        self.parent_R = tensor([row_of[path[:-1]] for path in nodes])
        self.path_RD = tensor([[row_of[path[:j]] for j in range(D + 1)] for path in nodes])
        """(R, D + 1): the row at each depth on the path to a row; beyond its own depth the row itself."""
        self.children_RC = tensor([[row_of.get((*path, rank), 0) for rank in range(C)] for path in nodes])
        """(R, C): the row of the child of each rank; 0 without such a child."""
        self.sees_RR = torch.zeros(R, R, dtype=torch.bool, device=device)
        """(R, R) bool: row i sees row j if that is on its path."""
        self.sees_RR[torch.arange(R, device=device)[:, None], self.path_RD] = True
        self.candidate_G = tensor([(len(path) - 1) * C + path[-1] for path in tree.paths])
        """(R - 1,): the index of a node's token among candidates (D, C)."""
        self.parents = self.parent_R.tolist()
        self.children: list[list[int]] = [[] for _ in range(R)]
        for row in range(1, R):
            self.children[self.parents[row]].append(row)
        self.depth_first = sorted(range(R), key=lambda row: nodes[row])
        self._first: dict[int, TreeRows] = {R: self}

    @property
    def rows(self) -> int:
        """Rows of the window."""
        return self.tree.rows

    def first(self, rows: int) -> TreeRows:
        """Return the window of the first `rows` rows, at least 2."""
        if rows not in self._first:
            self._first[rows] = TreeRows(DraftTree(self.tree.paths[: rows - 1]), self.device)
        return self._first[rows]

    @functools.cached_property
    def compiled(self) -> cpu.Tree:
        """The tree in the form that compiled kernels take."""
        pointers = (self.depth_R.data_ptr(), self.path_RD.data_ptr())
        return cpu.Tree(*pointers, self.path_RD.shape[1])
