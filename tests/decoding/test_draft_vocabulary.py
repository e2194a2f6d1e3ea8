"""Heads that draft from a part of the vocabulary change how often drafts are right, and nothing of the output."""

from __future__ import annotations

import copy
import functools
import itertools
from dataclasses import replace

import pytest
import torch
from constrained import BYTES, CASES
from laws import chi_square, small_models
from shapes import HEADS, SHAPES, packed, trained

from headstart.decoding.constraints import Constraint
from headstart.decoding.drafters.tree import DraftTree, DynamicTree
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.generation import Generation
from headstart.decoding.kernels.blocks import BlockWeight, quantize_blocks, rows_of
from headstart.decoding.kernels.pack import pack
from headstart.decoding.sampling import position_noise
from headstart.decoding.settings import Penalties, Request, Rule, Sampling
from headstart.errors import UsageError
from headstart.model.transformer import Transformer
from tests.cases import each_value

PROMPT = tuple(b"the cat then")
TOKENS = sorted(b"then ca")
"""The draft vocabulary: the models write other letters too."""
SETTINGS = {"greedy": Sampling(), "sampled": Sampling(1.0, seed=11), "truncated": Sampling(1.3, 20, 0.9, 0.02, 5)}
WAYS = ["transformer-parallel", "replicated", "medusa", "medusa-own", "sequential", "eagle3"]
"""A shape of each way through drafting."""
CHAINED = ("sequential", "eagle3")
TREE = DraftTree.parse("0,1,0.0,0.1,1.0,2,0.0.0")


def narrowed(model: Transformer, tokens: list[int]) -> Transformer:
    """Return a copy of a model whose heads 2..n draft from `tokens`."""
    made = Transformer(replace(model.config, draft_vocab=len(tokens))).to(model.dtype)
    d2t, state = torch.tensor(tokens), model.state_dict()
    for name in state:
        if name.startswith("unembedding.weights.") and not name.endswith(".0"):
            state[name] = state[name][d2t]
    made.load_state_dict({**state, "unembedding.d2t": d2t})
    return made


@functools.cache
def narrow(shape: str, dtype: torch.dtype = torch.float64, compiled: bool = True) -> Transformer:
    return pack(narrowed(trained(shape), TOKENS).to(dtype), compiled=compiled)


def run(model: Transformer, request: Request, **options: object) -> Generation:
    return generate_all(Engine(model, EngineConfig(**options)), [request])[0]


def test_logits_outside_the_draft_vocabulary_are_minus_infinity_and_the_others_stay() -> None:
    tokens = torch.tensor([list(b"the cat that is a dog")])
    for shape in WAYS:
        whole, part = trained(shape), narrowed(trained(shape), TOKENS)
        for model in (part, pack(copy.deepcopy(part))):
            with torch.no_grad():
                mine, theirs = model(tokens, heads=HEADS), whole(tokens, heads=HEADS)
            outside = torch.ones(mine.shape[-1], dtype=torch.bool)
            outside[TOKENS] = False
            there = ~theirs[:, :, 1:].isnan().any(-1)
            drafted, expected = mine[:, :, 1:][there], theirs[:, :, 1:][there]
            assert bool((drafted[:, outside] == -torch.inf).all())
            assert torch.allclose(drafted[:, TOKENS], expected[:, TOKENS], atol=1e-4)
            assert torch.allclose(mine[:, :, 0], theirs[:, :, 0], atol=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_trees_that_grow_from_a_draft_vocabulary(name: str) -> None:
    model, request = narrow("eagle3", torch.float32), Request(PROMPT, 40, SETTINGS[name])
    plain = run(packed("eagle3", torch.float32), replace(request, heads=1))
    found = run(model, request, tree=DynamicTree(3, 3, 9))
    assert found.tokens == plain.tokens and found.stats.passes < 40
    reference, known = narrowed(trained("eagle3"), TOKENS), [*PROMPT, *plain.tokens[:8]]
    with torch.no_grad():
        scores = reference(torch.tensor([known]), heads=2)[0, -2, 1]
    if name == "sampled":
        scores = scores + position_noise(torch.tensor(11), torch.tensor(len(known)), len(scores))
    engine = Engine(model, EngineConfig(tree=DynamicTree(3, 1, 3)))
    generation = engine.submit(replace(request, prompt=tuple(known[:-1]), sampling=SETTINGS[name]))
    engine.step()
    if name != "truncated" and generation.tokens == known[-1:]:
        assert engine.state.windows.tokens_SW[0, 1:4].tolist() == scores.topk(3).indices.tolist()


@each_value({"shape": list(SHAPES), "name": list(SETTINGS)})
def test_every_number_of_heads_gives_plain_decoding(shape: str, name: str) -> None:
    request, model = Request(PROMPT, 40, SETTINGS[name]), narrow(shape)
    plain = run(packed(shape, torch.float64), replace(request, heads=1))
    for heads, exact in ((1, True), (2, False), (3, True), (HEADS, True), (HEADS, False)):
        found = run(model, replace(request, heads=heads), exact=exact)
        assert found.tokens == plain.tokens, (heads, exact)
    assert name == "truncated" or found.stats.passes < 40
    drafted = [token for token, origin in zip(found.tokens, found.origins) if origin > 1]
    assert set(drafted) <= set(TOKENS)
    assert name == "greedy" or not set(found.tokens) <= set(TOKENS)


KERNELS = {"fp32": (torch.float32, True), "bf16": (torch.bfloat16, True), "torch": (torch.float32, False)}


@each_value({"shape": WAYS, "dtype,compiled": KERNELS})
def test_in_kernels_too(shape: str, dtype: torch.dtype, compiled: bool) -> None:
    model = narrow(shape, dtype, compiled)
    for sampling in SETTINGS.values():
        plain, drafted = (run(model, Request(PROMPT, 40, sampling, heads)) for heads in (1, HEADS))
        assert drafted.tokens == plain.tokens


@each_value({"shape": WAYS, "seed": [None, 11]})
def test_drafts_are_the_best_tokens_of_the_vocabulary_with_the_noise_of_their_ids(shape: str, seed: int | None) -> None:
    """Counts accepted drafts of a loop without a cache, whose logits and noise are over the whole vocabulary."""
    reference, count = narrowed(trained(shape), TOKENS).double(), 40
    sampling = Sampling() if seed is None else Sampling(1.0, seed=seed)
    tokens = run(narrow(shape), Request(PROMPT, count + HEADS, sampling, 1)).tokens
    passes = done = 0
    while done < count:
        drafts: list[int] = []
        known = [*PROMPT, *tokens[:done]]
        for k in range(2, HEADS + 1) if done else ():
            read = [*known, *drafts] if reference.config.ahead else known[:-1]
            with torch.no_grad():
                scores = reference(torch.tensor([read]), heads=HEADS)[0, len(known) - 2, k - 1]
            if seed is not None:
                scores = scores + position_noise(torch.tensor(seed), torch.tensor(len(known) - 2 + k), len(scores))
            drafts.append(int(scores.argmax()))
        done += 1 + len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(drafts, tokens[done:]))))
        passes += 1
    assert run(narrow(shape), Request(PROMPT, count, sampling, HEADS)).stats.passes == passes < count


@each_value({"shape": [shape for shape in WAYS if shape not in CHAINED], "name": list(SETTINGS)})
def test_trees_give_plain_decoding(shape: str, name: str) -> None:
    request = Request(PROMPT, 40, SETTINGS[name])
    plain = run(narrow(shape), replace(request, heads=1))
    found = run(narrow(shape), request, tree=TREE)
    assert found.tokens == plain.tokens
    assert name == "truncated" or found.stats.passes < 40


def test_a_tree_has_no_more_ranks_than_the_draft_vocabulary_has_tokens() -> None:
    ranks = len(TOKENS) + 1
    with pytest.raises(UsageError, match=rf"{ranks} ranks; .* of {len(TOKENS)}: take a smaller one"):
        Engine(narrow("medusa"), EngineConfig(tree=DraftTree(tuple((rank,) for rank in range(ranks)))))


@each_value({"shape": WAYS, "case": list(CASES)})
def test_constraints_and_penalties_speak_of_all_tokens(shape: str, case: str) -> None:
    """The draft vocabulary may lack every token that a constraint allows."""
    penalties = Penalties(repetition=1.2, presence=0.1, frequency=0.2, bias=((ord("o"), 1.0),))
    for sampling, constrained in itertools.product(SETTINGS.values(), (True, False)):
        request = Request(PROMPT, 20, sampling, 1, penalties=penalties, constraint=CASES[case] if constrained else None)
        plain = _run_bytes(narrow(shape), request)
        assert _run_bytes(narrow(shape), replace(request, heads=HEADS)) == plain
        if shape not in CHAINED:
            assert _run_bytes(narrow(shape), replace(request, heads=HEADS), tree=TREE) == plain


def test_a_rule_that_weighs_drafts_gets_none_where_the_draft_vocabulary_has_no_allowed_token() -> None:
    constraint = Constraint.regex("[dogis.]{20}")
    for seed, tree in itertools.product(range(4), (None, TREE)):
        sampling = Sampling(1.0, seed=seed)
        request = Request(PROMPT, 20, sampling, acceptance=Rule("rejection"), constraint=constraint)
        assert set(_run_bytes(narrow("medusa"), request, tree=tree)) <= set(b"dogis.")
        state = Engine(narrow("medusa"), EngineConfig(tree=tree), tokenizer=BYTES)
        generate_all(state, [request])
        assert bool(state.state.windows.q_SKV.isfinite().all())


def _run_bytes(model: Transformer, request: Request, **options: object) -> list[int]:
    return generate_all(Engine(model, EngineConfig(**options), tokenizer=BYTES), [request])[0].tokens


def test_a_batch_of_everything_gives_what_each_request_gives_alone() -> None:
    model = narrow("transformer-parallel")
    rules = [Rule(), Rule("rejection"), Rule("block")]
    requests = [
        Request(PROMPT[i % 4 :], 20 + i, Sampling(i % 3 * 0.6, seed=i), 1 + i % HEADS, acceptance=rules[i % 2])
        for i in range(6)
    ]
    requests.append(Request(PROMPT, 20, penalties=Penalties(presence=0.5)))
    alone = [run(model, request).tokens for request in requests]
    together = generate_all(Engine(model, EngineConfig(slots=3)), requests)
    assert [generation.tokens for generation in together] == alone
    repeated = Request(PROMPT * 4, 30)
    assert run(model, repeated, lookup=3).tokens == run(model, repeated).tokens


@pytest.mark.parametrize("tree", [None, "0,1,0.0,1.0"])
@pytest.mark.parametrize("kind", ["rejection", "block"])
def test_rules_that_weigh_drafts_keep_the_law_of_the_model(kind: str, tree: str | None) -> None:
    if tree and kind == "block":
        pytest.skip("block verification is for chains")
    raw, _ = small_models()
    part = narrowed(raw, [0, 2])
    config = EngineConfig(slots=128, tree=None if tree is None else DraftTree.parse(tree))
    assert chi_square(pack(copy.deepcopy(part)), raw, Rule(kind), Sampling(1.3), 512, config) < 1.8


def test_rows_of_a_matrix_in_blocks_are_those_of_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 64, generator=generator)
    blocks = (quantize_blocks(weight[:25], "q4"), quantize_blocks(weight[25:], "q8"))
    rows = torch.tensor([0, 3, 24, 25, 39])
    for chosen in (rows, rows[:3], rows[3:]):
        found = rows_of(blocks, chosen)
        assert isinstance(found, tuple)
        whole = torch.cat([part.dequantize() for part in blocks])
        assert all(isinstance(part, BlockWeight) for part in found)
        assert torch.equal(torch.cat([part.dequantize() for part in found]), whole[chosen])
    assert torch.equal(rows_of(weight, rows), weight[rows])


@pytest.mark.parametrize("quantize", ["q4", "q8"])
def test_quantized_heads_read_the_rows_of_the_quantized_unembedding(quantize: str) -> None:
    both = trained("medusa"), narrowed(trained("medusa"), TOKENS)
    whole, part = (pack(copy.deepcopy(model), quantize=quantize) for model in both)
    tokens = torch.tensor([list(b"the cat that is a dog")])
    mine, theirs = part(tokens, heads=HEADS), whole(tokens, heads=HEADS)
    assert torch.equal(mine[..., TOKENS], theirs[..., TOKENS])
    plain, drafted = (run(part, Request(PROMPT, 40, Sampling(), heads)) for heads in (1, HEADS))
    assert drafted.tokens == plain.tokens
