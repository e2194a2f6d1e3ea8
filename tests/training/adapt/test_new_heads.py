"""New heads begin as they should, and head 1 stays the model that was there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.training.adapt.new_heads import config_with_heads, freeze, new_parameters, with_heads
from tests.models import random_model

PLAIN = ModelConfig(vocab_size=47, dim=32, layers=3, attention_heads=4, kv_heads=2, context=32)
KINDS: dict[str, dict[str, Any]] = {
    "transformer": {"kind": "transformer"},
    "causal": {"kind": "transformer", "wiring": "causal"},
    "linear": {"kind": "linear"},
    "linear causal": {"kind": "linear", "wiring": "causal"},
    "replicated": {"kind": "replicated"},
    "medusa": {"kind": "medusa"},
    "medusa own": {"kind": "medusa", "shared": False},
    "stern": {"kind": "stern"},
    "sequential": {"kind": "sequential"},
    "sequential own": {"kind": "sequential", "shared": False},
    "sequential normed": {"kind": "sequential", "norm_output": True},
    "eagle3": {"kind": "eagle3"},
    "eagle3.1": {"kind": "eagle3", "features": (3,), "norm_output": True},
}
BEGIN_AS_HEAD_1 = [kind for kind in KINDS if kind != "causal" and kind[:5] not in ("seque", "eagle")]
TOKENS = torch.arange(24).reshape(2, 12) % 47


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_head_1_stays_the_model_to_the_bit(kind: str, tied: bool) -> None:
    old = random_model(replace(PLAIN, tied=tied))
    before = old(TOKENS)
    config = config_with_heads(old.config, 4, **KINDS[kind])
    assert config.next_token_layers == 3 and config.heads == 4 and config.tied == tied
    new = with_heads(old, config)
    assert torch.equal(new(TOKENS), before)
    logits = new(TOKENS, heads=4)[:, :8]  # sequential heads know no more
    if kind in BEGIN_AS_HEAD_1:
        assert all(torch.equal(logits[:, :, k], logits[:, :, 0]) for k in (1, 2, 3))
    assert logits.isfinite().all()
    # New heads own what they have: training them moves nothing else.
    own = new_parameters(new)
    theirs = {p.data_ptr() for p in old.parameters()}
    for name, parameter in new.named_parameters():
        assert (parameter.data_ptr() not in theirs) == (name in own), name
    freeze(new)
    assert {name for name, p in new.named_parameters() if p.requires_grad} == own


@pytest.mark.parametrize("kind", ["transformer", "medusa", "sequential"])
def test_families_whose_layers_differ_keep_them(kind: str) -> None:
    """Test a model like Gemma 3: norms that add to 1, and sliding layers with rotary positions of their own."""
    config = replace(
        PLAIN, tied=True, qk_norm="head", norm_placement="both", norm_offset=True, scaled_embedding=True, window=4,
        window_layers=(0, 2), local_rope_theta=100.0, activation="gelu_tanh",
    )  # fmt: skip
    old = random_model(config)
    new = with_heads(old, config_with_heads(config, 3, kind))  # type: ignore[arg-type]
    assert torch.equal(new(TOKENS), old(TOKENS))
    if kind != "sequential":
        assert torch.equal(new(TOKENS, heads=3)[:, :, 2], old(TOKENS))


def test_a_sequential_head_passes_the_latent_and_ignores_the_token() -> None:
    old = random_model(PLAIN)
    new = with_heads(old, config_with_heads(old.config, 2, "sequential"))
    join = new.heads[1].join.weight
    assert torch.equal(join[:, :32], torch.eye(32)) and not join[:, 32:].any()
    other = TOKENS.clone()
    other[:, 6] = 46
    # Head 2 at position 5 reads token 6 in addition to its latent, which knows tokens up to 5.
    assert torch.equal(new(TOKENS, heads=2)[:, 5, 1], new(other, heads=2)[:, 5, 1])


@pytest.mark.parametrize("norm_offset", [False, True])
def test_the_block_of_a_sequential_head_reads_latents_as_large_as_those_of_the_trunk(norm_offset: bool) -> None:
    """At any other size, the copied block's products would drown its input, or vanish in it."""
    old = random_model(replace(PLAIN, norm_offset=norm_offset))
    with torch.no_grad():
        old.trunk.embedding.weight *= 30
    z_BTD = old.latents(TOKENS, [])[0]
    head = with_heads(old, config_with_heads(old.config, 2, "sequential")).heads[1]
    joined = head.join(torch.cat([head.latent_norm(z_BTD), head.token_norm(z_BTD)], -1))
    assert 0.7 < float((joined.norm() / z_BTD.norm()).detach()) < 1.4


def test_heads_of_a_model_that_has_some_are_replaced_if_asked() -> None:
    """Also where head 1 lies behind others (anticausal): its path stays whole."""
    for wiring in ("parallel", "anticausal"):
        old = random_model(replace(PLAIN, layers=4, heads=3, wiring=wiring))
        before = old(TOKENS)
        with pytest.raises(UsageError, match="heads already"):
            config_with_heads(old.config, 2, "medusa")
        for kind in ("medusa", "transformer"):
            config = config_with_heads(old.config, 2, kind, replace_heads=True)  # type: ignore[arg-type]
            assert torch.equal(with_heads(old, config)(TOKENS), before)


def test_heads_take_the_last_layers_of_the_trunk() -> None:
    """The paper's "+0 layers": nothing is added, head 1 keeps its block and heads 2 and up take those before it."""
    old = random_model(replace(PLAIN, layers=6))
    config = config_with_heads(old.config, 3, take_layers=True)
    new = with_heads(old, config)
    assert config.trunk_layers == 3 and config.parameters()["total"] == old.config.parameters()["total"]
    blocks = [*old.trunk.blocks, old.heads[0]]
    for block, theirs in zip([*new.trunk.blocks, new.heads[1], new.heads[2], new.heads[0]], blocks, strict=True):
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in block.state_dict().items())
    own = new_parameters(new)
    theirs = {p.data_ptr() for p in old.parameters()}
    assert all((p.data_ptr() not in theirs) == (name in own) for name, p in new.named_parameters())


@pytest.mark.parametrize(
    ("config", "arguments", "told"),
    [
        (PLAIN, {"heads": 1}, "--heads is 1"),
        (PLAIN, {"wiring": "anticausal"}, "would read the new heads and change"),
        (replace(PLAIN, layers=1, head_kind="linear"), {}, "one layer"),
        (PLAIN, {"kind": "medusa", "take_layers": True}, "take_layers is for transformer heads, not medusa"),
        (PLAIN, {"take_layers": True}, "4 heads leave no layer of 3 to the trunk"),
        (replace(PLAIN, layers=6, nope_layers=(1,)), {"take_layers": True}, "the layers of the model differ"),
        (PLAIN, {"kind": "medusa", "wiring": "causal"}, "set model.wiring to parallel"),
        (PLAIN, {"kind": "stern", "shared": False}, "model.shared false"),
        (replace(PLAIN, heads=2, head_kind="linear", wiring="anticausal"), {"replace_heads": True}, "no plain decoder"),
    ],
)
def test_what_cannot_be_is_told(config: ModelConfig, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        config_with_heads(config, **({"heads": 4} | arguments))


def test_a_model_of_one_layer_gets_heads_of_other_kinds() -> None:
    old = random_model(replace(PLAIN, layers=1, head_kind="linear"))
    new = with_heads(old, config_with_heads(old.config, 3, "sequential"))
    assert torch.equal(new(TOKENS), old(TOKENS))
