"""Compare the Triton kernels with torch: on a GPU in bf16, elsewhere in fp32 through Triton's interpreter.

`TRITON_INTERPRET=1 pytest tests/decoding/test_gpu_kernels.py` asks for the interpreter; it needs triton 3.6 and numpy
below 2.4.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":  # it would hold for every kernel of the process
    pytest.skip("no GPU here, and Triton's interpreter was not asked for", allow_module_level=True)
pytest.importorskip("triton", reason="no Triton here; it comes with torch for GPUs")
launch = pytest.importorskip("headstart.decoding.kernels.cuda.launch")

from headstart.model.rotary import rotary_tables, rotate  # noqa: E402

DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
SHARE = launch.Share(16, 64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


def assert_near(got: Tensor, want: Tensor) -> None:
    bound = 1e-2 if ON_GPU else 1e-5
    assert (got.double() - want.double()).norm() <= bound * want.double().norm()


@pytest.mark.parametrize("most", [64, 2], ids=["few rows", "many rows"])
def test_products(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(launch, "MOST_ROWS", most)
    x, weight, bias, residual = random(3, 256), random(48, 256, seed=1), random(48, seed=2), random(3, 48, seed=3)
    assert_near(launch.linear(x, weight, share=SHARE), F.linear(x, weight))
    assert_near(launch.linear(x, weight, bias, residual, share=SHARE), F.linear(x, weight, bias) + residual)
    gate, up = F.linear(x, weight).chunk(2, -1)
    assert_near(launch.linear(x, weight, gated=True, share=SHARE), F.silu(gate) * up)
    odd = random(3, 100), random(10, 100, seed=1)  # neither width a multiple of what a program takes
    assert_near(launch.linear(*odd, share=SHARE), F.linear(*odd))


def test_norm() -> None:
    x, weight = random(3, 100), random(100, seed=1)
    assert_near(launch.norm(x, weight, 1e-5), F.rms_norm(x, (100,), weight, 1e-5))


@pytest.mark.parametrize("most", [64, 2], ids=["few rows", "many rows"])
def test_queries_are_turned_and_keys_laid_into_the_cache(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(launch, "MOST_ROWS", most)
    S, W, D, H, K, E, T = 2, 3, 64, 4, 2, 16, 40
    x, weight, bias = random(S, W, D), random((H + 2 * K) * E, D, seed=1) / 8, random((H + 2 * K) * E, seed=2)
    positions = torch.tensor([[20, 21, 22], [-3, -2, -1]], device=DEVICE)  # the second slot takes no part
    tables = rotary_tables(positions.clamp_min(0), E, 1e4, DTYPE)
    keys, values = random(S, K, T, E, seed=3), random(S, K, T, E, seed=4)
    want_keys, want_values = keys.clone(), values.clone()
    queries = launch.rotated_qkv(x, weight, bias, tables, positions, (keys, values), H, launch.Share(8, 32))
    qkv = F.linear(x, weight, bias).view(S, W, -1, E)
    turned = rotate(qkv[:, :, : H + K], *tables)
    for slot in range(S):
        for row in range(W):
            want_keys[slot, :, positions[slot, row]] = turned[slot, row, H:]
            want_values[slot, :, positions[slot, row]] = qkv[slot, row, H + K :]
    assert_near(queries, turned[:, :, :H])
    assert_near(keys, want_keys)
    assert_near(values, want_values)


@pytest.mark.parametrize("one", [False, True], ids=["all rows", "one row"])
def test_attention(one: bool) -> None:
    S, W, H, K, E, T = 2, 3, 4, 2, 16, 300
    queries, keys, values = random(S, W, H, E), random(S, K, T, E, seed=1), random(S, K, T, E, seed=2)
    positions = torch.tensor([[200, 201, 202], [3, 4, 5]], device=DEVICE)
    row = torch.tensor([1, 0], device=DEVICE) if one else None
    got = launch.attend(queries, keys, values, positions, row, 256)
    mask = (torch.arange(256, device=DEVICE) <= positions[..., None])[:, None]
    want = F.scaled_dot_product_attention(
        queries.transpose(1, 2), keys[:, :, :256], values[:, :, :256], attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)
    assert_near(got, want if row is None else want[torch.arange(S, device=DEVICE), row][:, None])


@pytest.mark.skipif(not ON_GPU, reason="the interpreter's products are those of numpy")
def test_a_row_of_a_product_has_the_same_bits_whatever_lies_beside_it() -> None:
    """However many rows there are, in programs of any size."""
    x, weight = random(40, 128), random(32, 128, seed=1)
    alone = launch.linear(x[:1], weight, share=SHARE)
    for rows, share in ((2, SHARE), (17, SHARE), (40, SHARE), (40, launch.Share(32, 32, 2, 3))):
        assert torch.equal(launch.linear(x[:rows], weight, share=share)[:1], alone), (rows, share)


@pytest.mark.parametrize("span", [128, 300])
def test_a_row_of_attention_has_the_same_bits_however_far_the_cache_is_read(span: int) -> None:
    queries, keys, values = random(1, 3, 2, 16), random(1, 2, 300, 16, seed=1), random(1, 2, 300, 16, seed=2)
    positions = torch.tensor([[98, 99, 100]], device=DEVICE)
    alone = launch.attend(queries[:, :1].contiguous(), keys, values, positions[:, :1].contiguous(), None, 128)
    assert torch.equal(launch.attend(queries, keys, values, positions, None, span)[:, :1], alone)
