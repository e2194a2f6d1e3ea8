"""Recursive rejection on trees has the target's law: by enumeration of every draw, and by drawing."""

from __future__ import annotations

import itertools

import pytest
import torch
from laws import chi_square, small_models

from headstart.decoding import verify as verify_module
from headstart.decoding.drafters.tree import DraftTree, TreeRows
from headstart.decoding.engine import EngineConfig
from headstart.decoding.settings import Rule, Sampling
from headstart.decoding.verify import recursive_rejection

V = 3
TREES = ("0,1", "0,1,2", "0,1,0.0,1.0", "0,1,0.0,0.1,1.0", "0,0.0,0.1,1,1.0,2")


def enumerated(text: str, seed: int, drafted: int, monkeypatch: pytest.MonkeyPatch, exclude: bool = False) -> float:
    """Return how far the joint law of depth + 1 tokens is from the target's.

    One pass runs with the rule; tokens that it does not decide are drawn from the target. Every list of candidates and
    every outcome of the draws is played through, all in one batch.
    """
    rows = TreeRows(DraftTree.parse(text), "cpu")
    D, C = rows.tree.depth, rows.tree.ranks
    generator = torch.Generator().manual_seed(seed)

    def law(count: int) -> torch.Tensor:
        x = torch.rand(count, V, generator=generator, dtype=torch.float64).pow(2) + 1e-3
        return x / x.sum(-1, keepdim=True)

    target = {p: law(1)[0] for length in range(D + 1) for p in itertools.product(range(V), repeat=length)}
    q = law(D)
    if exclude:  # a head may exclude a token: then it can run out of candidates
        q[0, 1] = 0
        q /= q.sum(-1, keepdim=True)

    def chance_of(drawn: tuple[int, ...], depth: int) -> float:
        """Return the probability of a list drawn without replacement; once nothing is left, any token counts."""
        chance, left = 1.0, q[depth].clone()
        for token in drawn:
            if left.sum() > 0:
                chance *= float(left[token] / left.sum())
            elif token != min(set(range(V)) - set(drawn[: drawn.index(token)])):
                return 0.0
            left[token] = 0
        return chance

    lists = list(itertools.permutations(range(V), C))
    cases = []
    for drawn in itertools.product(lists, repeat=D):
        chance = 1.0
        for depth, one in enumerate(drawn):
            chance *= chance_of(one, depth)
        if chance:
            cases.append((drawn, chance))
    nodes = [(), *rows.tree.paths]
    windows = [tuple(tuple(drawn[d][r] for d, r in enumerate(path)) for path in nodes) for drawn, _ in cases]
    played = [chance for _, chance in cases]
    return error_of(rows, windows, played, target, q.expand(len(cases), -1, -1), None, drafted, monkeypatch)


def error_of(
    rows: TreeRows,
    windows: list[tuple[tuple[int, ...], ...]],
    chances: list[float],
    target: dict[tuple[int, ...], torch.Tensor],
    q_SQV: torch.Tensor,
    by_row_S: torch.Tensor | None,
    drafted: int,
    monkeypatch: pytest.MonkeyPatch,
) -> float:
    """Return the law of windows, given as the path of each row, that are drawn with those chances."""
    D, C = rows.tree.depth, rows.tree.ranks
    outcomes = list(itertools.product((True, False), repeat=D * C))
    S, count = len(windows), len(outcomes)
    window = torch.tensor([[0, *(path[-1] for path in case[1:])] for case in windows]).repeat_interleave(count, 0)
    p = torch.stack([torch.stack([target[path] for path in case]) for case in windows]).repeat_interleave(count, 0)
    outcome = torch.tensor(outcomes).repeat(S, 1)
    weight = torch.tensor(chances, dtype=torch.float64).repeat_interleave(count)
    by_row = None if by_row_S is None else by_row_S.repeat_interleave(count)
    original, asked = verify_module.chain_probabilities, iter(outcome.T)

    def noted(*arguments: torch.Tensor) -> torch.Tensor:
        nonlocal weight
        kept = original(*arguments)
        weight = weight * torch.where(next(asked), kept[:, 0], 1 - kept[:, 0])
        return kept

    with monkeypatch.context() as patch:
        patch.setattr(verify_module, "chain_probabilities", noted)
        draws = torch.where(outcome, -1.0, 2.0).view(-1, D, C).double()
        row, rest = recursive_rejection(
            p,
            q_SQV.repeat_interleave(count, 0),
            rows,
            window,
            torch.full((S * count,), drafted),
            draws,
            by_row,
        )
    assert int(rows.depth_SR[0, row].max()) == min(drafted, D)
    joint = dict.fromkeys(itertools.product(range(V), repeat=D + 1), 0.0)
    # Cases that came out alike are one.
    ends: dict[tuple[int, ...], float] = {}
    for i, (last, chance, after) in enumerate(zip(row.tolist(), weight.tolist(), rest)):
        if not chance:  # what is left of nothing is nothing
            continue
        for token, share in enumerate((after / after.sum()).tolist()):
            start = (*windows[i // count][last], token)
            ends[start] = ends.get(start, 0.0) + chance * share
    for start, chance in ends.items():
        for tail in itertools.product(range(V), repeat=D + 1 - len(start)):
            whole = start + tail
            joint[whole] += chance * _probability(target, whole, len(start))
    assert sum(joint.values()) == pytest.approx(1)
    return max(abs(chance - _probability(target, whole, 0)) for whole, chance in joint.items())


def constrained(text: str, seed: int, monkeypatch: pytest.MonkeyPatch, masked: bool = True) -> float:
    """The same where a constraint decides along every path what may come: the target is masked, and siblings are drawn
    from their head's distribution under the mask of their parent; where one token is allowed, it is the first of them,
    and what is left holds a token that is forbidden there, as in `drafters/constrained.py`. `masked`: the rule knows
    each family's distribution, not that without masks."""
    rows = TreeRows(DraftTree.parse(text), "cpu")
    D = rows.tree.depth
    generator = torch.Generator().manual_seed(seed)
    allowed = {
        path: torch.rand(V, generator=generator) < 0.6
        for length in range(D + 1)
        for path in itertools.product(range(V), repeat=length)
    }
    heads = torch.rand(D, V, generator=generator, dtype=torch.float64).pow(2) + 1e-3

    def masked_law(x: torch.Tensor, path: tuple[int, ...]) -> torch.Tensor:
        x = torch.where(allowed[path], x, 0.0) if allowed[path].any() else x
        return x / x.sum()

    target = {p: masked_law(torch.rand(V, generator=generator, dtype=torch.float64) + 1e-3, p) for p in allowed}
    windows: list[tuple[tuple[int, ...], ...]] = []
    laws, chances = [], []

    def draw(row: int, window: dict[int, tuple[int, ...]], law: dict[int, torch.Tensor], chance: float) -> None:
        """Rows up to here have their paths; draws the children of `row` in every way."""
        if row == rows.rows:
            windows.append(tuple(window[r] for r in range(row)))
            chances.append(chance)
            laws.append(torch.stack([law.get(r, torch.zeros(V, dtype=torch.float64)) for r in range(row)]))
            return
        children, path = rows.branches.children[row], window[row]
        if not children:
            draw(row + 1, window, law, chance)
            return
        q = masked_law(heads[len(path)], path)
        stray = int((q == 0).to(torch.int64).argmax())
        for drawn in itertools.permutations(range(V), min(len(children), int((q > 0).sum()))):
            left, share = q.clone(), 1.0
            for token in drawn:
                share *= float(left[token] / left.sum()) if left[token] else 0.0
                left[token] = 0
            if share:
                tokens = (*drawn, *[stray] * (len(children) - len(drawn)))
                more = {child: (*path, token) for child, token in zip(children, tokens)}
                draw(row + 1, window | more, law | {row: q if masked else heads[len(path)]}, chance * share)

    draw(0, {0: ()}, {}, 1.0)
    by_row = torch.ones(len(windows), dtype=torch.bool)
    return error_of(rows, windows, chances, target, torch.stack(laws), by_row, D, monkeypatch)


def _probability(target: dict[tuple[int, ...], torch.Tensor], tokens: tuple[int, ...], start: int) -> float:
    result = 1.0
    for i in range(start, len(tokens)):
        result *= float(target[tokens[:i]][tokens[i]])
    return result


@pytest.mark.parametrize("text", TREES)
def test_recursive_rejection_has_the_targets_joint_distribution(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        for drafted in range(DraftTree.parse(text).depth + 1):
            assert enumerated(text, seed, drafted, monkeypatch) < 1e-12
        assert enumerated(text, seed, 9, monkeypatch, exclude=True) < 1e-12


@pytest.mark.parametrize("text", TREES)
def test_wrong_rules_fail_the_enumeration(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    depth = DraftTree.parse(text).depth
    # Each sibling tested against what the first was: as if they had been drawn with replacement.
    with monkeypatch.context() as wrong:
        wrong.setattr(verify_module, "without", lambda q, token: q)
        assert max(enumerated(text, seed, depth, wrong) for seed in range(4)) > 1e-3
    # Each sibling tested against the whole target.
    with monkeypatch.context() as wrong:
        wrong.setattr(verify_module, "residual", lambda p, q, weight, whole: p)
        assert enumerated(text, 0, depth, wrong) > 1e-3


@pytest.mark.parametrize("text", TREES)
def test_under_a_constraint_it_has_the_masked_targets_joint_distribution(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(6):
        assert constrained(text, seed, monkeypatch) < 1e-12
    # Negative control: weighed by distributions that know nothing of the masks.
    assert max(constrained(text, seed, monkeypatch, masked=False) for seed in range(6)) > 1e-3


def test_texts_drawn_with_it_follow_the_models_law(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, model = small_models()
    config = EngineConfig(slots=128, tree=DraftTree.parse("0,1,0.0,1.0,0.1"))
    # Two of three tokens: heads run out of candidates. Without top-k: `test_windows_law.py`.
    assert chi_square(model, raw, Rule("rejection"), Sampling(1.0, 2), 512, config) < 1.8
    monkeypatch.setattr(verify_module, "residual", lambda p, q, weight, whole: p)
    assert chi_square(model, raw, Rule("rejection"), Sampling(1.0), config=config) > 3
