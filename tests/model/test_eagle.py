"""Steps of one module over one cache, EAGLE-3's and MiMo's, against their definition, position by position."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.data.batches import IGNORE
from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.model.eagle import default_features
from headstart.model.rotary import rotate
from headstart.model.transformer import Transformer
from headstart.objective.inputs import StepInputs, count_targets
from headstart.objective.objective import Objective
from headstart.objective.walk import walk_step
from tests.models import random_model

SMALL = ModelConfig(
    vocab_size=61, dim=32, layers=7, attention_heads=4, kv_heads=2, context=64, heads=4, head_kind="eagle3",
    wiring="causal",
)  # fmt: skip
GEMMA = {
    **{"qk_norm": "head", "norm_placement": "both", "norm_offset": True, "scaled_embedding": True, "window": 4},
    **{"window_layers": (0, 2), "local_rope_theta": 100.0, "activation": "gelu_tanh"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "draft vocabulary": {"draft_vocab": 9},
    "normed": {"norm_output": True},
    "last": {"features": (7,)},
    "two and the embedding": {"features": (0, 5), "tied": True},
    "one": {"features": (3,)},
    "like Qwen2": {"qkv_bias": True},
    "like Mistral": {"window": 3},
    "like Gemma 3": GEMMA,
    "sequential": {"head_kind": "sequential", "norm_output": True},
    "sequential, like Mistral": {"head_kind": "sequential", "norm_output": True, "window": 3, "draft_vocab": 9},
}


def rms(x: Tensor, norm: Any) -> Tensor:
    weight = norm.weight + 1 if norm.offset else norm.weight
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * weight


def states_of(model: Transformer, tokens_T: Tensor) -> list[Tensor]:
    """Return the inputs (T, D) of all layers, and the trunk's output, from hooks."""
    inputs: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0])) for block in model.trunk.blocks]
    latents = model.latents(tokens_T[None], [1])
    for hook in hooks:
        hook.remove()
    return [*inputs, latents[1][0]]


def reference_logits(model: Transformer, tokens_T: Tensor, t: int) -> list[Tensor]:
    """Return the logits of heads 2.. at position t, each over the draft vocabulary, with plain full attention."""
    config, head = model.config, model.head(2)
    eagle, E, D = config.head_kind == "eagle3", config.dim_per_head, config.dim
    block = head.midlayer if eagle else head.block
    H, K = config.attention_heads, config.key_value_heads
    states = states_of(model, tokens_T)
    features = default_features(config.layers) if config.features is None else config.features

    def stream(g: Tensor, token: Tensor) -> Tensor:
        """Return what the block adds to: g, or in MiMo g and the token, joined."""
        if eagle:
            return g
        parts = rms(g, head.latent_norm), rms(model.trunk.embedding(token), head.token_norm)
        return head.join.weight @ torch.cat(parts)

    def entry(g: Tensor, token: Tensor, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value of one position."""
        if eagle:
            x = torch.cat([rms(model.trunk.embedding(token), block.attention_norm), rms(g, block.hidden_norm)])
        else:
            x = rms(stream(g, token), block.attention_norm)
        qkv = (block.attention.qkv.weight @ x).view(H + 2 * K, E)
        cos, sin = (table[..., :E] for table in model.rotary(torch.tensor([position]), torch.float64))
        qk = rotate(qkv[None, None, : H + K], cos[None], sin[None])[0, 0]
        return qk[:H], qk[H:], qkv[H + K :]

    def joined(s: int) -> Tensor:
        if not eagle:
            return states[-1][s]
        g = torch.cat([states[layer][s] for layer in features])
        return g if head.fc is None else head.fc.weight @ g

    entries = [entry(joined(s), tokens_T[s + 1], s) for s in range(t + 1)]
    g, found = joined(t), []
    for d in range(1, config.heads):
        if t + d >= len(tokens_T):
            break
        if d > 1:
            entries.append(entry(g, tokens_T[t + d], t + d - 1))
        query = entries[-1][0]
        mixed = []
        for h in range(H):
            keys = torch.stack([key[h // (H // K)] for _, key, _ in entries])
            values = torch.stack([value[h // (H // K)] for *_, value in entries])
            mixed.append((keys @ query[h] / E**0.5).softmax(0) @ values)
        g = stream(g, tokens_T[t + d]) + block.attention.out.weight @ torch.cat(mixed)
        gate, up = (block.mlp.gate_up.weight @ rms(g, block.mlp_norm)).chunk(2)
        g = g + block.mlp.down.weight @ (F.silu(gate) * up)
        if head.norm is not None:
            g = rms(g, head.norm)
        normed = g if head.norm is not None else rms(g, model.unembedding.draft_norm)
        found.append(model.unembedding.weight(2) @ normed)
        assert normed.shape == (D,)
    return found


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_each_step_attends_to_step_1_and_to_its_own_drafts(name: str) -> None:
    model = random_model(replace(SMALL, **VARIANTS[name]), dtype=torch.float64)
    x = torch.arange(3, 3 + 10) * 7 % 61
    logits, drafted = model(x[None], heads=4)[0], model.unembedding.d2t
    for t in range(9):
        found = reference_logits(model, x, t)
        for k, expected in enumerate(found, start=2):
            mine = logits[t, k - 1] if drafted is None else logits[t, k - 1, drafted]
            assert (mine - expected).abs().max() < 1e-10, (t, k)
    for k in range(1, 5):  # NaN where the tokens between are missing
        assert logits[: 10 - k + 1, k - 1].isnan().sum() == 0 and logits[10 - k + 1 :, k - 1].isnan().all()


@pytest.mark.parametrize("name", ["plain", "normed", "last", "like Gemma 3", "sequential"])
@pytest.mark.parametrize("trained", ["all", "heads"])
def test_gradients_are_those_of_the_definition(name: str, trained: str) -> None:
    model = random_model(replace(SMALL, **VARIANTS[name]), dtype=torch.float64)
    if trained == "heads":
        model.trunk.requires_grad_(False)
    T, weights = 5, [0.0, 1.0, 0.8, 0.5]
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 61, (2, T + 3), generator=generator)
    targets = torch.randint(0, 61, (2, T, 4), generator=generator)
    targets[1, 3, 2] = IGNORE
    counts = count_targets(targets)
    loss = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        for t in range(T):
            for k, logits in enumerate(reference_logits(model, tokens[row], t), start=2):
                if targets[row, t, k - 1] != IGNORE:
                    loss = loss + weights[k - 1] / int(counts[k - 1]) * F.cross_entropy(logits, targets[row, t, k - 1])
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    walk_step(model, StepInputs(tokens, targets), counts, Objective(weights))
    mine = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert mine.keys() >= expected.keys() and any("attention.qkv" in name for name in expected if "heads" in name)
    for name, gradient in mine.items():  # 0 above the last layer that a head reads
        bound = 1e-9 * expected[name].norm() if name in expected else 0
        assert (gradient - expected.get(name, 0)).norm() <= bound, name


@torch.no_grad()
def test_documents_end_what_a_step_sees_of_others() -> None:
    model = random_model(SMALL, dtype=torch.float64)
    x = torch.arange(12)[None] * 5 % 61
    documents = torch.tensor([[0] * 5 + [1] * 7])
    other = x.clone()
    other[0, :3] = 60
    row = [model(tokens, heads=4, documents_BT=documents)[0, 5:9] for tokens in (x, other)]
    assert torch.equal(*row) and not torch.equal(model(x, heads=4)[0, 5:9], model(other, heads=4)[0, 5:9])
    assert (row[0] - model(x[:, 5:], heads=4)[0, :4]).abs().max() < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_in_other_dtypes(dtype: torch.dtype) -> None:
    """Rows of several blocks of `_Blocked`, and its replacement in bf16."""
    model = random_model(replace(SMALL, context=512, heads=3), scale=0.05)
    x = torch.randint(0, 61, (2, 300), generator=torch.Generator().manual_seed(4))
    wide = model.double()(x, heads=3)[:, :298]
    narrow = model.to(dtype)(x, heads=3)[:, :298].double()
    assert (wide - narrow).norm() < (1e-5 if dtype == torch.float32 else 0.05) * wide.norm()


def test_features() -> None:
    assert [default_features(layers) for layers in (1, 2, 6, 7, 30)] == [
        (0, 1), (0, 1, 2), (4, 5, 6), (2, 3, 4), (2, 15, 27),
    ]  # fmt: skip
    assert replace(SMALL, features=(1, 7)).handed_out == (1,) and replace(SMALL, features=(1, 7)).state_dim == 64
    assert replace(SMALL, heads=1).state_dim == 32
    for features in ((), (3, 3), (4, 2), (2, 8)):
        with pytest.raises(UsageError, match=r"model\.features is .* it must ascend, up to 7"):
            replace(SMALL, features=features)
    with pytest.raises(UsageError, match=r"model\.features is for eagle3 heads, not medusa"):
        ModelConfig(heads=2, head_kind="medusa", features=(1,))
    with pytest.raises(UsageError, match=r"model\.norm_output is for eagle3 and sequential heads"):
        ModelConfig(heads=2, norm_output=True)
    with pytest.raises(UsageError, match=r"model\.norm_output makes sequential heads steps of one module"):
        ModelConfig(heads=3, head_kind="sequential", wiring="causal", shared=False, norm_output=True)
