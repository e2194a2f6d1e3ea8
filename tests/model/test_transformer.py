"""Forward passes: shapes, causality, document masks, rotary positions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headstart.model.config import ModelConfig
from headstart.model.layers import Attention, rotary_tables, rotate
from headstart.model.transformer import Transformer
from tests.models import WIRINGS, random_model, with_heads_of

SMALL = ModelConfig(vocab_size=61, dim=32, layers=5, attention_heads=4, kv_heads=2, context=64, heads=3)
every_wiring = pytest.mark.parametrize(
    ("kind", "wiring"), [each for each in WIRINGS if not each[0].startswith(("sequential", "eagle"))]
)
"""Heads that predict from what the trunk alone has read."""


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(1))


@every_wiring
@pytest.mark.parametrize("n", [1, 3])
@torch.no_grad()
def test_shapes(kind: str, wiring: str, n: int) -> None:
    model = Transformer(with_heads_of(SMALL, kind, wiring, heads=n))
    x = tokens(2, 7)
    assert model(x).shape == (2, 7, 61)
    for heads in range(1, n + 1):
        logits = model(x, heads=heads)
        assert logits.shape == (2, 7, heads, 61) and logits.isfinite().all()
        assert torch.equal(logits[:, :, 0], model(x))
    latents = model.latents(x, list(range(1, n + 1)))
    assert sorted(latents) == list(range(n + 1))
    assert all(latent.shape == (2, 7, 32) for latent in latents.values())
    assert set(model.latents(x, [1])) == {0, *model.path(1)}


@every_wiring
@torch.no_grad()
def test_no_head_sees_the_future(kind: str, wiring: str) -> None:
    model = random_model(with_heads_of(SMALL, kind, wiring), dtype=torch.float64)
    x = tokens(1, 10)
    before = model(x, heads=3)
    for t in range(10):
        changed = x.clone()
        changed[0, t] = (x[0, t] + 1) % SMALL.vocab_size
        after = model(changed, heads=3)
        assert torch.equal(after[:, :t], before[:, :t])
        # And each head sees position t itself.
        assert ((after[:, t] - before[:, t]).abs().amax(-1) > 1e-6).all()


@every_wiring
@torch.no_grad()
def test_packed_documents_are_read_as_if_alone(kind: str, wiring: str) -> None:
    model = random_model(with_heads_of(SMALL, kind, wiring), dtype=torch.float64)
    lengths = [5, 1, 9, 3]
    row = tokens(1, sum(lengths))
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    packed = model(row, heads=3, documents_BT=documents)
    alone = torch.cat([model(piece, heads=3) for piece in row.split(lengths, dim=1)], dim=1)
    assert (packed - alone).abs().max() < 1e-10
    assert (model(row, heads=3) - alone).abs().max() > 1e-3  # without the mask they do see one another


@torch.no_grad()
def test_only_differences_of_positions_matter() -> None:
    attention = random_model(SMALL, dtype=torch.float64).heads[0].attention
    assert isinstance(attention, Attention)
    x = torch.randn(1, 8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    near, far = (
        attention(x, rotary_tables(torch.arange(start, start + 8), 8, 10000.0, torch.float64)) for start in (0, 5000)
    )
    assert (near - far).abs().max() < 1e-10


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rotary_positions_are_those_of_llama(theta: float) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": theta}
    )
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(2, 4, 50, 8, generator=generator) for _ in range(2))
    positions = torch.arange(50)[None].expand(2, -1)
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, positions)
    expected = llama.apply_rotary_pos_emb(q, k, cos, sin)
    tables = rotary_tables(positions, 8, theta, torch.float32)
    for x, turned in zip((q, k), expected):
        assert (rotate(x.transpose(1, 2), *tables).transpose(1, 2) - turned).abs().max() < 1e-5


def test_far_positions_stay_exact() -> None:
    """Angles in fp32 are off by 1e-2 at a million; ours are computed in fp64, whatever the tables' dtype."""
    position = torch.tensor([1_000_003])
    cos, _ = rotary_tables(position, 8, 10000.0, torch.float32)
    exact = (1_000_003 * 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)).cos()
    assert (cos[0, 0, :4] - exact).abs().max() < 1e-6


@torch.no_grad()
def test_a_block_gives_the_rows_that_are_asked_for() -> None:
    """Decoding wants few of many rows: `select` and `attend` pick them, keys and values come from all."""
    model = random_model(SMALL, dtype=torch.float64)
    block = model.heads[1]
    x = torch.randn(2, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    rotary = model.rotary(torch.arange(6), torch.float64)
    from headstart.model.attention import causal_attention

    some = block(x, rotary, lambda q, k, v: causal_attention(q, k, v)[:, :, 4:], lambda rows: rows[:, 4:])
    assert (some - block(x, rotary)[:, 4:]).abs().max() < 1e-12


def test_initialisation() -> None:
    torch.manual_seed(0)
    config = ModelConfig(dim=128, layers=8, attention_heads=4, heads=2, attention_bias=True)
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        expected = 0.02 / 4 if name.endswith(("out.weight", "down.weight")) else 0.02
        if parameter.ndim == 2:
            assert abs(parameter.std().item() / expected - 1) < 0.1, name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float("bias" not in name))), name
    first = [p.clone() for p in model.parameters()]
    model.reset_parameters(torch.Generator().manual_seed(7))
    second = [p.clone() for p in model.parameters()]
    model.reset_parameters(torch.Generator().manual_seed(7))
    assert all(torch.equal(a, b) for a, b in zip(second, model.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(first, second))


def test_a_tied_unembedding_is_the_embedding() -> None:
    model = Transformer(replace(SMALL, tied=True))
    assert model.unembedding.weights[0] is model.trunk.embedding.weight
    replicated = Transformer(replace(SMALL, tied=True, head_kind="replicated"))
    assert [w is replicated.trunk.embedding.weight for w in replicated.unembedding.weights] == [True, False, False]


@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_a_sequential_head_sees_the_tokens_up_to_the_one_before_its_own(shared: bool) -> None:
    model = random_model(replace(SMALL, head_kind="sequential", wiring="causal", shared=shared), dtype=torch.float64)
    x = tokens(1, 10)
    before = model(x, heads=3)
    for k in range(1, 4):
        assert before[:, : 10 - k + 1, k - 1].isfinite().all() and before[:, 10 - k + 1 :, k - 1].isnan().all()
    for t in range(10):
        changed = x.clone()
        changed[0, t] = (x[0, t] + 1) % SMALL.vocab_size
        difference = (model(changed, heads=3) - before).abs().amax(-1)[0]
        for k in range(1, 4):
            first = max(0, t - k + 1)
            assert (difference[:first, k - 1] == 0).all(), (t, k)
            assert first > 10 - k or difference[first, k - 1] > 1e-6, (t, k)
    for length in range(1, 4):  # shorter than what heads read ahead
        assert model(x[:, :length], heads=3).shape == (1, length, 3, 61)


@torch.no_grad()
def test_a_sequential_head_is_deepseeks_module() -> None:
    """Its formula once more: h' = M [norm(h_{k-1}); norm(E(x_{t+k-1}))], a block over h', the shared output."""
    model = random_model(replace(SMALL, head_kind="sequential", wiring="causal", shared=False), dtype=torch.float64)
    x, eps = tokens(2, 9), SMALL.norm_eps

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    rotary = model.rotary(torch.arange(9), torch.float64)
    h, logits = model.trunk(x, rotary), model(x, heads=3)
    for k in (2, 3):
        head, known = model.head(k), 9 - k + 1
        token = model.trunk.embedding.weight[x[:, k - 1 :]]
        pair = torch.cat([norm(h[:, :known], head.latent_norm.weight), norm(token, head.token_norm.weight)], -1)
        h = head.block(pair @ head.join.weight.T, model.rotary(torch.arange(known), torch.float64))
        out = norm(h, model.unembedding.norm.weight) @ model.unembedding.weights[0].T
        assert (out - logits[:, :known, k - 1]).abs().max() < 1e-10


@torch.no_grad()
def test_medusa_and_stern_heads_stand_behind_the_final_norm() -> None:
    x = tokens(2, 5)
    for kind in ("medusa", "stern"):
        model = random_model(replace(SMALL, head_kind=kind), dtype=torch.float64)
        unembedding, residuals = model.unembedding, model.unembedding.residuals
        y = unembedding.norm(model.latents(x, [1])[1])
        for k in (2, 3):
            if kind == "medusa":
                a = residuals.maps[k - 2](y)
                out = y + a / (1 + (-a).exp())
            else:
                out = y + residuals.outputs[k - 2](residuals.hidden(y).clamp_min(0))
            assert (out @ unembedding.weights[0].T - model(x, heads=3)[:, :, k - 1]).abs().max() < 1e-10


@pytest.mark.parametrize(("shared", "tied"), [(True, False), (False, False), (False, True)])
@torch.no_grad()
def test_medusa_heads_begin_as_the_next_token_head(shared: bool, tied: bool) -> None:
    model = Transformer(replace(SMALL, head_kind="medusa", shared=shared, tied=tied))
    logits = model(tokens(2, 5), heads=3)
    assert torch.equal(logits[:, :, 1], logits[:, :, 0]) and torch.equal(logits[:, :, 2], logits[:, :, 0])
    storages = {weight.data_ptr() for weight in model.unembedding.weights}
    assert len(storages) == (1 if shared else 3)
    assert len({layer.weight.data_ptr() for layer in model.unembedding.residuals.maps}) == 2
