from __future__ import annotations

import copy

import pytest
import torch
from shapes import HEADS, packed, trained

from headstart.decoding.drafters.tree import DraftTree
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.kernels.pack import pack
from headstart.decoding.kernels.torch_backend import PackedLinear, can_pack
from headstart.decoding.settings import Request, Sampling
from headstart.errors import UsageError

PROMPT = tuple(b"the cat then")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(()), "prompt is empty"),
        (Request((1,) * 640), "shorten the prompt"),
        (Request((1, 999)), "token 999"),
        (Request((-1, 2)), "token -1"),
        (Request((1,), heads=9), "has 4"),
        (Request((1,), heads=0), "heads is 0"),
        (Request((1,), max_new_tokens=0), "at least 1"),
        (Request((1,), stop=("x",)), "tokenizer"),
    ],
)
def test_impossible_requests_are_refused_before_anything_runs(request_: Request, message: str) -> None:
    engine = Engine(packed("replicated", torch.float32))
    with pytest.raises(UsageError, match=message):
        engine.submit(request_)
    assert not engine.busy


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("length", [600, 637, 638, 639])
def test_generation_ends_where_the_context_ends(heads: int, length: int) -> None:
    prompt = (PROMPT * 60)[:length]
    got = generate_all(Engine(packed("transformer-parallel", torch.float32)), [Request(prompt, 500, heads=heads)])[0]
    assert len(got.tokens) == 640 - length and got.finish_reason == "length"


def test_a_prompt_of_one_token() -> None:
    model = packed("transformer-anticausal", torch.float32)
    results = [generate_all(Engine(model), [Request((65,), 40, heads=k)])[0].tokens for k in range(1, HEADS + 1)]
    assert len(results[0]) == 40 and all(tokens == results[0] for tokens in results)


def test_more_requests_than_slots_wait_their_turn() -> None:
    model = packed("replicated", torch.float32)
    engine = Engine(model, EngineConfig(slots=2))
    generations = [engine.submit(Request(PROMPT, 10 + i, Sampling(1.0, seed=i))) for i in range(5)]
    finished = []
    while engine.busy:
        for generation, _ in engine.step():
            if generation.finished:
                finished.append(generation)
    assert sorted(map(id, finished)) == sorted(map(id, generations))
    for i, generation in enumerate(generations):
        alone = generate_all(Engine(model), [Request(PROMPT, 10 + i, Sampling(1.0, seed=i))])[0]
        assert generation.tokens == alone.tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packing_changes_the_layout_and_not_the_function(shape: str, dtype: torch.dtype) -> None:
    if not can_pack(torch.device("cpu"), dtype):
        pytest.skip("this machine's oneDNN has no packed products of this type")
    plain = copy.deepcopy(trained(shape)).to(dtype)
    model = packed(shape, dtype, compiled=False)
    assert any(isinstance(module, PackedLinear) for module in model.modules())
    tokens = torch.tensor([list(PROMPT)])
    with torch.no_grad():
        # Up to where sequential heads know the tokens between.
        want, got = (which(tokens, heads=HEADS)[:, : 1 - HEADS].float() for which in (plain, model))
    assert (want - got).norm() / want.norm() < (1e-5 if dtype == torch.float32 else 2e-2)


def test_rows_of_a_packed_product_do_not_depend_on_their_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        if not can_pack(torch.device("cpu"), dtype):
            continue
        linear = PackedLinear(torch.randn(96, 48, generator=generator).to(dtype), None, 4)
        x = torch.randn(8, 48, generator=generator).to(dtype)
        whole = linear(x)
        shuffled = linear(x[[3, 0, 7, 1, 2, 6, 5, 4]])
        assert torch.equal(shuffled[0], whole[3]) and torch.equal(shuffled[2], whole[7])


def test_the_decoding_form_has_no_gradients() -> None:
    model = pack(copy.deepcopy(trained("transformer-parallel")))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_shapes_are_free_where_so_few_rows_are_exact_and_prompts_are_read_in_equal_chunks() -> None:
    """The kernels for GPUs are like this: exact up to some number of rows, prompts apart."""
    model = pack(copy.deepcopy(trained("replicated")))
    model.backend.exact_rows = 8
    few, many = (
        Engine(model, EngineConfig(slots=8 // model.config.heads)),
        Engine(model, EngineConfig(slots=8 // model.config.heads + 1)),
    )
    assert (few.fixed_shapes, many.fixed_shapes) == (False, True)
    assert few.scheduler.fixed_chunks and many.scheduler.fixed_chunks
    assert not Engine(model, EngineConfig(slots=1, exact=False)).scheduler.fixed_chunks
    assert Engine(model, EngineConfig(tree=DraftTree.parse("0,1"))).fixed_shapes, "a tree's attention is torch's"
