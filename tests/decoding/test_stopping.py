"""Ends are exact at every offset inside a burst: what is kept never depends on how many tokens came at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import HEADS, packed

from headstart.data.tokenizers import ByteTokenizer
from headstart.decoding.constraints import Constraint
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.kernels.pack import pack
from headstart.decoding.settings import Request, Sampling
from headstart.decoding.stopping import Stopper
from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

PROMPT = tuple(b"the cat then")


class EndsWithDot(ByteTokenizer):
    end_id = ord(".")


def run(request: Request, tokenizer=None):
    engine = Engine(packed("transformer-parallel", torch.float32), tokenizer=tokenizer or ByteTokenizer())
    generation = engine.submit(request)
    pieces = [piece for _, piece in engine.run()]
    assert "".join(pieces) == generation.text
    return generation


def test_the_token_limit_cuts_a_burst_anywhere() -> None:
    whole = run(Request(PROMPT, 60, heads=1)).tokens
    for limit in range(1, 30):
        got = run(Request(PROMPT, limit, heads=HEADS))
        assert got.tokens == whole[:limit] and got.finish_reason == "length"


def test_the_end_token_cuts_a_burst_and_is_not_text() -> None:
    reasons = set()
    for seed in range(6):
        sampling = Sampling(1.0, seed=seed)
        plain = run(Request(PROMPT, 100, sampling, heads=1), EndsWithDot())
        fast = run(Request(PROMPT, 100, sampling, heads=HEADS), EndsWithDot())
        assert (fast.tokens, fast.text, fast.finish_reason) == (plain.tokens, plain.text, plain.finish_reason)
        assert ord(".") not in fast.tokens
        reasons.add(plain.finish_reason)
    assert "end" in reasons


def test_a_stop_string_at_every_offset_inside_a_burst() -> None:
    whole = run(Request(PROMPT, 60, heads=1)).text
    for start in range(20):
        for size in (1, 2, 5):
            stop = whole[start : start + size]
            want = whole[: whole.index(stop)]
            for heads in (1, HEADS):
                got = run(Request(PROMPT, 60, heads=heads, stop=(stop, "never there")))
                assert got.text == want and got.finish_reason == "stop"
                # The tokens end with the one that completed the stop string.
                assert bytes(got.tokens).decode() == want + stop


@given(
    text=st.text(alphabet="abé😀 ", min_size=1, max_size=30),
    stops=st.lists(st.text(alphabet="abé😀 ", min_size=1, max_size=4), max_size=3),
    bursts=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    limit=st.integers(1, 60),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_bursts_of_any_size_give_what_single_tokens_give(text, stops, bursts, limit) -> None:
    tokenizer = ByteTokenizer()
    tokens = [*tokenizer.encode(text), tokenizer.end_id, *tokenizer.encode("after")]

    def feed(sizes: list[int]) -> Stopper:
        stopper = Stopper(limit, [tokenizer.end_id], stops, tokenizer)
        at, i, pieces = 0, 0, []
        while at < len(tokens) and stopper.finish_reason is None:
            size = sizes[i % len(sizes)]
            pieces.append(stopper.push(tokens[at : at + size]))
            at, i = at + size, i + 1
        assert "".join(pieces) == stopper.text
        return stopper

    one, many = feed([1]), feed(bursts)
    assert (one.tokens, one.text, one.finish_reason) == (many.tokens, many.text, many.finish_reason)
    found = [text.index(s) for s in stops if s in text]
    if found and limit >= len(tokens):
        assert one.finish_reason == "stop" and not any(s in one.text for s in stops)
    if not found and limit >= len(tokens):
        assert one.text == text and one.finish_reason == "end"


@pytest.mark.parametrize("burst", [1, 3, 20])
@pytest.mark.parametrize(
    ("change", "text", "reason"),
    [
        ({"stop": ("cd", "c")}, "ab", "stop"),
        ({"stop": ("cd", "c"), "keep_stop": True}, "abc", "stop"),
        ({"stop": ("de",), "keep_stop": True}, "abcde", "stop"),
        ({"stop_tokens": frozenset(b"xd")}, "abcd", "stop"),
        ({"stop_tokens": frozenset(b"d"), "stop": ("de",)}, "abcd", "stop"),
        ({}, "abcdef", "end"),
        ({"ignore_ends": True}, "abcdefgh", "length"),
    ],
    ids=str,
)
def test_what_ends_a_text_and_what_is_part_of_it(
    change: dict[str, Any], text: str, reason: str, burst: int, stopper_of: Callable[[Request], Stopper]
) -> None:
    stopper = stopper_of(Request((65,), max_new_tokens=9, **change))
    tokens = [*b"abcdef", ByteTokenizer.end_id, *b"gh"]
    pieces = [stopper.push(tokens[at : at + burst]) for at in range(0, len(tokens), burst)]
    assert (stopper.text, "".join(pieces), stopper.finish_reason) == (text, text, reason)


@pytest.fixture(scope="module")
def stopper_of() -> Callable[[Request], Stopper]:
    """The stopper that an engine makes for a request."""
    config = ModelConfig(vocab_size=256, dim=16, layers=2, attention_heads=1, heads=1, context=32)
    engine = Engine(pack(Transformer(config)), tokenizer=ByteTokenizer())
    return lambda request: engine.submit(request)._stopper


def test_ends_are_not_ignored_under_a_constraint() -> None:
    with pytest.raises(UsageError, match="ignore_ends: a constraint"):
        Request((65,), constraint=Constraint.regex("a"), ignore_ends=True)


def test_stop_strings_need_text() -> None:
    with pytest.raises(UsageError, match="tokenizer"):
        Stopper(5, (), ["x"], None)
    with pytest.raises(UsageError, match="empty"):
        Stopper(5, (), [""], ByteTokenizer())


def test_cancelling_frees_the_slot_and_leaves_the_neighbour_alone() -> None:
    model = packed("transformer-parallel", torch.float32)
    alone = generate_all(Engine(model), [Request(PROMPT, 50)])[0].tokens
    engine = Engine(model, EngineConfig(slots=2))
    first, second = engine.submit(Request(PROMPT[:4], 200)), engine.submit(Request(PROMPT, 50))
    third = engine.submit(Request(PROMPT, 50))
    engine.step()
    engine.cancel(first)
    assert first.finish_reason == "cancelled"
    for _ in engine.run():
        pass
    assert second.tokens == third.tokens == alone
