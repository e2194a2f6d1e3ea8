"""A pass never waits for the device: it runs on tensors without data, where whatever asks for a value fails."""

from __future__ import annotations

import functools

import pytest
import torch
from shapes import CORE, HEADS, SHAPES

from headstart.decoding.decode_pass import decode_pass, prefill
from headstart.decoding.drafters.interface import PromptPiece
from headstart.decoding.drafters.tree import DynamicTree
from headstart.decoding.kernels.pack import pack
from headstart.decoding.settings import Penalties, Rule, Sampling
from headstart.decoding.state import DecodingState, PassPlan
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

SLOTS = 3
SETTINGS = {
    "greedy": Sampling(),
    "sampled": Sampling(1.0),
    "truncated": Sampling(1.0, top_k=20, top_p=0.9, min_p=0.05),
}
RULES = [
    "match",
    "rejection",
    "block",
    "lossy-typical:0.09:0.3",
    "lossy-top-k:2",
    "lossy-distance:2",
    "lossy-minimum:2",
]


@functools.cache
def without_data(shape: str) -> Transformer:
    config = ModelConfig(
        vocab_size=300, dim=32, layers=6, attention_heads=2, kv_heads=1, heads=HEADS, context=64, **SHAPES[shape]
    )
    with torch.device("meta"):
        return pack(Transformer(config))


def ready(shape: str) -> tuple[Transformer, DecodingState]:
    model = without_data(shape)
    with torch.device("meta"):
        return model, DecodingState.empty(model, SLOTS, 64, HEADS + 2)


def step(
    model: Transformer, state: DecodingState, monkeypatch: pytest.MonkeyPatch, width: int = HEADS, **options
) -> None:
    def from_host(*args, **kwargs):
        raise AssertionError("a value made on the host would be copied to the device, which waits")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "tensor", from_host)
        patched.setattr(torch, "as_tensor", from_host)
        for rows, starts in ((width, None), (width + 2, [5, state.parked, 9]), (1, [3, 4, 5])):
            decode_pass(model, state, PassPlan(slice(0, SLOTS), rows, HEADS, 32, starts, confident=True, **options))


# Truncation takes every step of sampling; how heads draft decides what else runs: one pass for all, or one a head.
FIRST = {"transformer-parallel", "sequential"}
CASES = [
    pytest.param(shape, name, marks=[] if name == "truncated" or shape in FIRST else [pytest.mark.slow])
    for shape in CORE for name in SETTINGS
]  # fmt: skip


@pytest.mark.parametrize(("shape", "name"), CASES)
def test_a_pass_reads_nothing(shape: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, state = ready(shape)
    for slot in range(SLOTS):
        state.sampling.set(slot, SETTINGS[name])
    for deferred in (True, False):
        step(model, state, monkeypatch, deferred=deferred, keep_logits=not deferred)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("shape", ["eagle3", "sequential-normed-own"])
def test_nor_does_a_tree_that_grows(shape: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tree = without_data(shape), DynamicTree(3, 3, 8)
    with torch.device("meta"):
        state = DecodingState.empty(model, SLOTS, 64, tree.rows)
    state.windows.hold_trees(tree)
    for slot in range(SLOTS):
        state.sampling.set(slot, SETTINGS[name])
    step(model, state, monkeypatch, width=tree.rows - 2, tree=tree, draft_tree=tree)


@pytest.mark.parametrize("rule", RULES)
def test_nor_does_a_rule_or_a_penalty(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, state = ready("transformer-parallel")
    state.sampling.set(0, Sampling(0.7, top_p=0.9), Rule.parse(rule))
    state.sampling.set(1, Sampling())
    state.penalties.set(2, Penalties(1.2, 0.1, 0.1, ((3, -1.0),)), torch.zeros(4, dtype=torch.int64, device="meta"))
    step(model, state, monkeypatch)


def test_nor_does_a_chunk_of_a_prompt(shape: str) -> None:
    model, state = ready(shape)
    tokens = torch.zeros(21, dtype=torch.int64, device="meta")
    prefill(model, state, PromptPiece(1, tokens[:20], 7, HEADS, tokens[20:]))


def test_the_test_itself_can_fail() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(torch.zeros(3, device="meta").any())
