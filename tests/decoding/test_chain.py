"""Heads that draft one after another where a prompt comes in pieces: drafts are those of a prompt read at once."""

from __future__ import annotations

import functools

import pytest
import torch
from shapes import HEADS, fill, packed

from headstart.data.tokenizers import ByteTokenizer
from headstart.decoding.constraints import Constraint
from headstart.decoding.drafters.tree import DraftTree
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.generation import Generation
from headstart.decoding.settings import Request, Rule, Sampling
from headstart.decoding.state import DecodingState
from headstart.errors import UsageError

TEXT = tuple(b"the cat then a dog that is end. then a dog the cat that is the cat end. the cat then a dog ")


each_chain = pytest.mark.parametrize("shape", ["sequential", "sequential-normed-own", "eagle3"])


@functools.cache
def alone(shape: str, prompt: tuple[int, ...]) -> tuple[list[int], list[int]]:
    engine = Engine(packed(shape, torch.float64), EngineConfig(exact=False))
    got = generate_all(engine, [Request(prompt, 40, heads=HEADS)])[0]
    return got.tokens, got.stats.accepted


def assert_caches_are_a_fresh_prompts(engine: Engine, generation: Generation, slot: int) -> None:
    """Compare each head as far as it is right: a wrong row costs acceptance, and seldom much of it."""
    model, cache = engine.model, engine.state.cache
    committed = torch.tensor([*generation.request.prompt, *generation.tokens])
    length = int(engine.state.length_S[slot])
    assert length == len(committed) - 1
    fresh = DecodingState.empty(model, 1, cache.capacity)
    fill(model, fresh, 0, committed[:-1], HEADS, root=committed[-1:])
    for layer in range(len(cache.values)):
        right = length - (max(0, layer - model.config.trunk_layers) if model.config.carried else 0)
        for got, want in (
            (cache.keys_of(slot), fresh.cache.keys_of(0)),
            (cache.values[:, slot], fresh.cache.values[:, 0]),
        ):
            assert torch.allclose(got[layer, :, :right], want[layer, :, :right], atol=1e-9), layer


@each_chain
@pytest.mark.parametrize("budget", [1, 2, 7])
@pytest.mark.parametrize("exact", [True, False])
def test_pieces_of_a_prompt_between_passes_of_others(shape: str, budget: int, exact: bool) -> None:
    """The latents carried from piece to piece must outlast the passes over other slots, which, exact, run over this one
    too."""
    engine = Engine(packed(shape, torch.float64), EngineConfig(slots=2, exact=exact, prefill_budget=budget))
    other = engine.submit(Request(TEXT[:2], 200, heads=HEADS))
    while not other.tokens:
        engine.step()
    late = engine.submit(Request(TEXT[5:60], 40, heads=HEADS))
    while len(late.tokens) < 5:
        engine.step()
    assert late.slot is not None
    assert_caches_are_a_fresh_prompts(engine, late, late.slot)
    while not late.finished:
        engine.step()
    assert (late.tokens, late.stats.accepted) == alone(shape, TEXT[5:60])


@each_chain
@pytest.mark.parametrize("budget", [1, 3, None])
@pytest.mark.parametrize("length", [40, 41, 60])
def test_a_prompt_that_goes_on_from_what_a_slot_holds(shape: str, budget: int | None, length: int) -> None:
    """The last positions that are found were computed over other tokens behind them, and are computed anew."""
    engine = Engine(packed(shape, torch.float64), EngineConfig(exact=False, prefill_budget=budget))
    first = engine.submit(Request((*TEXT[:40], *b"dog is a cat"), 20, heads=HEADS))
    second = engine.submit(Request(TEXT[:length], 40, heads=HEADS))
    while len(second.tokens) < 5:
        engine.step()
    assert_caches_are_a_fresh_prompts(engine, second, 0)
    for _ in engine.run():
        pass
    assert first.finished and 16 <= second.stats.prompt_tokens_reused <= 40 - (HEADS - 1)
    assert (second.tokens, second.stats.accepted) == alone(shape, TEXT[:length])


@each_chain
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_a_batch_of_prompts_shorter_than_what_heads_read_ahead(shape: str, length: int) -> None:
    """Run with and without the compiled kernels, whose attention skips slots that begin before their sequence."""
    requests = [Request(TEXT[i : i + length], 16, heads=HEADS) for i in range(3)]
    accepted = []
    for compiled in (True, False):
        model = packed(shape, torch.float32, compiled)
        together = generate_all(Engine(model, EngineConfig(slots=3)), requests)
        for request, got in zip(requests, together):
            plain = generate_all(Engine(model), [Request(request.prompt, 16, heads=1)])[0]
            assert got.tokens == plain.tokens
        accepted.append([got.stats.accepted for got in together])
    assert accepted[0] == accepted[1]


@each_chain
def test_trees_are_refused(shape: str) -> None:
    message = (
        "heads without norm_output draft one chain" if shape == "sequential" else "which draft from the drafts before"
    )
    with pytest.raises(UsageError, match=message):
        Engine(packed(shape, torch.float32), EngineConfig(tree=DraftTree.parse("0,1,0.0")))


@each_chain
def test_constraints_on_a_chain(shape: str) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    model, words = (
        packed(shape, torch.float64),
        Constraint.regex(r"((the|that|then) (cat|dog|[a-z]{1,5})[ .]){8}"),
    )
    for sampling in (Sampling(), Sampling(0.8, seed=3)):
        plain, fast = (
            generate_all(Engine(model, tokenizer=ByteTokenizer()), [request])[0]
            for request in (Request(TEXT[:4], 50, sampling, heads, constraint=words) for heads in (1, HEADS))
        )
        assert fast.tokens == plain.tokens and fast.stats.passes < plain.stats.passes
    block = Request(TEXT[:4], 50, Sampling(1.0), acceptance=Rule("block"), constraint=words)
    with pytest.raises(
        UsageError, match=f"acceptance block is not lossless for {model.config.head_kind} heads with a constraint"
    ):
        Engine(model, tokenizer=ByteTokenizer()).submit(block)
