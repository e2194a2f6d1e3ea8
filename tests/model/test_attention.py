"""The written-out attention against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from headstart.model.layers import PRODUCT_ATTENTION_LENGTH, causal_attention, product_attention


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_product_attention_equals_torchs(kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 9, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, kv_heads, 9, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, kv_heads, 9, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    got = product_attention(q, k, v)
    assert torch.allclose(got, want, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(want.square().sum(), (q, k, v)), torch.autograd.grad(got.square().sum(), (q, k, v))
    ):
        assert torch.allclose(a, b, atol=1e-12)


def test_both_attentions_agree_in_bf16_on_either_side_of_the_switch() -> None:
    for length in (PRODUCT_ATTENTION_LENGTH, PRODUCT_ATTENTION_LENGTH + 1):
        q, k, v = torch.randn(3, 1, 2, length, 16, generator=torch.Generator().manual_seed(1)).unbind(0)
        want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        got = causal_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).float()
        assert (got - want).norm() / want.norm() < 2e-2
