"""Trees grown step by step by one module: the nodes of a slow reference, and the output of plain decoding."""

from __future__ import annotations

import copy

import pytest
import torch
from policies import RandomRows
from shapes import HEADS, VOCABULARY, fill, packed, trained
from test_tree_lossless import AXES, PROMPT, SETTINGS, noted

from headstart.data.tokenizers import ByteTokenizer
from headstart.decoding.cache import KVCache
from headstart.decoding.constraints import Constraint
from headstart.decoding.drafters.tree import DraftTree, DynamicTree, parse_tree
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.kernels import cpu
from headstart.decoding.kernels.pack import pack
from headstart.decoding.sampling import position_noise
from headstart.decoding.settings import Penalties, Request, Rule, Sampling
from headstart.decoding.state import DecodingState
from headstart.errors import UsageError
from headstart.model.transformer import Transformer
from tests.cases import pairwise

STEPS = ["eagle3", "sequential-normed-own"]
each_shape = pytest.mark.parametrize("shape", STEPS)
TREE, WIDE = DynamicTree(3, 3, 9), DynamicTree(4, 2, 7)


def plain_tokens(model: Transformer, request: Request, **options: object) -> list[int]:
    alone = Request(request.prompt, request.max_new_tokens, request.sampling, 1)
    return generate_all(Engine(model, EngineConfig(**options)), [alone])[0].tokens


@pairwise({"shape": STEPS, **AXES})
def test_every_tree_gives_plain_decoding(shape: str, dtype: torch.dtype, compiled: bool, name: str) -> None:
    model, length = packed(shape, dtype, compiled), 24
    expected = plain_tokens(model, Request(PROMPT, length, SETTINGS[name]))
    for tree, heads in ((TREE, 1), (TREE, 2), (TREE, HEADS), (WIDE, 3)):
        request = Request(PROMPT, length, SETTINGS[name], heads)
        got = generate_all(Engine(model, EngineConfig(tree=tree)), [request])[0]
        assert got.tokens == expected and (got.stats.passes == length) == (heads == 1), (tree, heads)
        assert got.stats.siblings > 0 or heads == 1


@each_shape
def test_a_tree_keeps_drafts_that_a_chain_would_lose(shape: str) -> None:
    model = packed(shape, torch.float32)
    requests = [Request(PROMPT[i:], 80, Sampling(1.0, seed=i)) for i in range(4)]
    chains, trees = (generate_all(Engine(model, EngineConfig(tree=tree)), requests) for tree in (None, TREE))
    assert [g.tokens for g in chains] == [g.tokens for g in trees]
    assert sum(g.stats.passes for g in trees) < 0.97 * sum(g.stats.passes for g in chains)


@each_shape
@pytest.mark.parametrize(("compiled", "exact"), [(True, True), (False, True), (False, False)])
def test_any_batch_mix_gives_what_each_request_gives_alone(shape: str, compiled: bool, exact: bool) -> None:
    model = packed(shape, torch.float32 if exact else torch.float64, compiled)
    rules = [Rule(), Rule("rejection"), Rule()]
    requests = [
        Request(
            PROMPT[i % 4 : 5 + i], 20 + 7 * i % 30, Sampling(i % 3 * 0.6, top_k=i % 2 * 9, seed=i), 1 + i % HEADS,
            acceptance=rules[i % 3],
        )
        for i in range(7)
    ]  # fmt: skip
    engine = Engine(model, EngineConfig(slots=3, exact=exact, tree=TREE))
    got = generate_all(engine, requests)
    # Rejection accepts what matching does: the drafts are no draws.
    assert [g.tokens for g in got] == [plain_tokens(model, request, exact=exact) for request in requests]
    again = generate_all(engine, [Request(PROMPT + tuple(got[0].tokens), 30)] * 2)  # a cached prefix
    assert again[0].tokens == again[1].tokens == plain_tokens(model, again[0].request, exact=exact)


def reference_tree(model: Transformer, known: list[int], tree: DynamicTree, seed: int | None) -> dict[tuple, int]:
    """Grow a tree path by path (EAGLE-2, sections 4.1 and 4.2): the nodes of the likeliest paths, with their rows.

    `known` ends with the root, and the probabilities after a path come from one forward run over `known` and the path.
    """

    def children(path: tuple[int, ...], value: float) -> dict[tuple[int, ...], float]:
        k = len(path) + 2
        with torch.no_grad():
            scores = model(torch.tensor([[*known, *path]]), heads=HEADS)[0, len(known) - 2, k - 1]
        if seed is not None:
            position = torch.tensor(len(known) + len(path))
            scores = scores + position_noise(torch.tensor(seed), position, VOCABULARY)
        logs, best = scores.log_softmax(-1).topk(tree.width)
        return {(*path, int(token)): value + float(log) for token, log in zip(best, logs)}

    found = layer = children((), 0.0)
    for _ in range(tree.depth - 1):
        expanded = sorted(layer, key=layer.__getitem__, reverse=True)[: tree.width]
        layer = {}
        for path in expanded:
            layer |= children(path, found[path])
        found = found | layer
    return {path: row for row, path in enumerate(sorted(found, key=found.__getitem__, reverse=True)[: tree.nodes], 1)}


@each_shape
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("compiled", [True, False])
def test_the_nodes_are_those_of_the_likeliest_paths(
    shape: str, temperature: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = copy.deepcopy(trained(shape)).double()
    model = packed(shape, torch.float32 if compiled else torch.float64, compiled)
    engine = Engine(model, EngineConfig(slots=2, tree=TREE))
    other = engine.submit(Request(PROMPT[3:], 200))
    generation = engine.submit(Request(PROMPT, 200, Sampling(temperature, seed=5)))
    branched = 0
    for _ in range(10):
        engine.step()
        for slot, one in enumerate((other, generation)):
            known = [*one.request.prompt, *one.tokens]
            windows, seed = engine.state.windows, 5 if temperature and slot else None
            tokens = windows.tokens_SW[slot, : TREE.rows].tolist()
            parents = windows.branches(slot, TREE).parents
            paths: dict[int, tuple[int, ...]] = {0: ()}
            for row in range(1, TREE.rows):
                paths[row] = (*paths[parents[row]], tokens[row])
            assert tokens[0] == known[-1]
            assert set(paths.values()) - {()} == set(reference_tree(reference, known, TREE, seed))
            assert [len(paths[row]) for row in range(TREE.rows)] == windows.depth_SW[slot, : TREE.rows].tolist()
            branched += any(parent > 1 for parent in parents)
    assert branched > 3


@each_shape
@pytest.mark.parametrize(
    ("dtype", "compiled"), [(torch.float64, False), (torch.float32, True)], ids=["torch", "kernels"]
)
def test_caches_after_compaction_equal_a_fresh_prefill(
    shape: str, dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, bound = packed(shape, dtype, compiled), 1e-11 if dtype == torch.float64 else 1e-4

    def far() -> float:
        engine = Engine(model, EngineConfig(slots=2, tree=TREE))
        generations = [
            engine.submit(Request(PROMPT, 200, SETTINGS["sampled"])),
            engine.submit(Request(PROMPT[:5], 200)),
        ]
        for _ in range(25):
            engine.step()
        differences = []
        for slot, generation in enumerate(generations):
            committed = torch.tensor([*generation.request.prompt, *generation.tokens])
            length = int(engine.state.length_S[slot])
            assert length == len(committed) - 1
            fresh = DecodingState.empty(model, 1, engine.state.cache.capacity)
            fill(model, fresh, 0, committed[:-1], HEADS, root=committed[-1:])
            for got, want in (
                (engine.state.cache.keys_of(slot), fresh.cache.keys_of(0)),
                (engine.state.cache.values[:, slot], fresh.cache.values[:, 0]),
            ):
                differences.append(float((got - want)[:, :, :length].abs().max()))
        return max(differences)

    paths = noted(monkeypatch)
    assert far() < bound and any(path != list(range(len(path))) for path in paths)
    monkeypatch.setattr(KVCache, "compact", lambda *_: None)
    assert far() > 1e-2


@each_shape
def test_the_walk_in_c_is_the_walk_in_torch(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests = packed(shape, torch.float32), [Request(PROMPT[i:], 60, heads=2 + i) for i in range(3)]
    compiled = generate_all(Engine(model, EngineConfig(slots=2, tree=TREE)), requests)
    monkeypatch.setattr(cpu, "chooser", lambda: None)
    plain = generate_all(Engine(model, EngineConfig(slots=2, tree=TREE)), requests)
    for a, b in zip(compiled, plain):
        assert (a.tokens, a.stats.passes, a.stats.accepted) == (b.tokens, b.stats.passes, b.stats.accepted)


@each_shape
def test_penalties_and_logprobs_follow_the_path(shape: str) -> None:
    model = packed(shape, torch.float32)
    penalties = Penalties(repetition=1.3, presence=0.4, frequency=0.3, bias=((101, 1.0),))
    for sampling in SETTINGS.values():
        plain, fast = (
            generate_all(
                Engine(model, EngineConfig(tree=TREE)),
                [Request(PROMPT, 60, sampling, heads, penalties=penalties, logprobs=2)],
            )[0]
            for heads in (1, HEADS)
        )
        assert fast.tokens == plain.tokens and fast.stats.passes < 60
        assert fast.logprobs == pytest.approx(plain.logprobs)


@each_shape
@pytest.mark.parametrize("rule", ["match", "rejection"])
def test_constraints_hold_along_every_branch(shape: str, rule: str) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    model = packed(shape, torch.float32)
    words = Constraint.regex(r"((the|that|then) (cat|dog|[a-z]{1,5})[ .]){8}")
    for sampling in (Sampling(), Sampling(0.8, seed=3)):
        plain, fast = (
            generate_all(
                Engine(model, EngineConfig(slots=2, tree=TREE), tokenizer=ByteTokenizer()),
                [Request(PROMPT, 50, sampling, heads, constraint=words, acceptance=Rule(rule)), Request(PROMPT, 60)],
            )[0]
            for heads in (1, HEADS)
        )
        assert fast.tokens == plain.tokens and fast.stats.passes < plain.stats.passes


@each_shape
@pytest.mark.parametrize("quantize", ["q8", "q4"])
def test_quantized_trunks_are_decoded_alike(shape: str, quantize: str) -> None:
    model = pack(copy.deepcopy(trained(shape)), quantize=quantize)
    for sampling in SETTINGS.values():
        request = Request(PROMPT, 40, sampling)
        got = generate_all(Engine(model, EngineConfig(tree=TREE)), [request])[0]
        assert got.tokens == plain_tokens(model, request) and got.stats.passes < 40


@each_shape
def test_output_does_not_depend_on_how_many_rows_are_fed(shape: str) -> None:
    class Pruning(RandomRows):
        def use_tree(self, tree: DynamicTree) -> bool:
            self.tree = tree
            return True

        def chances(self, sampled, worths):
            # Sorted by the confidence of their paths, so that the first rows are a tree.
            assert worths == sorted(worths, reverse=True) and (not worths or 0 < worths[0] <= 1)
            return [0.5] * len(worths)

        def observe(self, *_):
            pass

    model, policy = packed(shape, torch.float32), Pruning(1)
    requests = [Request(PROMPT, 50), Request(PROMPT[:5], 50, Sampling(1.0, seed=3)), Request(PROMPT, 30, heads=3)]
    got = generate_all(Engine(model, EngineConfig(slots=3, tree=TREE), policy=policy), requests)
    assert [g.tokens for g in got] == [plain_tokens(model, request) for request in requests]
    assert len(policy.chosen) >= 3 and policy.tree is TREE


@each_shape
def test_rules_that_know_no_trees_get_chains(shape: str) -> None:
    model = packed(shape, torch.float64)
    requests = [
        Request(PROMPT, 80, Sampling(1.0, seed=3)),
        Request(PROMPT, 20, Sampling(1.0, seed=4), acceptance=Rule("block")),
        Request(PROMPT[2:], 40),
    ]
    together = generate_all(Engine(model, EngineConfig(slots=2, tree=TREE, exact=False)), requests)
    for i in (0, 2):
        assert together[i].tokens == plain_tokens(model, requests[i], exact=False)
    assert together[0].stats.siblings > 0 and together[1].stats.siblings == 0


def test_names_of_trees() -> None:
    assert parse_tree("3x2:8", 4) == DynamicTree(3, 2, 8) and str(DynamicTree(3, 2, 8)) == "3x2:8"
    assert parse_tree(0, 4, dynamic=True) is None and parse_tree("16", 4, dynamic=True) == DynamicTree(5, 3, 16)
    assert parse_tree(1, 4, dynamic=True).nodes == 1 and parse_tree(60, 3, dynamic=True).depth == 2
    for wrong, message in (
        ("1x3:3", "width of 2"), ("3x0:1", "depth of 1"), ("3x3:2", "take 3 to 21"), ("2x2:9", "take 2 to 6"),
        ("99999x3:5", "too large"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            parse_tree(wrong, 4)


def test_heads_that_draft_otherwise_refuse_a_tree() -> None:
    for shape, tree, message in (
        ("sequential", TREE, "draft one chain"),
        ("replicated", TREE, "draft at once; take a number"),
        ("eagle3", DraftTree.parse("0,1"), "from the drafts before; take sizes"),
        ("eagle3", DynamicTree(2, 4, 5), "draft 3 tokens ahead"),
        ("eagle3", DynamicTree(VOCABULARY + 1, 1, 5), "of 128"),
    ):
        with pytest.raises(UsageError, match=message):
            Engine(packed(shape, torch.float32), EngineConfig(tree=tree))
