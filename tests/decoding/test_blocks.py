"""Weights in blocks: compiled products equal the reference bit for bit, and decoding with them is lossless."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from shapes import HEADS, trained

import headstart
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.kernels import cpu
from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.kernels.blocks import (
    GROUP,
    STEPS,
    BlockLinear,
    Blocks,
    BlockWeight,
    Quantize,
    quantize_blocks,
    quantize_rows,
)
from headstart.decoding.kernels.cpu_backend import CompiledLinear
from headstart.decoding.kernels.pack import pack
from headstart.decoding.policy.calibration import machine_key
from headstart.decoding.settings import Request, Sampling
from headstart.errors import UsageError
from headstart.model.transformer import Transformer
from tests.models import random_model

FORMS = [
    (bits, group, minimums, dtype)
    for bits in (4, 5, 8)
    for group in ((16, 32) if bits == 8 else (32,))
    for minimums in (False, True)
    for dtype in (torch.float16, torch.float32)
]
"""Bits, group, whether there are minimums, and the dtype of scales."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_blocks(N: int, K: int, form: tuple[int, int, bool, torch.dtype], seed: int = 0) -> BlockWeight:
    """Return a matrix of all codes that the form has, the extreme ones in every row."""
    bits, group, minimums, dtype = form
    generator = torch.Generator().manual_seed(seed)
    low, high = (0, 2**bits) if minimums and bits < 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    codes = torch.randint(low, high, (N, K), dtype=torch.int8, generator=generator)
    codes[::2, : K // 2], codes[1::2, : K // 2] = low, high - 1
    values = [random(N, -(-K // group), seed=seed + i).mul(0.01).to(dtype) for i in range(2)]
    return BlockWeight(codes, values[0], values[1] if minimums else None, bits, group)


@pytest.fixture
def compiled() -> None:
    if cpu.kernels(torch.float32) is None:
        pytest.skip("no compiled kernels for fp32 here: another processor, or no C compiler")


@functools.cache
def quantized(shape: str, quantize: Quantize, compiled: bool = True) -> Transformer:
    return pack(copy.deepcopy(trained(shape)), compiled=compiled, quantize=quantize)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_reference_is_the_product_of_dequantized_weights_and_rounded_rows(form) -> None:
    """Compare it with rational numbers: the only errors are those of fp32 additions over groups."""
    part, x = random_blocks(3, 80, form), random(2, 80, seed=1)
    codes, step = quantize_rows(x)
    rounded = (codes * step[..., None]).flatten(1)[:, :80]
    got = BlockLinear((part,), None)(x)
    for row in range(2):
        for output in range(3):
            weights = map(Fraction, part.dequantize()[output].tolist())
            terms = [w * Fraction(v) for w, v in zip(weights, rounded[row].tolist())]
            assert abs(got[row, output].item() - float(sum(terms))) < 1e-6 * float(sum(map(abs, terms)))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("N", "K"), [(1, 32), (77, 50), (160, 416), (16, 16), (5, 2080)])
def test_compiled_products_are_the_reference(form, N: int, K: int, compiled: None) -> None:
    blocks = (random_blocks(N, K, form),)
    bias = random(N, seed=2) if N % 2 else None
    fast, slow = CompiledLinear(blocks, bias), BlockLinear(blocks, bias)
    x = random(19, K, seed=3) * torch.logspace(-3, 3, 19)[:, None]
    want = slow(x)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 19):
        assert torch.equal(fast(x[:rows]), want[:rows])
    which = torch.tensor([[N - 1, 0], [N // 2, N - 1]])
    assert torch.equal(fast.rows(which), slow.rows(which))
    assert torch.equal(fast.rows(torch.arange(N)), blocks[0].dequantize())


def test_parts_of_a_matrix_have_forms_of_their_own(compiled: None) -> None:
    blocks: Blocks = tuple(random_blocks(N, 96, form, seed=N) for N, form in zip((64, 20, 130), FORMS[::3]))
    fast, slow, x = CompiledLinear(blocks, random(214)), BlockLinear(blocks, random(214)), random(5, 96, seed=1)
    assert torch.equal(fast(x), slow(x))
    assert torch.equal(slow(x), torch.cat([BlockLinear((part,), None)(x) for part in blocks], 1) + random(214))
    assert torch.equal(fast.rows(torch.arange(214)), torch.cat([part.dequantize() for part in blocks]))


@pytest.mark.parametrize("quantize", ["q4", "q8"])
def test_bits_depend_neither_on_rows_nor_on_threads(quantize: Quantize, compiled: None) -> None:
    """A prompt's rows go in several panels, and outputs in tasks of 32."""
    linear, x = CompiledLinear((quantize_blocks(random(300, 1024), quantize),), None), random(300, 1024, seed=1)
    torch.set_num_threads(2)
    got = linear(x)
    torch.set_num_threads(1)
    assert torch.equal(linear(x), got)
    for row in range(0, 300, 37):
        assert torch.equal(linear(x[row]), got[row])


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_no_sum_overflows_where_all_is_largest(bits: int, compiled: None) -> None:
    """16-bit sums saturate without VNNI."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for code, minimums in [(lowest, False), (highest, False), (highest if bits == 8 else 2**bits - 1, True)]:
        codes = torch.full((16, 64), code, dtype=torch.int8)
        part = BlockWeight(codes, torch.ones(16, 2), torch.zeros(16, 2) if minimums else None, bits)
        for sign in (1, -1):
            got = CompiledLinear((part,), None)(torch.full((3, 64), float(sign)))
            assert torch.allclose(got, torch.full((3, 16), 64.0 * sign * code), rtol=1e-6)


def test_rows_and_outputs_of_zeros(compiled: None) -> None:
    weight, x = random(20, 40), random(4, 40, seed=1)
    weight[3], x[1], x[2] = 0, 0, 1e-35  # a value too small for a reciprocal counts as zero
    for quantize in ("q4", "q8"):
        blocks = (quantize_blocks(weight, quantize),)
        for linear in (CompiledLinear(blocks, None), BlockLinear(blocks, None)):
            y = linear(x)
            assert (y[:, 3] == 0).all() and (y[1] == 0).all() and (y[2].abs() < 1e-30).all() and y.isfinite().all()


@pytest.mark.parametrize(("quantize", "steps"), [("q4", 15), ("q8", 127)])
def test_quantized_weights_are_within_half_a_step(quantize: Quantize, steps: int) -> None:
    for factor in (1e-9, 1.0, 1e9):  # scales of fp16 would be 0 or infinite
        weight = random(7, 100) * factor
        part = quantize_blocks(weight, quantize)
        assert part.scales_NG.dtype == (torch.float16 if factor == 1 else torch.float32)
        step = part.scales_NG.float().repeat_interleave(GROUP, 1)[:, :100]
        assert ((part.dequantize() - weight).abs() <= 0.51 * step + 0.001 * steps * step).all()


def test_rows_are_rounded_by_groups() -> None:
    codes, step = quantize_rows(torch.cat([random(3, 32), 100 * random(3, 18)], 1))
    assert codes.shape == (3, 2, GROUP) and step.shape == (3, 2)
    assert (codes.abs().amax(2) == STEPS).all() and (codes[:, 1, 18:] == 0).all() and (step[:, 1] > step[:, 0]).all()


@pytest.mark.parametrize(("quantize", "near"), [("q4", 0.3), ("q8", 0.03)])
def test_a_quantized_model_is_near_the_model_and_its_reference(
    shape: str, quantize: Quantize, near: float, compiled
) -> None:
    tokens = torch.tensor([list(b"the cat then a dog")])
    # Up to the last position whose later tokens sequential heads have.
    want = trained(shape)(tokens, heads=HEADS)[:, : 1 - HEADS]
    got, reference = (quantized(shape, quantize, fast)(tokens, heads=HEADS)[:, : 1 - HEADS] for fast in (True, False))
    assert 1e-4 < (got - want).norm() / want.norm() < near
    # Norms and attention round differently in torch, so a row may be quantized to another step.
    assert (got - reference).norm() / want.norm() < 0.03
    assert F.cosine_similarity(got.flatten(), reference.flatten(), dim=0) > 0.999


@pytest.mark.parametrize(("quantize", "fast"), [("q4", True), ("q8", True), ("q4", False)])
def test_speculative_decoding_of_blocks_is_plain(shape: str, quantize: Quantize, fast: bool) -> None:
    if fast and cpu.kernels(torch.float32) is None:
        pytest.skip("no compiled kernels for fp32 here")
    model = quantized(shape, quantize, fast)
    assert backend_of(model).row_exact == fast
    prompts = [tuple(b"the cat then a dog that is"[: 3 + 5 * i]) for i in range(3)]
    requests = {
        heads: [Request(p, 24, Sampling(i % 2 * 1.0, seed=i), heads=heads) for i, p in enumerate(prompts)]
        for heads in (1, 2, HEADS)
    }
    plain = [g.tokens for g in generate_all(Engine(model, EngineConfig(slots=3)), requests[1])]
    for heads in (2, HEADS):
        several = generate_all(Engine(model, EngineConfig(slots=3)), requests[heads])
        assert [g.tokens for g in several] == plain
        assert sum(g.stats.passes for g in several) < sum(map(len, plain))  # drafts were accepted


def test_costs_of_quantized_models_are_kept_apart() -> None:
    plain, q4, q8 = (machine_key(pack(copy.deepcopy(trained("replicated")), quantize=q)) for q in (None, "q4", "q8"))
    assert [key["dtype"] for key in (plain, q4, q8)] == ["float32", "q4", "q8"]
    assert {**plain, "dtype": 0} == {**q4, "dtype": 0} == {**q8, "dtype": 0}


def test_a_tied_matrix_is_stored_once() -> None:
    packed = pack(random_model(replace(trained("transformer-causal").config, tied=True)), quantize="q4")
    assert packed.trunk.embedding.linear is packed.unembedding.first


def test_what_cannot_be_quantized_is_refused(tmp_path) -> None:
    model = copy.deepcopy(trained("replicated")).bfloat16()
    with pytest.raises(UsageError, match="leave the dtype out"):
        pack(model, quantize="q4")
    for name in ("int4", "int8", "Q4"):
        with pytest.raises(UsageError, match="take q4 or q8"):
            headstart.load(tmp_path, quantize=name)


@pytest.mark.parametrize("quantize", ["q4", "q8"])
def test_a_stored_model_loads_in_blocks(tmp_path, quantize: Quantize) -> None:
    from headstart.formats.huggingface import save_model

    save_model(trained("transformer-parallel"), tmp_path, dtype=torch.bfloat16)
    model = headstart.load(tmp_path, quantize=quantize)
    assert backend_of(model.transformer).form == quantize and model.transformer.dtype == torch.float32
    one, all_heads = (model.generate(list(b"the cat "), 20, heads=heads).tokens for heads in (1, HEADS))
    assert one == all_heads and len(one) == 20
