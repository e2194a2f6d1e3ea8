"""LoRA: what it adds, that it can be switched off and merged, and that peft reads what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from headstart.errors import UsageError
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.training.adapt.lora import Lora, LoraConfig
from headstart.training.adapt.new_heads import config_with_heads, with_heads

PLAIN = ModelConfig(vocab_size=47, dim=32, layers=2, attention_heads=4, kv_heads=2, context=32, attention_bias=True)
TOKENS = torch.arange(24).reshape(2, 12) % 47


def changed(lora: Lora, model: Transformer) -> None:
    with torch.no_grad():
        for name in sorted(lora.names):
            model.get_parameter(name).normal_(0, 0.2)


def test_it_adds_what_is_merged() -> None:
    old = Transformer(PLAIN)
    model = with_heads(old, config_with_heads(PLAIN, 3))
    before = model(TOKENS, heads=3).detach()
    lora = Lora(model, LoraConfig(rank=4, dropout=0.5))
    # The trunk's block and head 1, four maps each; the new heads have their own weights.
    assert len(lora.parts) == 8 and all(not name.startswith(("heads.1", "heads.2")) for name in lora.parts)
    assert torch.equal(model(TOKENS, heads=3), before)
    changed(lora, model)
    with torch.no_grad():
        after = model(TOKENS, heads=3)
        assert not torch.allclose(after, before, atol=1e-2)
        assert torch.allclose(lora.merged(model)(TOKENS, heads=3), after, atol=1e-5)
        with lora.off():
            assert torch.equal(model(TOKENS, heads=3), before)
    assert not torch.equal(model(TOKENS), model(TOKENS))  # dropout, where something is trained
    assert lora.merged(model).state_dict().keys() == Transformer(model.config).state_dict().keys()


@pytest.mark.parametrize("tied", [False, True])
def test_the_unembedding_may_have_a_product_too(tied: bool, tmp_path: Path) -> None:
    """Heads that share the matrix read the changed one; a tied embedding stays, and the merged model is untied."""
    model = with_heads(
        Transformer(replace(PLAIN, tied=tied)), config_with_heads(replace(PLAIN, tied=tied), 3, "medusa")
    )
    before = model(TOKENS, heads=3).detach()
    lora = Lora(model, LoraConfig(rank=4, head=True))
    assert {"unembedding.lora_A", "unembedding.lora_B"} <= lora.names
    assert torch.equal(model(TOKENS, heads=3), before)
    with torch.no_grad():
        model.unembedding.get_parameter("lora_B").normal_(0, 0.2)
        after, merged = model(TOKENS, heads=3), lora.merged(model)
        assert all(not torch.allclose(after[..., k, :], before[..., k, :], atol=1e-2) for k in range(3))
        assert torch.allclose(merged(TOKENS, heads=3), after, atol=1e-5)
        with lora.off():
            assert torch.equal(model(TOKENS, heads=3), before)
    assert not merged.config.tied and torch.equal(merged.trunk.embedding.weight, model.trunk.embedding.weight)
    save_model(merged, tmp_path / "model")
    assert torch.allclose(load_model(tmp_path / "model")(TOKENS, heads=3), after, atol=1e-5)
    loss = model(TOKENS, heads=3).logsumexp(-1).sum()
    loss.backward()
    assert model.unembedding.get_parameter("lora_A").grad is not None


def test_what_is_saved_is_in_pefts_format(tmp_path: Path) -> None:
    model = Transformer(PLAIN)
    lora = Lora(model, LoraConfig(rank=4))
    changed(lora, model)
    lora.save(model, tmp_path / "adapter", "some/model")
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert content["r"] == 4 and content["lora_alpha"] == 16 and content["peft_type"] == "LORA"
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert content["target_modules"] == names
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7
    # Each part of the stacked q, k, v: its own product, added to its own rows.
    whole = lora.merged(model).state_dict()["trunk.blocks.0.attention.qkv.weight"]
    difference = whole - model.state_dict()["trunk.blocks.0.attention.qkv.weight"]
    key = "base_model.model.model.layers.0.self_attn.v_proj"
    product = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"] * (16 / 4)
    assert torch.allclose(difference[32 + 16 :], product, atol=1e-6)


@pytest.mark.parametrize("head", [False, True])
def test_peft_computes_the_same(head: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = Transformer(replace(PLAIN, attention_bias=False))
    save_model(model, tmp_path / "model")
    lora = Lora(model, LoraConfig(rank=4, head=head))
    changed(lora, model)
    lora.save(model, tmp_path / "adapter", str(tmp_path / "model"))
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"), str(tmp_path / "adapter")
    )
    with torch.no_grad():
        assert torch.allclose(theirs(TOKENS).logits, model(TOKENS), atol=1e-4)


def test_impossible_values_are_told() -> None:
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}):
        with pytest.raises(UsageError, match=r"adapt\.lora\."):
            LoraConfig(**wrong)  # type: ignore[arg-type]
