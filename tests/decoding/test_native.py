"""The compiled kernels against torch, in shapes that fill their blocks and shapes that do not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import HEADS, packed, trained

from headstart.decoding import native
from headstart.decoding.packing import NativeLinear, NativeNorm, NativeSwiGLU, can_use_native, pack
from headstart.model.config import ModelConfig
from headstart.model.layers import RMSNorm, SwiGLU
from headstart.model.transformer import Transformer

needs_kernels = pytest.mark.skipif(
    native.library() is None, reason="no compiled kernels here: another processor, or no C compiler"
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@needs_kernels
@pytest.mark.parametrize(("N", "K"), [(32, 16), (1, 2), (77, 50), (256, 128), (33, 48), (16, 6)])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 20])
def test_linear(N: int, K: int, rows: int) -> None:
    weight, x = random(N, K), random(rows, K, seed=1)
    bias = random(N, seed=2) if N % 2 else None
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got = NativeLinear(weight, bias)(x)
        torch.set_num_threads(1)
        want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert got.shape == (rows, N) and got.dtype == torch.bfloat16
        assert ((got.double() - want).abs() <= 0.01 * want.abs() + 0.02).all()


@needs_kernels
def test_a_row_depends_on_itself_alone() -> None:
    """Not even on how many there are: the bits are the same for 1 and for 300 rows, for 1 and for 2 threads."""
    linear, x = NativeLinear(random(200, 640), None), random(300, 640, seed=1)
    whole = linear(x)
    torch.set_num_threads(2)
    assert torch.equal(linear(x), whole)
    torch.set_num_threads(1)
    for rows in (1, 3, 8, 13):
        assert torch.equal(linear(x[5 : 5 + rows]), whole[5 : 5 + rows])


@needs_kernels
@pytest.mark.parametrize("dim", [16, 48, 768])
def test_rms_norm(dim: int) -> None:
    norm = RMSNorm(dim, 1e-5).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(random(dim))
        x = random(2, 3, dim, seed=1) * 3
        assert torch.allclose(NativeNorm(norm)(x).float(), norm(x).float(), rtol=0.01)
        assert (NativeNorm(norm)(torch.zeros(1, dim).bfloat16()) == 0).all()


@needs_kernels
@pytest.mark.parametrize("hidden", [32, 42])
def test_swiglu(hidden: int) -> None:
    mlp = SwiGLU(ModelConfig(dim=32, hidden_dim=hidden)).bfloat16()
    with torch.no_grad():
        x = random(3, 5, 32) * 20  # gates far out, where exp overflows
        want, got = mlp(x).float(), NativeSwiGLU(mlp)(x).float()
        assert got.isfinite().all()
        assert (got - want).norm() <= 0.01 * want.norm() + 1e-3


@needs_kernels
def test_a_model_with_kernels_is_the_model(shape: str) -> None:
    tokens = torch.tensor([list(b"the cat then a dog")])
    want = packed(shape, torch.float32)(tokens, heads=HEADS)
    got = packed(shape, torch.bfloat16)(tokens, heads=HEADS).float()
    assert any(isinstance(module, NativeLinear) for module in packed(shape, torch.bfloat16).modules())
    assert (got - want).norm() / want.norm() < 2e-2


def test_kernels_take_only_what_they_can_read() -> None:
    import copy

    assert not can_use_native(trained("replicated"))  # fp32
    odd = Transformer(ModelConfig(dim=40, layers=2, attention_heads=2)).bfloat16()
    assert not can_use_native(odd)
    tokens = torch.tensor([[1, 2, 3]])
    want = odd(tokens)
    assert torch.allclose(pack(copy.deepcopy(odd))(tokens).float(), want.float(), atol=0.05)


def test_without_kernels_everything_still_works() -> None:
    program = (
        "from headstart.decoding import native\n"
        "assert native.library() is None\n"
        "import torch\n"
        "from headstart.decoding.packing import pack\n"
        "from headstart.model.transformer import Transformer\n"
        "from headstart.model.config import ModelConfig\n"
        "model = pack(Transformer(ModelConfig(dim=32, layers=2, attention_heads=2)).bfloat16())\n"
        "print(model(torch.tensor([[1, 2]])).shape)"
    )
    import os

    for setting in ({"HEADSTART_NATIVE": "0"}, {"CC": "no-such-compiler"}):
        environment = {**os.environ, **setting}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "[1, 2, 256]" in done.stdout, done.stderr
