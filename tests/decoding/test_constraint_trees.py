"""Draft trees under constraints: every node is masked by the state along its path, and the text is that of constrained
plain decoding."""

from __future__ import annotations

import pytest
import torch
from constrained import BYTES, CASES, LAW, PROMPT, bpe, distance, model_of, one, reference
from laws import small_models
from policies import RandomRows
from shapes import HEADS, packed

from headstart.decoding.constraints import Constraint, ConstraintRows, compiled
from headstart.decoding.drafters import constrained
from headstart.decoding.drafters.tree import DraftTree, TreeRows
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.generation import FORCED
from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.settings import Penalties, Request, Rule, Sampling
from headstart.errors import UsageError

TREE = DraftTree.parse("0,1,0.0,0.1,1.0,2,0.0.0,1.0.0,0.1.0,0.0.1")
SHALLOW = DraftTree.parse("0,1,0.0,2,0.1,1.0,1.1")  # of a model with three heads
SMALL = DraftTree.parse("0,1,0.0,1.0,0.1")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("tokenizer", "sampling"),
    [(BYTES, Sampling()), (BYTES, Sampling(1.4, 9, 0.9, seed=2)), ("bpe", Sampling(1.0, seed=1))],
    ids=["greedy", "cut", "bpe"],
)
def test_with_trees_it_is_constrained_plain_decoding(name: str, tokenizer, sampling: Sampling) -> None:
    tokenizer = bpe() if tokenizer == "bpe" else tokenizer
    raw, model = model_of(tokenizer)
    prompt = PROMPT if tokenizer is BYTES else tuple(tokenizer.encode("the cat then"))
    chain = one(Engine(model, tokenizer=tokenizer), prompt, 28, sampling, constraint=CASES[name])
    if not sampling.top_k and name in ("schema", "lark"):
        expected = reference(raw, tokenizer, CASES[name], prompt, 28, sampling.temperature, sampling.seed)
        assert (chain.tokens, chain.finish_reason) == expected
    for heads in (1, 2, model.config.heads):
        engine = Engine(model, EngineConfig(tree=TREE if tokenizer is BYTES else SHALLOW), tokenizer=tokenizer)
        got = one(engine, prompt, 28, sampling, heads, constraint=CASES[name])
        assert (got.tokens, got.finish_reason, got.text) == (chain.tokens, chain.finish_reason, chain.text), heads
        assert got.stats.siblings > 0 or heads < model.config.heads or name in ("choice", "endless")
        if heads == 1:
            assert got.stats.forced == 0 and got.stats.rows_per_pass == 1


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_in_a_batch_constrained_and_free_texts_both_have_trees(compiled: bool, exact: bool) -> None:
    class Pruning(RandomRows):
        def use_tree(self, tree: DraftTree) -> bool:
            self.tree = tree
            return True

        def chances(self, sampled, confidences):
            return [0.5] * len(TREE.paths) if confidences else []

        def observe(self, *_):
            pass

    model = packed("transformer-parallel", torch.float32, compiled)
    requests = [
        Request(PROMPT, 32, Sampling(0.8 * (i % 3 > 0), seed=i, top_k=5 * (i % 3 > 1)), constraint=constraint)
        for i, constraint in enumerate([CASES["schema"], None, CASES["endless"], CASES["words"], None, CASES["choice"]])
    ]
    plain = [
        one(
            Engine(model, EngineConfig(exact=exact), tokenizer=BYTES),
            r.prompt,
            32,
            r.sampling,
            1,
            constraint=r.constraint,
        ).tokens
        for r in requests
    ]
    for policy in [None, Pruning(3)] if exact is False or backend_of(model).row_exact else [None]:
        engine = Engine(model, EngineConfig(slots=3, exact=exact, tree=TREE), tokenizer=BYTES, policy=policy)
        together = generate_all(engine, requests)
        assert [g.tokens for g in together] == plain
        assert policy or [g.stats.siblings > 0 for g in together[:5]] == [True] * 5
        assert not engine.state.constraints.any(slice(0, 3)) and not engine.state.constraints.forbidden_SWV.any()


@pytest.mark.parametrize("exact", [True, False])
def test_beside_rules_that_know_no_trees_windows_are_chains(exact: bool) -> None:
    model = packed("transformer-parallel", torch.float32, compiled=exact)
    if exact and not backend_of(model).row_exact:
        pytest.skip("no compiled kernels here: exact decoding refuses")
    block = Request(PROMPT, 12, Sampling(0.8, seed=9), acceptance=Rule("block"), constraint=CASES["words"])
    requests = [Request(PROMPT, 50, Sampling(0.8, seed=i), constraint=CASES["words"]) for i in range(3)]
    chains = Engine(model, EngineConfig(exact=exact), tokenizer=BYTES)
    plain = [one(chains, PROMPT, 50, r.sampling, 1, constraint=r.constraint).tokens for r in requests]
    engine = Engine(model, EngineConfig(slots=2, exact=exact, tree=TREE), tokenizer=BYTES)
    *matched, blocked = generate_all(engine, [requests[0], requests[1], requests[2], block])
    assert [g.tokens for g in matched] == plain and matched[0].stats.siblings > 0 and blocked.stats.siblings == 0
    # It also begins while another one has a tree.
    fixed = Engine(packed("transformer-parallel", torch.float32, False), EngineConfig(tree=TREE), tokenizer=BYTES)
    with pytest.raises(UsageError, match="acceptance block knows no draft trees"):
        fixed.submit(block)
    assert generate_all(fixed, [requests[0]])[0].finish_reason


@pytest.mark.parametrize("kind", ["match", "rejection"])
@pytest.mark.parametrize("name", ["endless", "schema"])
def test_nodes_hold_what_may_come_after_their_paths_and_others_never_fit(kind: str, name: str) -> None:
    engine = Engine(packed("transformer-parallel", torch.float32), EngineConfig(tree=TREE), tokenizer=BYTES)
    rows, constraint = TreeRows(TREE, "cpu"), CASES[name]
    generation = engine.submit(Request(PROMPT, 80, Sampling(1.0), acceptance=Rule(kind), constraint=constraint))
    nodes = missing = 0
    while not generation.finished:
        engine.step()
        if generation.finished:
            break
        window, drafted = engine.state.windows.tokens_SW[0].tolist(), int(engine.state.windows.drafted_S[0])
        assert window[0] == generation.tokens[-1] and drafted == len(generation.window.drafters)
        held = generation.window.depths or {}
        for row in range(1, TREE.rows):
            way = [window[i] for i in rows.path_SRD[0, row, 1 : int(rows.depth_SR[0, row]) + 1].tolist()]
            matcher = compiled(constraint, BYTES, 128)
            assert all(matcher.push(token) for token in generation.tokens)
            fits = all(matcher.push(token) for token in way)
            assert fits == (row in held) or len(way) > drafted
            if fits and not matcher.ended:
                forbidden = engine.state.constraints.rows(0)[row]
                assert (forbidden == ~matcher.allowed()).all()
            siblings = [window[other] for other in rows.branches.children[rows.branches.parents[row]] if other in held]
            assert len(set(siblings)) == len(siblings)
            nodes, missing = nodes + (row in held), missing + (row not in held)
    assert nodes > 40 and missing > 10 and sum(generation.stats.accepted) > 0


def test_what_is_forced_is_drafted_and_kept_and_counted_where_only_some_paths_are() -> None:
    text = "exactly this text, and no other"
    model = packed("transformer-parallel", torch.float32)
    for kind in ("match", "rejection"):
        engine = Engine(model, EngineConfig(tree=TREE), tokenizer=BYTES)
        got = one(engine, PROMPT, 60, Sampling(1.0), acceptance=Rule(kind), constraint=Constraint.choice([text]))
        assert got.text == text and got.stats.passes == -(-len(text) // HEADS) and got.stats.siblings == 0
        assert got.stats.forced == got.origins.count(FORCED) == len(text) - (got.stats.passes - 1)
    # After a draft of the first head some paths leave no choice, others do.
    constraint = Constraint.regex("((ab|c[a-z]|dog|[e-z]) ?)*")
    got = one(
        Engine(model, EngineConfig(tree=TREE), tokenizer=BYTES),
        PROMPT,
        200,
        Sampling(1.5, seed=4),
        constraint=constraint,
    )
    after = [got.tokens[i - 1 : i + 1] for i, origin in enumerate(got.origins) if origin == FORCED]
    assert after and all(bytes(pair) in (b"ab", b"do", b"og") for pair in after)
    heads = {origin for origin in got.origins if origin > 1}
    assert heads == {2, 3, 4}
    assert [got.origins.count(k) for k in (2, 3, 4)] == got.stats.accepted
    assert len(got.origins) == len(got.tokens)


def test_a_request_for_fewer_heads_has_forced_drafts_deeper_where_all_others_can_be_told_wrong() -> None:
    model = packed("transformer-parallel", torch.float64)
    constraint = Constraint.regex("(then a dog and more[\x00-\x7f]{3})*")
    for heads in (2, 3):
        plain, got = (
            one(
                Engine(model, EngineConfig(tree=tree), tokenizer=BYTES),
                PROMPT,
                80,
                Sampling(1.2, seed=3),
                k,
                constraint=constraint,
            )
            for k, tree in ((1, None), (heads, TREE))
        )
        assert got.tokens == plain.tokens and got.stats.forced > 20


def test_penalties_and_logprobs_go_with_it() -> None:
    _, model = model_of(BYTES)
    penalties = Penalties(repetition=1.2, frequency=0.3, bias=((ord("d"), 2.0),))
    for temperature in (0.0, 0.9):
        settings = {"penalties": penalties, "constraint": CASES["endless"], "logprobs": 1}
        plain, got = (
            one(
                Engine(model, EngineConfig(tree=TREE), tokenizer=BYTES),
                PROMPT,
                60,
                Sampling(temperature, seed=5),
                k,
                **settings,
            )
            for k in (1, HEADS)
        )
        assert got.tokens == plain.tokens and got.logprobs == pytest.approx(plain.logprobs)


@pytest.mark.parametrize("top_k", [0, 2])
def test_rejection_on_trees_follows_the_law_of_the_masked_model(top_k: int) -> None:
    raw, model = small_models()
    assert distance("rejection", raw, model, LAW, top_k=top_k, tree=SMALL) < 2


@pytest.mark.slow
def test_wrong_ways_do_not_follow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: siblings weighed by what their head says without the mask; masks of another row."""
    raw, model = small_models()
    drawn = constrained.draw_masked

    def unmasked(state, slots, head, at, forbidden, count, row):
        found = drawn(state, slots, head, at, forbidden, count, row)
        logits = state.constraints.kept(slots.start, head)[None, None]
        state.windows.q_SKV[slots, row] = state.sampling.probabilities(logits, slots)[:, 0]
        return found

    with monkeypatch.context() as patch:
        patch.setattr(constrained, "draw_masked", unmasked)
        assert distance("rejection", raw, model, LAW, tree=SMALL) > 2.5
    apply = ConstraintRows.apply

    def of_its_parent(self, logits, slots):
        before = self.forbidden_SWV.clone()
        parents = TreeRows(SMALL, "cpu").branches.parents
        for row in range(1, min(logits.shape[1], SMALL.rows)):
            self.forbidden_SWV[:, row] = before[:, parents[row]]
        result = apply(self, logits, slots)
        self.forbidden_SWV.copy_(before)
        return result

    monkeypatch.setattr(ConstraintRows, "apply", of_its_parent)
    with pytest.raises(AssertionError):
        distance("match", raw, model, LAW, 64, 64, tree=SMALL)
