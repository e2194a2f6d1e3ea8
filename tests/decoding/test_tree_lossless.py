"""Draft trees give the output of plain decoding, token for token, and leave the caches of a chain."""

from __future__ import annotations

import copy

import pytest
import torch
from policies import RandomRows
from shapes import CORE, HEADS, SHAPES, fill, packed, trained, untrained
from torch import Tensor

from headstart.decoding.cache import KVCache
from headstart.decoding.drafters.tree import DraftTree, RowPaths, grow
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.generation import Generation
from headstart.decoding.kernels import cpu
from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.sampling import position_noise
from headstart.decoding.settings import Penalties, Request, Rule, Sampling
from headstart.decoding.state import DecodingState
from headstart.model.transformer import Transformer
from tests.cases import each_value, pairwise

PROMPT = tuple(b"the cat then")
SETTINGS = {
    "greedy": Sampling(),
    "sampled": Sampling(1.0, seed=11),
    "truncated": Sampling(1.3, top_k=20, top_p=0.9, min_p=0.02, seed=5),
}
TREES = {
    "bushy": DraftTree.parse("0,1,0.0,0.1,1.0,2,0.0.0,1.0.0,0.1.0"),
    "flat": DraftTree.parse("0,1,2,3"),
    "grown": grow([[0.5, 0.2, 0.1, 0.05]] * (HEADS - 1), 14),
}


TREE_SHAPES = [name for name in SHAPES if not name.startswith(("sequential", "eagle")) and not name.endswith("-own")]


@pytest.fixture(params=TREE_SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    """Those that draft trees: sequential heads draft a chain."""
    return str(request.param)


def run(model: Transformer, request: Request, tree: DraftTree | None, **options: object) -> Generation:
    return generate_all(Engine(model, EngineConfig(tree=tree, **options)), [request])[0]


AXES = {
    "dtype,compiled": {
        "fp32": (torch.float32, True),
        "fp32-onednn": (torch.float32, False),
        "bf16": (torch.bfloat16, True),
        "fp64": (torch.float64, False),
    },
    "name": ["greedy", "truncated"],
}


@pairwise({"shape": [shape for shape in TREE_SHAPES if shape in CORE], **AXES})
def test_every_tree_and_number_of_heads_gives_plain_decoding(
    shape: str, dtype: torch.dtype, compiled: bool, name: str
) -> None:
    """To the last bit of what is cached on the way to head 1."""
    trees_give_plain_decoding(shape, dtype, compiled, name)


@each_value({"shape": [shape for shape in TREE_SHAPES if shape not in CORE], **AXES})
def test_heads_that_go_the_way_of_others_do_too(shape: str, dtype: torch.dtype, compiled: bool, name: str) -> None:
    trees_give_plain_decoding(shape, dtype, compiled, name)


def trees_give_plain_decoding(shape: str, dtype: torch.dtype, compiled: bool, name: str) -> None:
    model = packed(shape, dtype, compiled)
    config = model.config
    on_path = list(range(config.trunk_layers))
    if config.head_kind == "transformer":
        on_path += [config.trunk_layers + k - 1 for k in model.path(1)]
    length = 24
    # Crosses a block of attention. So far behind what it was trained on a small model seldom drafts anything right, so
    # the prompt ends where a chain does: a test in which no draft is kept would prove nothing.
    ends = ((PROMPT * 50)[:size] for size in range(500, 485, -1))
    prompt = next(p for p in ends if run(model, Request(p, length, SETTINGS[name]), None).stats.passes < length)
    end = len(prompt) + length - 1 - HEADS
    results: dict[str, tuple[list[int], Tensor, Tensor]] = {}
    cases = [("chain", HEADS), ("flat", 1), ("flat", HEADS), ("bushy", 1), ("bushy", HEADS), ("grown", 2)]
    for tree, heads in cases:
        engine = Engine(model, EngineConfig(tree=TREES.get(tree)))
        got = generate_all(engine, [Request(prompt, length, SETTINGS[name], heads)])[0]
        assert len(got.tokens) == length and (heads == 1) == (got.stats.passes == length), (tree, heads)
        cache = engine.state.cache
        kept = (got.tokens, cache.keys_of(0)[on_path, :, :end].clone(), cache.values[on_path, 0, :, :end].clone())
        # Where shapes are fixed a tree has its own, as it has its own plain decoding; tokens are the same all the same.
        first = results.setdefault(tree if engine.fixed_shapes else "any", kept)
        assert kept[0] == first[0] == next(iter(results.values()))[0], (tree, heads)
        if dtype != torch.float64:  # for which no product is exact row by row
            assert torch.equal(kept[1], first[1]) and torch.equal(kept[2], first[2]), (tree, heads)


@pytest.mark.parametrize("compiled", [True, False])
def test_any_batch_mix_gives_what_each_request_gives_alone(compiled: bool) -> None:
    model = packed("transformer-causal", torch.float32, compiled)
    requests = [
        Request(PROMPT[i % 4 : 5 + i], 20 + 7 * i % 30, Sampling(i % 3 * 0.6, top_k=i % 2 * 9, seed=i), 1 + i % HEADS)
        for i in range(7)
    ]
    plain = [generate_all(Engine(model), [Request(r.prompt, r.max_new_tokens, r.sampling, 1)])[0] for r in requests]
    for slots, exact in ((3, True), (2, False)):
        got = generate_all(Engine(model, EngineConfig(slots=slots, exact=exact, tree=TREES["bushy"])), requests)
        assert [g.tokens for g in got] == [g.tokens for g in plain]


def noted(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The paths that `compact` is asked to move, as they come."""
    paths: list[list[int]] = []
    original = KVCache.compact

    def compact(self: KVCache, slots: slice, start_S: Tensor, row_S: Tensor, tree: RowPaths) -> None:
        depths = tree.depth_of(row_S).tolist()
        paths.extend(path[: depth + 1] for path, depth in zip(tree.path_to(row_S).tolist(), depths))
        original(self, slots, start_S, row_S, tree)

    monkeypatch.setattr(KVCache, "compact", compact)
    return paths


def steps(model: Transformer, tree: DraftTree, count: int) -> tuple[Engine, list[Generation]]:
    engine = Engine(model, EngineConfig(slots=2, tree=tree))
    sampled = Sampling(1.0, seed=11)
    generations = [engine.submit(Request(PROMPT, 200, sampled)), engine.submit(Request(PROMPT[:5], 200))]
    for _ in range(count):
        engine.step()
    return engine, generations


def far_from_fresh(model: Transformer, engine: Engine, generations: list[Generation]) -> float:
    """The largest difference of the caches from those of a prefill with what was committed."""
    differences = []
    for slot, generation in enumerate(generations):
        length = int(engine.state.length_S[slot])
        committed = list(generation.request.prompt) + generation.tokens
        assert length == len(committed) - 1
        fresh = DecodingState.empty(model, 1, engine.state.cache.capacity)
        fill(model, fresh, 0, torch.tensor(committed[:-1]), HEADS, chunk=7)
        keys = engine.state.cache.keys_of(slot) - fresh.cache.keys_of(0)
        values = engine.state.cache.values[:, slot] - fresh.cache.values[:, 0]
        differences += [float(x[:, :, :length].abs().max()) for x in (keys, values)]
    return max(differences)


@pytest.mark.parametrize(
    ("dtype", "compiled"), [(torch.float64, False), (torch.float32, True)], ids=["torch", "kernels"]
)
def test_caches_after_compaction_equal_a_fresh_prefill(
    shape: str, dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed(shape, dtype, compiled)
    bound = 1e-11 if dtype == torch.float64 else 1e-4
    paths = noted(monkeypatch)
    assert far_from_fresh(model, *steps(model, TREES["bushy"], 25)) < bound
    # Branches other than the first were taken, or nothing had to move.
    assert any(path != list(range(len(path))) for path in paths)
    # The negative control: without moving, caches hold what was rejected.
    monkeypatch.setattr(KVCache, "compact", lambda *_: None)
    assert far_from_fresh(model, *steps(model, TREES["bushy"], 25)) > 1e-2


def test_accepted_branches_are_of_any_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree accepts drafts that a chain would have lost."""
    model, tree = packed("replicated", torch.float32, made=untrained), TREES["bushy"]
    paths = noted(monkeypatch)
    wide = run(model, Request(PROMPT, 200, SETTINGS["sampled"]), tree)
    narrow = run(model, Request(PROMPT, 200, SETTINGS["sampled"]), None)
    ranks = {rank for path in paths for row in path[1:] for rank in tree.paths[row - 1]}
    assert ranks == {0, 1, 2} and wide.tokens == narrow.tokens and wide.stats.passes < narrow.stats.passes
    # The head of each depth is reported.
    assert [wide.origins.count(k) <= count for k, count in enumerate(wide.stats.accepted, start=2)] == [True] * 3
    # A pass ends with a token of head 1, unless the limit cut the last one after a draft.
    cut = wide.origins[-1] != 1
    assert wide.origins.count(1) == wide.stats.passes - cut and set(wide.origins) == {1, 2, 3, 4}
    passes = wide.stats.passes
    assert wide.stats.drafted == [passes - 1] * 3 and wide.stats.siblings == (passes - 1) * (len(tree.paths) - 3)
    assert wide.stats.rows_per_pass == pytest.approx(1 + len(tree.paths) * (passes - 1) / passes)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nodes_are_the_best_candidates_of_their_heads_with_the_noise_of_their_position(
    shape: str, temperature: float
) -> None:
    reference = copy.deepcopy(trained(shape)).double()
    tree = TREES["bushy"]
    engine = Engine(packed(shape, torch.float64), EngineConfig(tree=tree))
    generation = engine.submit(Request(PROMPT, 200, Sampling(temperature, seed=5)))
    for _ in range(8):
        engine.step()
        length = int(engine.state.length_S[0])
        committed = [*PROMPT, *generation.tokens]
        window = engine.state.windows.tokens_SW[0].tolist()
        assert window[0] == committed[length] and len(committed) == length + 1
        with torch.no_grad():
            logits = reference(torch.tensor([committed[:length]]), heads=HEADS)[0, -1]
        for row, path in enumerate(tree.paths, start=1):
            scores = logits[len(path)]
            if temperature:
                scores = scores + position_noise(torch.tensor(5), torch.tensor(length + len(path)), len(scores))
            assert window[row] == int(scores.argsort(descending=True)[path[-1]]), path


@pytest.mark.parametrize("name", ["greedy", "sampled"])
def test_a_tree_of_width_one_is_a_chain(shape: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, request = packed(shape, torch.float32), Request(PROMPT, 60, SETTINGS[name])
    chain = run(model, request, None)
    line = DraftTree.parse("0,0.0,0.0.0")
    assert (
        Engine(model, EngineConfig(tree=line)).tree is None
        and run(model, request, line).stats.accepted == chain.stats.accepted
    )
    short = run(model, request, DraftTree.parse("0,0.0"))
    assert short.tokens == chain.tokens and len(short.stats.drafted) == 2
    # And what trees do comes to the same for it.
    monkeypatch.setattr(DraftTree, "is_chain", False)
    as_tree = run(model, request, line)
    assert as_tree.tokens == chain.tokens
    assert (as_tree.stats.passes, as_tree.stats.accepted) == (chain.stats.passes, chain.stats.accepted)


def test_the_walk_in_c_is_the_walk_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests = packed("replicated", torch.float64), [Request(PROMPT[i:], 60, heads=2 + i) for i in range(3)]
    compiled = generate_all(Engine(model, EngineConfig(slots=2, tree=TREES["grown"])), requests)
    monkeypatch.setattr(cpu, "chooser", lambda: None)
    plain = generate_all(Engine(model, EngineConfig(slots=2, tree=TREES["grown"])), requests)
    for a, b in zip(compiled, plain):
        assert (a.tokens, a.stats.passes, a.stats.accepted) == (b.tokens, b.stats.passes, b.stats.accepted)


@pytest.mark.parametrize("compiled", [True, False])
def test_output_does_not_depend_on_how_many_nodes_are_fed(compiled: bool) -> None:
    class Pruning(RandomRows):
        def use_tree(self, tree: DraftTree) -> bool:
            self.tree = tree
            return True

        def chances(self, sampled, confidences):
            return [0.5] * len(self.tree.paths) if confidences else []

        def observe(self, *_):
            pass

    model = packed("transformer-parallel", torch.float32, compiled)
    requests = [Request(PROMPT, 50), Request(PROMPT[:5], 50, Sampling(1.0, seed=3)), Request(PROMPT, 30, heads=3)]
    plain = [generate_all(Engine(model), [Request(r.prompt, r.max_new_tokens, r.sampling, 1)])[0] for r in requests]
    policy = Pruning(1)
    got = generate_all(
        Engine(model, EngineConfig(slots=3, exact=backend_of(model).row_exact, tree=TREES["bushy"]), policy=policy),
        requests,
    )
    assert [g.tokens for g in got] == [g.tokens for g in plain]
    assert len(policy.chosen) >= 3 and policy.tree is TREES["bushy"]


def test_penalties_and_logprobs_follow_the_path() -> None:
    model = packed("replicated", torch.float64)
    penalties = Penalties(repetition=1.3, presence=0.4, frequency=0.3, bias=((101, 1.0),))
    for sampling in SETTINGS.values():
        plain, fast = (
            run(model, Request(PROMPT, 60, sampling, heads, penalties=penalties, logprobs=2), TREES["grown"])
            for heads in (1, HEADS)
        )
        assert fast.tokens == plain.tokens and fast.stats.passes < 60
        assert fast.logprobs == pytest.approx(plain.logprobs)
        assert [[t for t, _ in best] for best in fast.top_logprobs] == [
            [t for t, _ in best] for best in plain.top_logprobs
        ]


def test_beside_rules_that_know_no_trees_windows_are_chains() -> None:
    model = packed("replicated", torch.float64)  # so that other windows are the same up to a rounding, on every machine
    requests = [
        Request(PROMPT, 80, Sampling(1.0, seed=3)),
        Request(PROMPT, 20, Sampling(1.0, seed=4), acceptance=Rule("block")),
        Request(PROMPT[2:], 40),
    ]
    together = generate_all(Engine(model, EngineConfig(slots=2, tree=TREES["bushy"], exact=False)), requests)
    for i in (0, 2):
        assert together[i].tokens == run(model, requests[i], None).tokens
    assert together[0].stats.siblings > 0  # once it was alone with one that matches
    assert together[1].stats.siblings == 0
