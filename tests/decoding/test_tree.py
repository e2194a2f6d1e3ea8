"""Draft trees as such: what is one, which are best, and that only known ones are taken."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from shapes import HEADS, packed

from headstart.decoding.drafters.tree import DraftTree, TreeRows, grow
from headstart.decoding.engine import Engine, EngineConfig
from headstart.decoding.settings import Request, Rule
from headstart.errors import UsageError

BUSHY = "0,1,0.0,0.1,1.0,2,0.0.0,1.0.0,0.1.0"


def test_a_tree_is_what_its_text_says() -> None:
    tree = DraftTree.parse(BUSHY)
    assert str(tree) == BUSHY and DraftTree.parse(str(tree)) == tree
    assert (tree.rows, tree.depth, tree.ranks, tree.is_chain) == (10, 3, 3, False)
    assert tree.rows_within(0) == 1 and tree.rows_within(1) == 7 and tree.rows_within(3) == 10
    assert tree.within(10, 1) == 3 and tree.within(4, 2) == 3 and tree.within(1, 3) == 0
    assert DraftTree.parse("0,0.0,0.0.0").is_chain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "write its nodes as ranks"),
        ("0,x", "write its nodes as ranks"),
        ("0,0", "node 0 is there twice"),
        ("1,0", "node 1 needs 0 before it"),
        ("0,1.0", "node 1.0 needs 1 before it"),
        ("0,0.1,0.0", "node 0.1 needs 0.0 before it"),
        ("0,-1", "'-1' is not a node"),
    ],
)
def test_trees_that_there_are_not(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DraftTree.parse(text)


def test_every_beginning_of_a_tree_is_a_tree_and_its_rows_know_one_another() -> None:
    whole = TreeRows(DraftTree.parse(BUSHY), "cpu")
    for count in range(2, whole.rows + 1):
        rows = whole.first(count)
        paths = [(), *rows.tree.paths]
        assert rows is whole.first(count) and rows.rows == count
        for i, path in enumerate(paths):
            depth = len(path)
            assert rows.depth_SR[0, i] == depth and paths[rows.parent_SR[0, i]] == path[:-1]
            assert [paths[j] for j in rows.path_SRD[0, i, : depth + 1]] == [path[:j] for j in range(depth + 1)]
            assert (rows.path_SRD[0, i, depth:] == i).all()
            assert [j for j in range(count) if rows.sees_SRT[0, i, j]] == rows.path_SRD[0, i, : depth + 1].tolist()
            children = {(*path, r): j for r, j in enumerate(rows.children_RC[i].tolist()) if j}
            assert children == {p: j for j, p in enumerate(paths) if p and p[:-1] == path}


def trees_of(nodes: int, depth: int, ranks: int) -> list[DraftTree]:
    """All of them, whatever their order."""
    every = [path for d in range(1, depth + 1) for path in itertools.product(range(ranks), repeat=d)]
    found = []
    for paths in itertools.combinations(every, nodes):
        try:
            found.append(DraftTree(tuple(sorted(paths, key=lambda path: (len(path), path)))))
        except UsageError:
            continue
    return found


@pytest.mark.parametrize("seed", range(4))
def test_grown_trees_are_the_best_of_their_size(seed: int) -> None:
    rng = random.Random(seed)
    ranks = [sorted((rng.random() ** 2 / 3 for _ in range(3)), reverse=True) for _ in range(2)]
    for nodes in range(1, 7):
        grown = grow(ranks, nodes)
        best = max(sum(tree.chances(ranks)) for tree in trees_of(nodes, 2, 3))
        assert len(grown.paths) == nodes
        assert sum(grown.chances(ranks)) == pytest.approx(best)
        assert grown.chances(ranks) == sorted(grown.chances(ranks), reverse=True)  # every beginning is the best too
    assert len(grow(ranks, 99).paths) == 3 + 9  # no more than there are


def test_shares_are_counted() -> None:
    tree = DraftTree.parse("0,1,0.0,1.0")
    assert tree.shares([(0, 0), (0, 5), (1, 0), (7, 0)]) == [0.5, 0.25, 0.25, 0.25]


def test_impossible_trees_are_refused_before_anything_runs() -> None:
    model = packed("replicated", torch.float32, False)
    with pytest.raises(UsageError, match="depth 4 and 1 ranks; 4 heads draft 3 tokens"):
        Engine(model, EngineConfig(tree=DraftTree.parse("0,0.0,0.0.0,0.0.0.0")))
    with pytest.raises(UsageError, match="200 ranks"):
        Engine(model, EngineConfig(tree=DraftTree(tuple((rank,) for rank in range(200)))))
    with pytest.raises(UsageError, match="not both"):
        Engine(model, EngineConfig(tree=DraftTree.parse("0,1"), lookup=2))
    with pytest.raises(UsageError, match="at least 1"):
        grow([[0.5]], 0)
    engine = Engine(model, EngineConfig(tree=DraftTree.parse("0,1")))
    assert engine.fixed_shapes and engine.width == HEADS
    with pytest.raises(UsageError, match="acceptance block knows no draft trees"):
        engine.submit(Request((1, 2), acceptance=Rule("block")))
    assert not engine.busy
