"""Compiled int8 products equal the reference bit for bit, and decoding with them is lossless."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from shapes import HEADS, trained

import headstart
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.kernels import cpu
from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.kernels.cpu_backend import CompiledLinear
from headstart.decoding.kernels.int8 import ROW_STEPS, WEIGHT_STEPS, Int8Linear, quantize_rows, quantize_weight
from headstart.decoding.kernels.pack import pack
from headstart.decoding.policy.calibration import machine_key
from headstart.decoding.settings import Request, Sampling
from headstart.errors import UsageError
from headstart.model.transformer import Transformer


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def compiled() -> None:
    if cpu.kernels(torch.float32) is None:
        pytest.skip("no compiled kernels for fp32 here: another processor, or no C compiler")


@functools.cache
def quantized(shape: str, compiled: bool = True) -> Transformer:
    return pack(copy.deepcopy(trained(shape)), compiled=compiled, quantize="int8")


@pytest.mark.parametrize("K", [1, 50, 160, 4096, 5000])
def test_products_of_whole_numbers_are_exact(K: int) -> None:
    """Compare the reference, which multiplies in fp32, with Python's integers."""
    weight, x = random(3, K), random(2, K, seed=1)
    weight[0], x[0] = 1, -1  # every product as large as it can be, of one sign
    (w, w_scale), (q, q_scale) = quantize_weight(weight), quantize_rows(x)
    assert w.abs().amax(1).tolist() == [WEIGHT_STEPS] * 3 and q.abs().amax(1).tolist() == [ROW_STEPS] * 2
    got = Int8Linear(weight, None)(x)
    for row in range(2):
        for output in range(3):
            total = sum(a * b for a, b in zip(map(int, q[row].tolist()), map(int, w[output].tolist())))
            unit = (q_scale[row, 0] * w_scale[output]).double()
            assert got[row, output] == (torch.tensor(total).float().double() * unit).float()
    assert ((got - F.linear(x, weight)).norm() / F.linear(x, weight).norm()) < 0.03


@pytest.mark.parametrize(("N", "K"), [(32, 16), (1, 2), (77, 50), (160, 416), (33, 48), (16, 6), (5, 5000)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 16])
def test_compiled_products_are_the_reference(N: int, K: int, rows: int, compiled: None) -> None:
    weight, x = random(N, K), random(rows, K, seed=rows) * torch.logspace(-3, 3, rows)[:, None]
    bias = random(N, seed=2) if N % 2 else None
    fast, slow = CompiledLinear(weight, bias, "int8"), Int8Linear(weight, bias)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got = fast(x)
        torch.set_num_threads(1)
        assert torch.equal(got, slow(x))
        for row in range(rows):  # each row depends on itself alone
            assert torch.equal(fast(x[row : row + 1])[0], got[row])


def test_no_sum_overflows_where_all_is_largest(compiled: None) -> None:
    """vpmaddubsw adds two products in 16 bits and saturates."""
    for sign_x in (1, -1):
        for sign_w in (1, -1):
            weight, x = torch.full((16, 64), float(sign_w)), torch.full((3, 64), float(sign_x))
            got = CompiledLinear(weight, None, "int8")(x)
            assert torch.allclose(got, torch.full((3, 16), 64.0 * sign_x * sign_w), rtol=1e-6)


def test_rows_and_outputs_of_zeros(compiled: None) -> None:
    weight, x = random(20, 40), random(4, 40, seed=1)
    weight[3], x[1], x[2] = 0, 0, 1e-35  # a value too small for a reciprocal counts as zero
    for linear in (CompiledLinear(weight, None, "int8"), Int8Linear(weight, None)):
        y = linear(x)
        assert (y[:, 3] == 0).all() and (y[1:3] == 0).all() and y.isfinite().all()


def test_an_int8_model_is_near_the_model_and_its_reference(shape: str, compiled: None) -> None:
    tokens = torch.tensor([list(b"the cat then a dog")])
    # Up to the last position whose later tokens sequential heads have.
    want = trained(shape)(tokens, heads=HEADS)[:, : 1 - HEADS]
    got, reference = (quantized(shape, fast)(tokens, heads=HEADS)[:, : 1 - HEADS] for fast in (True, False))
    assert backend_of(quantized(shape)).quantize and backend_of(quantized(shape, False)).quantize
    assert 1e-4 < (got - want).norm() / want.norm() < 0.1
    # Norms and attention round differently in torch, so a row may be quantized to another step.
    assert (got - reference).norm() / want.norm() < 0.03


@pytest.mark.parametrize("fast", [True, False])
def test_speculative_int8_is_plain_int8(shape: str, fast: bool) -> None:
    if fast and cpu.kernels(torch.float32) is None:
        pytest.skip("no compiled kernels for fp32 here")
    model = quantized(shape, fast)
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


def test_costs_of_int8_are_kept_apart() -> None:
    plain, int8 = (machine_key(pack(copy.deepcopy(trained("replicated")), quantize=q)) for q in (None, "int8"))
    assert plain["dtype"] == "float32" and int8["dtype"] == "int8"
    assert {**plain, "dtype": 0} == {**int8, "dtype": 0}


def test_what_cannot_be_quantized_is_refused(tmp_path) -> None:
    model = copy.deepcopy(trained("replicated")).bfloat16()
    with pytest.raises(UsageError, match="leave the dtype out"):
        pack(model, quantize="int8")
    with pytest.raises(UsageError, match="take int8"):
        headstart.load(tmp_path, quantize="int4")
    with pytest.raises(UsageError, match="131,072 inputs"):
        quantize_weight(torch.zeros(1, (1 << 17) + 1))


def test_a_stored_model_loads_as_int8(tmp_path) -> None:
    from headstart.formats.huggingface import save_model

    save_model(trained("transformer-parallel"), tmp_path, dtype=torch.bfloat16)
    model = headstart.load(tmp_path, quantize="int8")
    assert backend_of(model.transformer).quantize and model.transformer.trunk.embedding.weight.dtype == torch.float32
    one, all_heads = (model.generate(list(b"the cat "), 20, heads=heads).tokens for heads in (1, HEADS))
    assert one == all_heads and len(one) == 20
