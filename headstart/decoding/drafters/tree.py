"""Draft trees: several candidates of each head in one window, verified together (Medusa, 2401.10774, section 2.1.2).

A node at depth j is a candidate of head j+1: its best, its second best, ... Parallel heads are independent given the
past, so the candidates of a depth are the same under every parent, and a tree is a set of paths of ranks: 0.1 is the
second best of head 3 after the best of head 2. The acceptance rate of each rank is known before anything is drafted, so
the tree is static (`DraftTree`).

Heads that are steps of one module read the drafts before, so each node has candidates of its own, and their confidences
decide in every pass which nodes are worth a row (`DynamicTree`; EAGLE-2, 2406.16858).
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
            raise UsageError(
                f"draft tree {shown!r}: write its nodes as ranks, such as 0,1,0.0,0.1, or sizes, such as 4x3:8"
            ) from error

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

    def cut(self, nodes: int) -> DraftTree:
        """Return the tree of the first nodes."""
        return DraftTree(self.paths[:nodes])

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


def parse_tree(
    given: int | str, heads: int, ranks: Sequence[Sequence[float]] = (), dynamic: bool = False
) -> DraftTree | DynamicTree | None:
    """Return the tree that an argument names.

    It is a number of nodes (0: no tree), the sizes of a dynamic tree as WIDTHxDEPTH:NODES, or nodes as for
    `DraftTree.parse`. A number gives a static tree by the acceptance rates `ranks`, as for `grow`, if they were
    measured, and where heads draft step by step (`dynamic`) a dynamic one. Raises UsageError if there is no such tree
    for a model of so many `heads`.
    """
    if isinstance(given, str):
        if sizes := re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6}):([0-9]{1,6})", given):
            return DynamicTree(*map(int, sizes.groups()))
        if not re.fullmatch(r"-?[0-9]{1,12}", given):
            return DraftTree.parse(given)
        given = int(given)
    nodes = any_whole_number("tree", given)
    if not nodes:
        return None
    return DynamicTree.of_size(nodes, heads) if dynamic else grow(ranks or [TYPICAL] * (heads - 1), nodes)


@dataclass(frozen=True)
class DynamicTree:
    """The sizes of trees that are grown anew for each window, from the confidences of the drafts (EAGLE-2)."""

    width: int
    """Candidates of each node, and nodes of each depth whose candidates are computed: those of the likeliest paths."""
    depth: int
    """Depth of the deepest nodes: heads 2..depth+1 draft."""
    nodes: int
    """Nodes of a window: of all candidates those of the likeliest paths."""

    def __post_init__(self) -> None:
        if self.width < 2 or self.depth < 1:
            raise UsageError(f"draft tree {self}: needs a width of 2 or more and a depth of 1 or more; 0 is for chains")
        _check_size(self.candidates(self.depth))
        if not self.depth <= self.nodes <= self.candidates(self.depth):
            raise UsageError(
                f"draft tree {self}: has {self.nodes} of {self.candidates(self.depth)} candidates as nodes; take "
                f"{self.depth} to {self.candidates(self.depth)}"
            )

    @classmethod
    def of_size(cls, nodes: int, heads: int) -> DynamicTree:
        """Return the tree of a number of nodes for a model of so many `heads`."""
        depth = max(1, min(heads - 1, nodes))
        width = min(8, max(2, nodes // depth))
        return cls(width, depth, nodes)

    def __str__(self) -> str:
        return f"{self.width}x{self.depth}:{self.nodes}"

    def candidates(self, depth: int) -> int:
        """Return the number of candidates up to a depth."""
        return self.width + (depth - 1) * self.width**2

    @property
    def rows(self) -> int:
        """Rows of a window: the root and the nodes."""
        return 1 + self.nodes

    @property
    def drafted_rows(self) -> int:
        """Rows that the module computes to draft a window, after the first step."""
        return (self.depth - 1) * self.width

    @property
    def ranks(self) -> int:
        """Most candidates of a node."""
        return self.width

    @property
    def is_chain(self) -> bool:
        """False: each node has two candidates or more."""
        return False

    def rows_within(self, depth: int) -> int:
        """Return the rows of a window whose drafts go down to this depth."""
        return 1 + min(self.nodes, self.candidates(depth)) if depth else 1

    def cut(self, nodes: int) -> DynamicTree:
        """Return the tree of so many nodes: those of the likeliest paths, which are the first rows."""
        return DynamicTree(self.width, min(self.depth, nodes), nodes)


class Branches:
    """The parents and the children of a tree's rows, on the host."""

    def __init__(self, parents: Sequence[int]) -> None:
        self.parents = parents
        self.children: list[list[int]] = [[] for _ in parents]
        for row in range(1, len(parents)):
            self.children[parents[row]].append(row)


class RowPaths:
    """The places of rows in trees, as tensors: R rows of S trees, D their depth; S is 1 where all slots have one tree.

    Where a tree is computed in several runs, `first` of its rows are in the caches, and R are those that follow.
    """

    def __init__(self, depth_SR: Tensor, path_SRD: Tensor, first: int = 0) -> None:
        self.depth_SR, self.path_SRD, self.first_row = depth_SR, path_SRD, first
        """depth_SR (S, R); path_SRD (S, R, D + 1): the row at each depth on the path to a row; beyond its own depth the
        row itself."""

    @functools.cached_property
    def parent_SR(self) -> Tensor:
        """(S, R): the row before each row on its path; the root's is itself."""
        return self.path_SRD.gather(2, (self.depth_SR - 1).clamp_min(0)[..., None])[..., 0]

    @functools.cached_property
    def sees_SRT(self) -> Tensor:
        """(S, R, T) bool: row i sees row j of all T rows if that is on its path."""
        S, R = self.depth_SR.shape
        empty = torch.zeros(S, R, self.first_row + R, dtype=torch.bool, device=self.depth_SR.device)
        return empty.scatter_(2, self.path_SRD, True)

    def path_to(self, row_S: Tensor) -> Tensor:
        """Return the paths (S, D + 1) to one row of each slot."""
        paths = self.path_SRD.expand(len(row_S), -1, -1)
        return paths.gather(1, row_S[:, None, None].expand(-1, 1, paths.shape[2]))[:, 0]

    def depth_of(self, row_S: Tensor) -> Tensor:
        """Return the depth (S,) of one row of each slot."""
        return self.depth_SR.expand(len(row_S), -1).gather(1, row_S[:, None])[:, 0]

    @property
    def stride(self) -> int:
        """Rows of each slot where each has a tree of its own, else 0: the form that compiled kernels take."""
        return self.depth_SR.shape[1] if len(self.depth_SR) > 1 else 0

    @functools.cached_property
    def compiled(self) -> cpu.Tree:
        """The trees in the form that compiled kernels take."""
        pointers = (self.depth_SR.data_ptr(), self.path_SRD.data_ptr())
        return cpu.Tree(*pointers, self.path_SRD.shape[2], self.stride, self.first_row)


class TreeRows(RowPaths):
    """The rows of a static tree's window, made once and read by every pass: R rows, D its depth, C its ranks."""

    def __init__(self, tree: DraftTree, device: torch.device | str) -> None:
        self.tree, self.device = tree, device
        row_of = {path: row for row, path in enumerate(tree.paths, start=1)}
        row_of[()] = 0
        nodes: list[Path] = [(), *tree.paths]
        R, D, C = tree.rows, tree.depth, tree.ranks

        def tensor(values: object) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        depth_R = tensor([len(path) for path in nodes])
        super().__init__(depth_R[None], tensor([[row_of[path[:j]] for j in range(D + 1)] for path in nodes])[None])
        self.children_RC = tensor([[row_of.get((*path, rank), 0) for rank in range(C)] for path in nodes])
        """(R, C): the row of the child of each rank; 0 without such a child."""
        self.candidate_G = tensor([(len(path) - 1) * C + path[-1] for path in tree.paths])
        """(R - 1,): the index of a node's token among candidates (D, C)."""
        self.branches = Branches([row_of[path[:-1]] for path in nodes])
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
