"""Lossy rules on draft trees: Medusa's decoding against a loop of its own, and the paths that each rule keeps."""

from __future__ import annotations

import math

import pytest
import torch
from shapes import HEADS, packed, trained

from headstart.decoding.drafters.tree import DraftTree, TreeRows
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.settings import Request, Rule, Sampling
from headstart.decoding.verify import lossy_row
from headstart.model.transformer import Transformer

PROMPT = tuple(b"the cat then")
TREE = DraftTree.parse("0,1,0.0,0.1,1.0,2,0.0.0,1.0.0")


def next_law(model: Transformer, tokens: list[int], temperature: float) -> torch.Tensor:
    return (model(torch.tensor([tokens]))[0, -1] / temperature).softmax(-1)


@torch.no_grad()
def medusa(model: Transformer, count: int, temperature: float, epsilon: float, delta: float) -> tuple[list[int], int]:
    """Return tokens and passes of Medusa's decoding (arXiv 2401.10774, sections 2.1.2 and 2.3.1), without any cache.

    The root is greedy, the candidates are the best of each head, and the longest path of typical tokens is accepted.
    """
    tokens = [*PROMPT, int(next_law(model, list(PROMPT), 1.0).argmax())]
    passes = 1
    while len(tokens) < len(PROMPT) + count:
        heads_KV = model(torch.tensor([tokens[:-1]]), heads=HEADS)[0, -1]
        best: tuple[int, float, list[int]] = (0, 0.0, [])
        kept: dict[tuple[int, ...], tuple[float, list[int]]] = {(): (0.0, [])}
        for path in TREE.paths:
            if path[:-1] not in kept:
                continue
            likelihood, before = kept[path[:-1]]
            token = int(heads_KV[len(path)].topk(TREE.ranks).indices[path[-1]])
            p_V = next_law(model, [*tokens, *before], temperature)
            entropy = -sum(float(p) * math.log(float(p)) for p in p_V if p > 0)
            if p_V[token] > min(epsilon, delta * math.exp(-entropy)):
                kept[path] = likelihood + math.log(float(p_V[token])), [*before, token]
                best = max(best, (len(path), *kept[path]))
        tokens += best[2]
        tokens.append(int(next_law(model, tokens, 1.0).argmax()))
        passes += 1
    return tokens[len(PROMPT) :][:count], passes


@pytest.mark.parametrize("numbers", [(0.09, 0.3), (0.02, 0.15), (0.5, 1.0)])
@pytest.mark.parametrize("shape", ["transformer-parallel", "medusa"])
def test_typical_acceptance_is_medusas(shape: str, numbers: tuple[float, float]) -> None:
    model, rule = packed(shape, torch.float32), Rule("lossy-typical", numbers)
    expected, passes = medusa(trained(shape), 40, 0.7, *numbers)
    for seed in (0, 1):  # nothing is drawn
        request = Request(PROMPT, 40, Sampling(0.7, seed=seed), acceptance=rule)
        got = generate_all(Engine(model, EngineConfig(tree=TREE)), [request])[0]
        assert got.tokens == expected and abs(got.stats.passes - passes) <= 1


def test_cold_typical_acceptance_is_greedy() -> None:
    model = packed("replicated", torch.float32)
    plain = generate_all(Engine(model), [Request(PROMPT, 40, heads=1)])[0].tokens
    for temperature in (0.0, 1e-4):
        request = Request(PROMPT, 40, Sampling(temperature), acceptance=Rule("lossy-typical"))
        got = generate_all(Engine(model, EngineConfig(tree=TREE)), [request])[0]
        assert got.tokens == plain and got.stats.passes < 40


def rows_kept(text: str, p_RV: torch.Tensor, window: list[int], tokens: list[int], drafted: int = 2) -> int:
    rows = TreeRows(DraftTree.parse("0,1,0.0,1.0"), "cpu")
    window_R, tokens_R = torch.tensor(window), torch.tensor(tokens)
    return int(lossy_row(Rule.parse(text), p_RV, window_R, tokens_R, torch.tensor(drafted), rows, 0))


def test_the_longest_path_is_kept_and_the_likeliest_of_several() -> None:
    p_RV = torch.tensor([[0.5, 0.4, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [0.4, 0.3, 0.3], [0.4, 0.3, 0.3]])
    window, tokens = [9, 0, 1, 1, 2], [0, 0, 2, 0, 0]  # nodes: 0, 1, 1 after 0, 2 after 1
    assert rows_kept("lossy-top-k:2", p_RV, window, tokens) == 4  # 0.4 x 0.8 is above 0.5 x 0.3
    assert rows_kept("lossy-top-k:1", p_RV, window, tokens) == 1  # neither the second best nor what follows it
    assert rows_kept("lossy-top-k:2", p_RV, window, tokens, drafted=1) == 1
    assert rows_kept("lossy-distance:1", p_RV, window, tokens) == 4
    assert rows_kept("lossy-distance:0", p_RV, window, tokens) == 1
    assert rows_kept("lossy-minimum:1", p_RV, window, tokens) == 1  # like match
    assert rows_kept("lossy-minimum:3", p_RV, window, tokens) == 4
    assert rows_kept("lossy-typical:0.9:9", p_RV, window, tokens) == 0


def test_rules_side_by_side_on_trees_do_not_change_one_another() -> None:
    model = packed("transformer-parallel", torch.float32)
    kinds = ["match", "rejection", "lossy-typical", "lossy-top-k:2", "match"]
    requests = [
        Request(PROMPT, 40, Sampling(0.9 * (i < 4), seed=i), acceptance=Rule.parse(text))
        for i, text in enumerate(kinds)
    ]
    together = generate_all(Engine(model, EngineConfig(slots=3, tree=TREE)), requests)
    for i, request in enumerate(requests):
        alone = generate_all(Engine(model, EngineConfig(tree=TREE)), [request])[0]
        assert together[i].tokens == alone.tokens and together[i].stats.accepted == alone.stats.accepted
    for i in (0, 4):
        plain = generate_all(Engine(model), [Request(PROMPT, 40, requests[i].sampling, heads=1)])[0]
        assert together[i].tokens == plain.tokens
