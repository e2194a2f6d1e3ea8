"""The written-out attention against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from headstart.model import attention
from headstart.model.attention import (
    BLOCK,
    WRITTEN_OUT_LENGTH,
    DocumentAttention,
    blocked_attention,
    causal_attention,
    product_attention,
)


@pytest.mark.parametrize("written_out", [product_attention, blocked_attention])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_written_out_equals_torchs(kv_heads: int, written_out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 4)  # two whole blocks and a row
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 9, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, kv_heads, 9, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, kv_heads, 9, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    got = written_out(q, k, v)
    assert torch.allclose(got, want, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(want.square().sum(), (q, k, v)), torch.autograd.grad(got.square().sum(), (q, k, v))
    ):
        assert torch.allclose(a, b, atol=1e-12)


def test_both_attentions_agree_in_bf16_on_either_side_of_the_switch() -> None:
    for length in (WRITTEN_OUT_LENGTH, WRITTEN_OUT_LENGTH + 1):
        q, k, v = torch.randn(3, 1, 2, length, 16, generator=torch.Generator().manual_seed(1)).unbind(0)
        want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        got = causal_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).float()
        assert (got - want).norm() / want.norm() < 2e-2


@pytest.mark.parametrize("length", [BLOCK, BLOCK + 1, 300, WRITTEN_OUT_LENGTH, WRITTEN_OUT_LENGTH + 1])
def test_attention_in_fp32_is_torchs_on_either_side_of_each_switch(length: int) -> None:
    q, k, v = torch.randn(3, 1, 2, length, 16, generator=torch.Generator().manual_seed(1)).unbind(0)
    q.requires_grad_()
    want, got = F.scaled_dot_product_attention(q, k, v, is_causal=True), causal_attention(q, k, v)
    assert torch.allclose(got, want, atol=1e-6)
    (a,), (b,) = (torch.autograd.grad(y.square().sum(), [q]) for y in (want, got))
    assert torch.allclose(a, b, atol=1e-5)
    assert ("Blocked" in str(got.grad_fn.next_functions)) == (BLOCK < length <= WRITTEN_OUT_LENGTH)


@pytest.mark.slow
def test_blocked_attention_compiles() -> None:
    q, k, v = torch.randn(3, 2, 2, 200, 16, generator=torch.Generator().manual_seed(1)).unbind(0)
    for x in (q, k, v):
        x.requires_grad_()
    results = []
    for function in (blocked_attention, torch.compile(blocked_attention)):
        y = function(q, k, v)
        results.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-4)


def test_a_window_is_the_mask_it_says() -> None:
    """A window that reaches everything changes no bit, with documents and without."""
    q, k, v = torch.randn(3, 2, 2, 40, 16, generator=torch.Generator().manual_seed(1)).unbind(0)
    row, column = torch.arange(40)[:, None], torch.arange(40)
    documents = (torch.arange(40) // 15).expand(2, -1)
    for attend, apart in ((causal_attention, False), (DocumentAttention(documents), True)):
        for window in (1, 7, 39):
            sees = (column <= row) & (row - column < window)
            if apart:
                sees &= documents[0][:, None] == documents[0]
            want = F.scaled_dot_product_attention(q, k, v, attn_mask=sees)
            assert torch.allclose(attend(q, k, v, window=window), want, atol=1e-6)
        assert torch.equal(attend(q, k, v, window=40), attend(q, k, v))
