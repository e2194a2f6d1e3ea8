"""Compare the compiled kernels with torch, in shapes that fill their blocks and shapes that do not."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import HEADS, packed, trained

from headstart.decoding.cache import CachedAttention, KVCache, gather_row
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.kernels import cpu
from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.kernels.cpu_backend import (
    CompiledBackend,
    CompiledBlock,
    CompiledLinear,
    CompiledNorm,
    CompiledSwiGLU,
)
from headstart.decoding.kernels.pack import pack
from headstart.decoding.settings import Request, Sampling
from headstart.model.config import ModelConfig
from headstart.model.layers import RMSNorm, SwiGLU
from headstart.model.transformer import Transformer
from tests.cases import pairwise

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(params=list(DTYPES), scope="module")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Return the type of activations, or skip if this processor has no kernels for it."""
    if cpu.kernels(DTYPES[request.param]) is None:
        pytest.skip(f"no compiled kernels for {request.param} here: another processor, or no C compiler")
    return DTYPES[request.param]


@pytest.fixture(scope="module")
def error(dtype: torch.dtype) -> float:
    """Return the largest relative error of a result."""
    return 1e-2 if dtype == torch.bfloat16 else 1e-5


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pairwise({
    "N,K": [(32, 16), (1, 2), (77, 50), (256, 128), (33, 48), (16, 6)],
    "rows": [1, 2, 7, 8, 9, 20],
    "narrow": [False, True],
})  # fmt: skip
def test_linear(N: int, K: int, rows: int, narrow: bool, dtype: torch.dtype, error: float) -> None:
    weight, x = random(N, K, dtype=dtype), random(rows, K, dtype=dtype, seed=1)
    weight = weight.bfloat16().to(dtype) if narrow else weight
    bias = random(N, dtype=dtype, seed=2) if N % 2 else None
    for threads in (1, 2):
        torch.set_num_threads(threads)
        linear = CompiledLinear(weight, bias)
        assert (linear.packed.dtype == torch.bfloat16) == (narrow or dtype == torch.bfloat16)
        got = linear(x)
        torch.set_num_threads(1)
        want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert got.shape == (rows, N) and got.dtype == dtype
        assert ((got.double() - want).abs() <= error * want.abs() + 2 * error).all()


def test_a_row_depends_on_itself_alone(dtype: torch.dtype) -> None:
    """The bits are the same for 1 and for 300 rows, and for 1 and for 2 threads."""
    linear, x = CompiledLinear(random(200, 640, dtype=dtype), None), random(300, 640, dtype=dtype, seed=1)
    whole = linear(x)
    torch.set_num_threads(2)
    assert torch.equal(linear(x), whole)
    torch.set_num_threads(1)
    for rows in (1, 2, 3, 8, 13):
        assert torch.equal(linear(x[5 : 5 + rows]), whole[5 : 5 + rows])


@pytest.mark.parametrize("dim", [16, 48, 768])
def test_rms_norm(dim: int, dtype: torch.dtype, error: float) -> None:
    norm = RMSNorm(dim, 1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(random(dim))
        x = random(2, 3, dim, dtype=dtype, seed=1) * 3
        assert torch.allclose(CompiledNorm(norm)(x).float(), norm(x).float(), rtol=error)
        assert (CompiledNorm(norm)(torch.zeros(1, dim, dtype=dtype)) == 0).all()


@pytest.mark.parametrize("hidden", [32, 42])
def test_swiglu(hidden: int, dtype: torch.dtype, error: float) -> None:
    mlp = SwiGLU(ModelConfig(dim=32, hidden_dim=hidden)).to(dtype)
    with torch.no_grad():
        mlp.gate_up.weight.mul_(30)
        x = random(3, 5, 32, dtype=dtype) * 20  # gates far out, where exp overflows
        want, got = mlp(x).float(), CompiledSwiGLU(mlp, dtype)(x).float()
        assert mlp.gate_up(x).abs().max() > 200
        assert got.isfinite().all()
        assert (got - want).norm() <= error * want.norm() + error / 10


def attention(config: ModelConfig, q, k, v, starts: list[int], keys, values) -> torch.Tensor:
    """Attend once over a cache that holds `keys` and `values` (S, G, T, E)."""
    S, capacity = len(starts), keys.shape[2]
    cache = KVCache(config, S, capacity, torch.float32, "cpu", compiled=True)
    cache.keys[0] = keys.unflatten(2, (-1, 16)).transpose(-1, -2)
    cache.values[0] = values
    positions = torch.tensor(starts)[:, None] + torch.arange(q.shape[2])
    y = CachedAttention(cache, slice(0, S), positions, capacity)(0)(q, k, v)
    for slot, start in enumerate(starts):
        assert torch.equal(cache.keys_of(slot)[0, :, start : start + q.shape[2]], k[slot].float())
    return y


def test_addresses():
    config = ModelConfig(vocab_size=8, dim=32, layers=3, attention_heads=2, heads=2)
    cache = KVCache(config, 3, 40, torch.float32, "cpu", compiled=True)
    for layer, slot in ((0, 0), (0, 2), (2, 1)):
        expected = cache.keys[layer, slot].data_ptr(), cache.values[layer, slot].data_ptr()
        assert cache.addresses(layer, slot) == expected
    for x in (torch.zeros(4, dtype=torch.int64), torch.zeros(4, 5, dtype=torch.int64), torch.zeros(4)):
        assert [cpu.address(x, row) for row in range(4)] == [x[row:].data_ptr() for row in range(4)]


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(2, 2, 16), (4, 2, 32), (3, 1, 48), (4, 4, 64)])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_attention_over_the_cache(
    heads: int, kv_heads: int, width: int, rows: int, dtype: torch.dtype, error: float
) -> None:
    config = ModelConfig(dim=heads * width, layers=2, attention_heads=heads, kv_heads=kv_heads)
    starts, capacity = [0, 5, 40], 96
    q, k, v = (random(3, n, rows, width, dtype=dtype, seed=n + i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    keys, values = (random(3, kv_heads, capacity, width, dtype=dtype, seed=7 + i).float() for i in range(2))
    got = attention(config, q, k, v, starts, keys.clone(), values.clone())
    for slot, start in enumerate(starts):
        end = start + rows
        past_k = torch.cat([keys[slot, :, :start], k[slot].float()], 1).double()
        past_v = torch.cat([values[slot, :, :start], v[slot].float()], 1).double()
        mask = torch.arange(end) <= (start + torch.arange(rows))[:, None]
        want = F.scaled_dot_product_attention(
            q[slot : slot + 1].double(), past_k[None], past_v[None], attn_mask=mask, enable_gqa=True
        )
        assert (got[slot].double() - want[0]).norm() / want.norm() < error / 2


def test_attention_of_a_row_depends_on_its_past_alone(dtype: torch.dtype) -> None:
    """The bits are the same for any window, neighbour, number of slots, span, and content beyond the position."""
    config = ModelConfig(dim=128, layers=2, attention_heads=4, kv_heads=2)
    q, k, v = (random(1, n, 8, 32, dtype=dtype, seed=i) for i, n in enumerate((4, 2, 2)))
    keys, values = (random(1, 2, 160, 32, dtype=dtype, seed=3 + i).float() for i in range(2))
    for start in (0, 7, 15, 16, 70):
        whole = attention(config, q, k, v, [start], keys.clone(), values.clone())
        for row in range(8):
            spoiled = [x.clone() for x in (keys, values)]
            for x, new in zip(spoiled, (k, v)):
                x[:, :, start + row + 1 :] = 1e3
                x[:, :, start : start + row] = new[:, :, :row].float()
            cut = [x[:, :, row : row + 1] for x in (q, k, v)]
            alone = attention(config, *cut, [start + row], *spoiled)
            assert torch.equal(alone[:, :, 0], whole[:, :, row])
            doubled = [torch.cat([x, x]) for x in (*cut, *spoiled)]
            both = attention(config, *doubled[:3], [start + row, 3], *doubled[3:])
            assert torch.equal(both[:1, :, 0], whole[:, :, row])


@pytest.mark.parametrize(("heads", "kv_heads", "bias"), [(2, 2, False), (4, 2, True), (5, 1, False)])
@pytest.mark.parametrize("chosen", [None, (2, 0, 3)])
def test_a_block_in_one_call_is_the_block(
    heads: int, kv_heads: int, bias: bool, chosen: tuple[int, ...] | None
) -> None:
    if cpu.kernels(torch.float32) is None:
        pytest.skip("no compiled kernels for fp32 here: another processor, or no C compiler")
    sizes = {"dim": heads * 32, "attention_heads": heads, "kv_heads": kv_heads, "layers": 2, "hidden_dim": 70}
    torch.manual_seed(0)
    plain = Transformer(ModelConfig(**sizes, attention_bias=bias, vocab_size=40))
    for parameter in plain.parameters():
        parameter.data = torch.randn(parameter.shape) / 6  # biases and norms too
    model = pack(copy.deepcopy(plain))
    block = model.trunk.blocks[0]
    assert isinstance(block, CompiledBlock)
    starts, rows, capacity = [0, 17, 40], 4, 64
    positions = torch.tensor(starts)[:, None] + torch.arange(rows)
    cos, sin = model.rotary(positions, torch.float32)
    row_S = None if chosen is None else torch.tensor(chosen)
    whole = torch.randn(3, capacity, sizes["dim"])  # of which `rows` from each start are new
    cache = KVCache(model.config, 3, capacity, torch.float32, "cpu", compiled=True)
    past = CachedAttention(cache, slice(0, 3), torch.arange(capacity).repeat(3, 1), capacity)(0)
    with torch.no_grad():
        everywhere = model.rotary(torch.arange(capacity).repeat(3, 1), torch.float32)
        block(whole, everywhere, past)
        for slot, start in enumerate(starts):  # the pass overwrites its own positions and never reads later ones
            cache.values[:, slot, :, start:] = 9.0
            for t in range(start, capacity):
                cache.keys[:, slot, :, t // 16, :, t % 16] = 9.0
        x = torch.stack([whole[slot, start : start + rows] for slot, start in enumerate(starts)])
        attend = CachedAttention(cache, slice(0, 3), positions, capacity)(0, row_S)
        got = block(x, (cos, sin), attend)
        want = plain.trunk.blocks[0](whole, everywhere)
    for slot, start in enumerate(starts):
        asked = range(rows) if chosen is None else [chosen[slot]]
        assert torch.allclose(got[slot], want[slot, [start + i for i in asked]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chosen", [None, (2, 0, 3)])
@torch.no_grad()
def test_eagles_block_in_one_call_is_its_parts(chosen: tuple[int, ...] | None) -> None:
    if cpu.kernels(torch.float32) is None:
        pytest.skip("no compiled kernels for fp32 here: another processor, or no C compiler")
    sizes = {"dim": 64, "attention_heads": 4, "kv_heads": 2, "layers": 2, "heads": 3, "vocab_size": 40}
    plain, generator = Transformer(ModelConfig(**sizes, head_kind="eagle3", wiring="causal")), torch.Generator()
    for parameter in plain.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator.manual_seed(parameter.numel())) / 6
    model = pack(plain)
    block = model.head(2).midlayer
    assert isinstance(block, CompiledBlock)
    positions = torch.tensor([[0], [17], [40]]) + torch.arange(4)
    rotary, row_S = model.rotary(positions, torch.float32), None if chosen is None else torch.tensor(chosen)
    g, ahead = torch.randn(2, 3, 4, 64, generator=generator)
    results = []
    for run in (block, block.block):
        cache = KVCache(model.config, 3, 64, torch.float32, "cpu", compiled=True)
        attend = CachedAttention(cache, slice(0, 3), positions, 64)(2, row_S)
        select = None if row_S is None else partial(gather_row, row_S=row_S, dim=1)
        results.append((run(g, rotary, attend, select, ahead_BTD=ahead), cache.keys, cache.values))
    for one, parts in zip(*results):
        assert torch.equal(one, parts) and bool(one.any())


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seeds=st.lists(st.integers(0, 1000), min_size=2, max_size=5), slots=st.integers(1, 5))
def test_with_kernels_any_batch_is_exact(dtype: torch.dtype, seeds: list[int], slots: int) -> None:
    model = packed("transformer-parallel", dtype)
    assert backend_of(model).row_exact
    prompts = [tuple(b"the cat then a dog that is"[: 3 + seed % 20]) for seed in seeds]
    requests = [
        Request(prompt, 20 + seed % 30, Sampling(seed % 2 * 1.0, seed=seed), heads=1 + seed % HEADS)
        for prompt, seed in zip(prompts, seeds)
    ]
    together = generate_all(Engine(model, EngineConfig(slots=slots)), requests)
    for request, generation in zip(requests, together):
        for exact in (True, False):
            alone = generate_all(Engine(model, EngineConfig(exact=exact)), [replace(request, heads=1)])[0]
            assert alone.tokens == generation.tokens


def test_a_model_with_kernels_is_the_model(shape: str, dtype: torch.dtype, error: float) -> None:
    tokens = torch.tensor([list(b"the cat then a dog")])
    want = trained(shape)(tokens, heads=HEADS)
    got = packed(shape, dtype)(tokens, heads=HEADS).float()
    assert any(isinstance(module, CompiledLinear) for module in packed(shape, dtype).modules())
    # Sequential heads lack the tokens that they read at the end.
    assert torch.equal(got.isnan(), want.isnan())
    got, want = got.nan_to_num(), want.nan_to_num()
    assert (got - want).norm() / want.norm() < 2 * error


def test_kernels_take_only_what_they_can_read() -> None:
    assert not CompiledBackend.supports(copy.deepcopy(trained("replicated")).double())
    odd = Transformer(ModelConfig(dim=40, layers=2, attention_heads=2)).bfloat16()
    assert not CompiledBackend.supports(odd)
    tokens = torch.tensor([[1, 2, 3]])
    want = odd(tokens)
    assert torch.allclose(pack(copy.deepcopy(odd))(tokens).float(), want.float(), atol=0.05)


def test_without_kernels_everything_still_works(tmp_path, forks) -> None:
    program = (
        "from headstart.decoding.kernels import cpu\n"
        "import torch\n"
        "assert cpu.kernels(torch.bfloat16) is None and cpu.kernels(torch.float32) is None\n"
        "from headstart.decoding.kernels.pack import pack\n"
        "from headstart.model.transformer import Transformer\n"
        "from headstart.model.config import ModelConfig\n"
        "model = pack(Transformer(ModelConfig(dim=32, layers=2, attention_heads=2)).bfloat16())\n"
        "print(model(torch.tensor([[1, 2]])).shape)"
    )
    for setting in ({"HEADSTART_NATIVE": "0"}, {"CC": "no-such-compiler"}, {"XDG_CACHE_HOME": "/proc/nowhere"}):
        status, said = forks.run(tmp_path / "said.txt", tmp_path, environments=[setting], program=program)
        assert status == 0 and "[1, 2, 256]" in said, said


def test_loading_the_kernels_leaves_denormal_numbers_alone(tmp_path, forks) -> None:
    """A library linked with -ffast-math makes them zero in the whole process that loads it."""
    program = (
        "import sys; from headstart.decoding.kernels import cpu; import torch\n"
        "cpu.kernels(torch.float32), cpu.kernels(torch.bfloat16), cpu.chooser()\n"
        "print(float(sys.argv[1]) * 1.0 > 0)"
    )
    assert forks.run(tmp_path / "said.txt", tmp_path, program=program, arguments=["5e-324"]) == (0, "True\n")
