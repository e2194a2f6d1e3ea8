"""Drafts that are looked up in the text: right ones bring tokens, wrong ones change nothing."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import chi_square, small_models
from policies import RandomRows
from shapes import HEADS, packed

from headstart.decoding.drafters.lookup import SIZES, Lookup, Odds
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.kernels.pack import pack
from headstart.decoding.settings import Request, Rule, Sampling
from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

PROMPT = tuple(b"the cat then a dog the cat")


def slowly(text: list[int], beyond: list[int], count: int) -> tuple[list[int], int]:
    """The same by looking at every place."""
    if count == 0:
        return [], 0
    end = text + beyond
    for size in SIZES:
        if size > len(end):
            continue
        # The last place where these tokens stood, with something after them, within the text itself.
        places = [i for i in range(size, len(text)) if text[i - size : i] == end[-size:]]
        if places:
            whole = list(end)
            found = []
            at = places[-1]
            for i in range(count):
                found.append(whole[at + i])
                whole.append(found[-1])
            return found, size
    return [], 0


@given(
    text=st.lists(st.integers(0, 2), max_size=60),
    beyond=st.lists(st.integers(0, 2), max_size=4),
    count=st.integers(0, 9),
    cut=st.integers(0, 60),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_it_finds_what_a_search_finds(text: list[int], beyond: list[int], count: int, cut: int) -> None:
    lookup = Lookup(text[:cut])
    lookup.push(text[cut:])
    assert lookup.tokens == text
    assert lookup.drafts(beyond, count) == slowly(text, beyond, count)


def test_a_loop_goes_on() -> None:
    assert Lookup([7, 1, 2, 3, 1, 2, 3, 1, 2]).drafts([], 7) == ([3, 1, 2, 3, 1, 2, 3], 4)


def test_odds_follow_what_was_seen() -> None:
    odds = Odds()
    before = [odds.of(size) for size in SIZES]
    assert before == sorted(before, reverse=True)  # longer matches are believed more, at first
    for _ in range(300):
        odds.saw(8, 4, 3)
        odds.saw(4, 4, 0)
        odds.saw(2, 4, 4)
    assert odds.of(8) == pytest.approx(0.75, abs=0.02)
    assert odds.of(4) < 0.02 and odds.of(2) > 0.98 and odds.of(16) == before[0]


@pytest.mark.parametrize("shape", ["transformer-causal", "replicated"])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_output_does_not_depend_on_what_is_looked_up(shape: str, compiled: bool, exact: bool) -> None:
    model = packed(shape, torch.float32, compiled)
    requests = [
        Request(PROMPT, 90),
        Request(PROMPT, 60, Sampling(0.8, seed=3)),
        Request(PROMPT[3:], 50, Sampling(0.5, top_k=9), heads=1),
    ]
    plain = [
        generate_all(
            Engine(model, EngineConfig(exact=exact)), [Request(r.prompt, r.max_new_tokens, r.sampling, heads=1)]
        )[0]
        for r in requests
    ]
    policies = [None, RandomRows(5)] if backend_of(model).row_exact or not exact else [None]
    for policy in policies:
        found = generate_all(Engine(model, EngineConfig(slots=2, exact=exact, lookup=6), policy=policy), requests)
        assert [g.tokens for g in found] == [g.tokens for g in plain]
    only = found[2]  # without drafting heads all drafts are looked up
    assert sum(only.stats.drafted) == 0
    if policies == [None]:
        assert only.stats.passes < 50 and only.origins.count(0) == 50 - only.stats.passes + (only.origins[-1] == 0)
        assert 0 <= only.stats.looked_up_accepted - only.origins.count(0) < 6  # the last pass may go beyond the limit


def one_head() -> Transformer:
    torch.manual_seed(0)
    return pack(Transformer(ModelConfig(vocab_size=50, dim=32, layers=2, attention_heads=2, heads=1, context=256)))


def test_a_model_with_one_head_writes_several_tokens_a_pass() -> None:
    """A model of random weights soon writes loops."""
    model = one_head()
    plain = generate_all(Engine(model), [Request((1, 2, 3), 200)])[0]
    fast = generate_all(Engine(model, EngineConfig(lookup=8)), [Request((1, 2, 3), 200)])[0]
    assert fast.tokens == plain.tokens and len(set(plain.tokens[-60:])) < 30
    assert fast.stats.passes < 100 and fast.stats.rows_per_pass > 2


def test_a_text_that_changes_between_passes_keeps_its_place() -> None:
    """Requests that come and go in a slot take their lookups along."""
    model = packed("transformer-parallel", torch.float32)
    rng = random.Random(0)
    requests = [Request(PROMPT[rng.randrange(9) :], rng.randrange(1, 40), Sampling(0.7, seed=i)) for i in range(9)]
    found = generate_all(Engine(model, EngineConfig(slots=3, lookup=5)), requests)
    for request, generation in zip(requests, found):
        assert generation.tokens == generate_all(Engine(model), [request])[0].tokens


@pytest.mark.parametrize("kind", ["rejection", "block"])
def test_drafts_that_were_not_drawn_are_weighed_as_certain(kind: str) -> None:
    """Lossless in distribution with looked up drafts too."""
    raw, model = small_models()
    assert chi_square(model, raw, Rule(kind), Sampling(1.0), 512, EngineConfig(slots=128, lookup=2)) < 1.8


def test_lookup_is_not_negative() -> None:
    with pytest.raises(UsageError, match="lookup is -1"):
        Engine(packed("replicated", torch.float32), EngineConfig(lookup=-1))
    assert Engine(packed("replicated", torch.float32), EngineConfig(lookup=3)).width == HEADS + 3
