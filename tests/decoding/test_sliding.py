"""Sliding layers give back positions that they no longer see, and every output is that of a full cache."""

from __future__ import annotations

import platform
from dataclasses import replace

import pytest
import torch

from headstart.decoding.drafters.tree import DraftTree
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.kernels.pack import pack
from headstart.decoding.memory import decoding_memory
from headstart.decoding.scheduler import Held
from headstart.decoding.settings import Request, Sampling
from headstart.decoding.sliding import SlidingPages
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from models import random_model

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="pages are given back on Linux")
WINDOW = 24
CONFIG = ModelConfig(
    vocab_size=64, dim=32, layers=4, attention_heads=2, kv_heads=1, context=1024, heads=3, head_kind="replicated",
    wiring="parallel", window=WINDOW, window_layers=(0, 2),
)  # fmt: skip
PROMPT = tuple(int(token) for token in torch.randint(64, (400,), generator=torch.Generator().manual_seed(1)))
WAYS = {
    "plain": EngineConfig(slots=2),
    "budget": EngineConfig(slots=2, prefill_budget=96),
    "not exact": EngineConfig(slots=2, exact=False),
    "looked up": EngineConfig(slots=2, lookup=3),
    "tree": EngineConfig(slots=2, tree=DraftTree.parse("0,1,0.0,1.0")),
}


def model_of(**changes: object) -> Transformer:
    return pack(random_model(replace(CONFIG, **changes), scale=0.3))


def conversation(engine: Engine) -> list[tuple[list[int], int]]:
    """Decode turns that continue, repeat and leave earlier ones, two at a time; return outputs and reused positions."""
    turns: list[tuple[list[int], int]] = []
    history = PROMPT
    for turn in range(3):
        requests = [
            Request(history, 170, Sampling(1.0, seed=turn)),
            Request((*history[:290], 5, 6, *PROMPT[:90]), 60),
        ]
        done = generate_all(engine, requests)
        turns += [(list(each.tokens), each.stats.prompt_tokens_reused) for each in done]
        history = (*history, *done[0].tokens[:90], 1, 2, 3)
    return turns


@pytest.mark.parametrize("way", WAYS)
def test_outputs_are_those_of_a_full_cache(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    engine = Engine(model, WAYS[way])
    found = conversation(engine)
    monkeypatch.setattr(SlidingPages, "of", classmethod(lambda *_: None))
    full = Engine(model, WAYS[way])
    assert full.state.cache.sliding is None
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in conversation(full)]
    assert max(reused for _, reused in found) >= 256  # the next turn starts from the one before


def test_passed_positions_are_zero_in_sliding_layers_alone() -> None:
    engine = Engine(model_of(), EngineConfig())
    generate_all(engine, [Request(PROMPT, 400)])
    cache, held = engine.state.cache, engine.scheduler.slots.held[0]
    assert cache.sliding is not None and [start for start, _ in held.lost] == [0, len(PROMPT) - 1]
    kept = len(held.tokens) - sum(end - start for start, end in held.lost)
    assert kept <= cache.sliding.most(cache.capacity, engine.scheduler.chunk, engine.width)
    for buffer in (cache.keys, cache.values):
        for layer in range(4):
            for start, end in held.lost:
                first, last = cache.sliding.whole(start, end)
                assert last - first >= 128
                assert bool((buffer[layer, 0, :, first:last] == 0).all()) == (layer in (0, 2))
        assert (buffer[:, 0, :, held.lost[-1][1] + cache.sliding.block : len(held.tokens)] != 0).any(-1).all()


def test_an_overflow_does_not_reach_the_next_request() -> None:
    model = model_of()
    engine = Engine(model, EngineConfig(prefix_reuse=False))
    generate_all(engine, [Request(PROMPT, 300)])
    for buffer in (engine.state.cache.keys, engine.state.cache.values):
        buffer[:, :, :, : len(PROMPT) + 299] = float("nan")
    fresh = Engine(model, EngineConfig())
    request = Request(PROMPT[:50], 100)
    assert generate_all(engine, [request])[0].tokens == generate_all(fresh, [request])[0].tokens


@pytest.mark.parametrize(
    ("lost", "count"),
    [([], 100), ([(0, 60)], 100), ([(0, 61)], 0), ([(0, 8), (50, 61)], 50), ([(0, 8), (50, 60)], 100), ([(0, 64)], 0)],
)
def test_a_prefix_is_reused_where_its_last_window_is_left(lost: list[tuple[int, int]], count: int) -> None:
    held = Held([100], list(range(100)), lost=lost)
    assert held.usable([*range(100), 7], 1, None, sees=40) == count


def test_the_plan_counts_windows() -> None:
    device, float32 = torch.device("cpu"), torch.float32
    full, some = (
        decoding_memory(replace(CONFIG, window=window, window_layers=layers), 2, 1024, 3, 64, float32, device).caches
        for window, layers in ((None, None), (WINDOW, (0, 2)))
    )
    sliding = SlidingPages.of(CONFIG, float32, device)
    assert sliding is not None and full == 2 * 1024 * 2 * 4 * 16 * 4
    assert some == full // 2 + full // 2 * sliding.most(1024, 64, 3) // 1024 < full
    other = SlidingPages.of(CONFIG, float32, torch.device("cuda"))
    assert other is None and SlidingPages.of(replace(CONFIG, window=1024), float32, device) is None
