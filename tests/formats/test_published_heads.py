"""EAGLE-3 and Medusa heads in the layouts of others, on a base: what they compute, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from headstart.commands.convert import convert
from headstart.data.tokenizers import ByteTokenizer
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.kernels.pack import pack
from headstart.decoding.settings import Request
from headstart.errors import UsageError
from headstart.formats.heads import next_token_model
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_config, load_model
from headstart.model.config import ModelConfig
from headstart.model.rotary import rotary_tables, rotate
from headstart.model.shape import DraftBlock, RopeScaling
from headstart.model.transformer import Transformer
from tests.models import random_model

BASE = ModelConfig(vocab_size=64, dim=32, layers=8, attention_heads=4, kv_heads=2, hidden_dim=48, context=64)
EAGLE = replace(BASE, heads=6, head_kind="eagle3", wiring="causal", features=(2, 4, 5))
BLOCK = DraftBlock(hidden_dim=40, rope_theta=777.0, rope_scaling=RopeScaling("linear", 2.0), norm_before_residual=True)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "drafts": {"draft_vocab": 9},
    "last": {"features": (8,), "heads": 3},
    "output": {"norm_output": True, "features": (1, 8), "tied": True},
    "block": {"draft_block": BLOCK, "draft_vocab": 9},
}
D2T = torch.tensor([0, 3, 7, 12, 20, 33, 41, 50, 63])
TOKENS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))


def written(variant: str, folder: Path, form: str = "eagle3") -> Transformer:
    """Write a model's base and its heads in a form of others, into folders of `folder`."""
    model = random_model(replace(EAGLE, **VARIANTS[variant]))
    if model.unembedding.d2t is not None:
        model.unembedding.d2t.copy_(D2T)
    save_model(next_token_model(model), folder / "base")
    save_model(model, folder / "full")
    convert(folder / "full", folder / "heads", form)
    return model


@pytest.mark.parametrize("form", ["eagle3", "speculators"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_published_eagle_heads_are_the_heads_again(variant: str, form: str, tmp_path: Path) -> None:
    model = written(variant, tmp_path, form)
    again = load_model(tmp_path / "base", heads=tmp_path / "heads")
    heads = model.config.heads if form == "speculators" else 6
    assert again.config == replace(model.config, heads=heads) == load_config(tmp_path / "base", tmp_path / "heads")
    heads = min(heads, model.config.heads)
    found, expected = again(TOKENS, heads=heads), model(TOKENS, heads=heads)
    assert torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_first_step_is_what_engines_compute(variant: str, tmp_path: Path) -> None:
    """EAGLE-3's first step by the published names, written again after the paper."""
    model = written(variant, tmp_path)
    t = load_file(tmp_path / "heads/model.safetensors")
    config = json.loads((tmp_path / "heads/config.json").read_text())
    T = TOKENS.shape[1]
    rotary = model.rotary(torch.arange(T), torch.float32)
    states, embeddings = [], model.trunk.embedding(TOKENS)
    x = embeddings
    for block in model.trunk.blocks:
        states.append(x)
        x = block(x, rotary)
    states.append(x)
    layers = config.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids", [2, 4, 5])
    g = F.linear(torch.cat([states[layer] for layer in layers], -1), t["fc.weight"])[:, :-1]
    normed = rms(g, t["midlayer.hidden_norm.weight"])
    joined = torch.cat([rms(embeddings[:, 1:], t["midlayer.input_layernorm.weight"]), normed], -1)
    q, k, v = (F.linear(joined, t[f"midlayer.self_attn.{x}_proj.weight"]).unflatten(-1, (-1, 8)) for x in "qkv")
    scaling = None if config["rope_scaling"] is None else BLOCK.rope_scaling
    tables = rotary_tables(torch.arange(T - 1), 8, config["rope_theta"], torch.float32, scaling)
    q, k, v = (x.transpose(1, 2) for x in (rotate(q, *tables), rotate(k, *tables), v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
    residual = normed if config["norm_before_residual"] else g
    h = residual + F.linear(y, t["midlayer.self_attn.o_proj.weight"])
    inner = rms(h, t["midlayer.post_attention_layernorm.weight"])
    gate, up = (F.linear(inner, t[f"midlayer.mlp.{name}_proj.weight"]) for name in ("gate", "up"))
    h = h + F.linear(F.silu(gate) * up, t["midlayer.mlp.down_proj.weight"])
    drafted = F.linear(rms(h, t["norm.weight"]), t["lm_head.weight"])
    tokens = torch.arange(config["draft_vocab_size"]) + t.get("d2t", 0)
    assert "d2t" not in t or torch.equal(t["t2d"].nonzero()[:, 0], tokens)
    expected = model(TOKENS, heads=2)[:, :-1, 1][..., tokens]
    assert (drafted - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("variant", ["drafts", "block"])
def test_published_heads_draft_without_changing_the_text(variant: str, tmp_path: Path) -> None:
    written(variant, tmp_path)
    engine = Engine(pack(load_model(tmp_path / "base", heads=tmp_path / "heads")), EngineConfig(context=64))
    outputs = []
    for heads in (1, 4):
        outputs.append(generate_all(engine, [Request((1, 2, 3), 24, heads=heads)])[0].tokens)
    assert outputs[0] == outputs[1]


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file({name: t.clone() for name, t in change(load_file(file)).items()}, file)


def test_published_spellings_are_read(tmp_path: Path) -> None:
    """`layers.0`, missing output matrix, the model's embedding, and draft ids in any order."""
    model = written("drafts", tmp_path)
    order = torch.tensor([4, 0, 8, 1, 2, 7, 3, 6, 5])

    def respelled(t: dict[str, Tensor]) -> dict[str, Tensor]:
        t = {name.replace("midlayer.", "layers.0."): x for name, x in t.items() if name != "t2d"}
        tokens = D2T[order]
        more = {"d2t": tokens - torch.arange(9), "lm_head.weight": t["lm_head.weight"][order]}
        return t | more | {"embed_tokens.weight": model.trunk.embedding.weight.detach().half()}

    change_tensors(tmp_path / "heads", respelled)
    again = load_model(tmp_path / "base", heads=tmp_path / "heads")
    assert torch.equal(again(TOKENS, heads=2)[:, :-1], model(TOKENS, heads=2)[:, :-1])
    change_tensors(tmp_path / "heads", lambda t: {name: x for name, x in t.items() if name != "lm_head.weight"})
    again = load_model(tmp_path / "base", heads=tmp_path / "heads")
    assert torch.equal(again.unembedding.weights[1], again.unembedding.weights[0][D2T])
    tensors = load_file(tmp_path / "heads/model.safetensors")
    (tmp_path / "heads/model.safetensors").unlink()
    torch.save(tensors, tmp_path / "heads/pytorch_model.bin")
    pickled = load_model(tmp_path / "base", heads=tmp_path / "heads")
    assert torch.equal(pickled(TOKENS, heads=2)[:, :-1], again(TOKENS, heads=2)[:, :-1])


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda t: {key: x for key, x in t.items() if key != name}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 48}, "hidden_size 48, not 32"),
        ({"vocab_size": 65}, "vocab_size 65, not 64"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4, not 2"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 4, 9]}}, "input of layer 9, and .* has 8 layers"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state is false"),
        ({"eagle_config": {"new_trick": 3}}, "eagle_config.new_trick is 3"),
        ({"fc_norm": True}, "fc_norm is true"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2"),
        ({"model_type": "qwen3"}, "model_type is"),
        ({"draft_vocab_size": 8}, "d2t has 9 entries, and draft_vocab_size is 8"),
        (without("fc.weight"), "lacks fc.weight, which joins the states of layers 2, 4, 5"),
        (without("d2t"), "d2t, the map to token ids, is missing"),
        (without("midlayer.mlp.up_proj.weight"), "lacks midlayer.mlp.up_proj.weight"),
        (lambda t: t | {"d2t": t["d2t"] + 1}, "d2t leads to token 64"),
        (lambda t: t | {"d2t": t["d2t"] - 1}, "d2t leads to token -1"),
        (lambda t: t | {"d2t": t["d2t"].float()}, "no list of whole numbers"),
        (lambda t: t | {"d2t": -torch.arange(9)}, "leads to a token twice"),
        (lambda t: t | {"fc_norm.0.weight": torch.ones(32)}, "holds fc_norm.0.weight"),
        (lambda t: t | {"norm.weight": torch.ones(31)}, "has shape"),
        (lambda t: t | {"norm.weight": torch.ones(32, dtype=torch.int8)}, "take unquantized heads"),
        (lambda t: t | {"embed_tokens.weight": torch.randn(64, 32)}, "is not the embedding of"),
    ],
)
def test_heads_that_do_not_fit_are_refused(changes: Any, message: str, tmp_path: Path) -> None:
    written("drafts", tmp_path)
    if callable(changes):
        change_tensors(tmp_path / "heads", changes)
    else:
        change_config(tmp_path / "heads", **changes)
    with pytest.raises(UsageError, match=message):
        load_model(tmp_path / "base", heads=tmp_path / "heads")


def test_heads_alone_are_no_model(tmp_path: Path) -> None:
    written("plain", tmp_path)
    with pytest.raises(UsageError, match="holds heads without their model; name the model and give --heads-from"):
        load_config(tmp_path / "heads")
    with pytest.raises(UsageError, match="has 6 heads already"):
        load_model(tmp_path / "full", heads=tmp_path / "heads")


def test_exports_refuse_what_the_layout_does_not_hold(tmp_path: Path) -> None:
    for config, message in (
        (replace(BASE, heads=3, head_kind="medusa"), "eagle3 heads alone"),
        (
            replace(
                EAGLE, family="gemma3_text", tied=True, qk_norm="head", norm_placement="both", norm_offset=True,
                activation="gelu_tanh", scaled_embedding=True, window=8, window_layers=(0, 2), local_rope_theta=1e4,
            ),
            "norms with an offset",
        ),
    ):  # fmt: skip
        save_model(random_model(config), tmp_path / config.head_kind)
        with pytest.raises(UsageError, match=message):
            convert(tmp_path / config.head_kind, tmp_path / "out", "eagle3")


def test_speculators_names_the_verifier(tmp_path: Path) -> None:
    written("last", tmp_path, "speculators")
    content = json.loads((tmp_path / "heads/config.json").read_text())
    assert content["speculators_config"]["verifier"]["name_or_path"] == str(tmp_path / "full")
    assert content["transformer_layer_config"]["num_aux_hidden_states"] == 1
    assert content["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 2


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("place", ["vllm", "tgi", "pt"])
@torch.no_grad()
def test_published_medusa_heads(place: str, shared: bool, tmp_path: Path) -> None:
    model = random_model(replace(BASE, heads=3, head_kind="medusa", shared=shared))
    save_model(next_token_model(model), tmp_path / "base")
    save_model(model, tmp_path / "full")
    convert(tmp_path / "full", tmp_path / "out", "medusa")
    folder = tmp_path / "out" / ("vllm" if place == "vllm" else "tgi")
    if place == "pt":
        file = folder / "medusa_lm_head.safetensors"
        torch.save(load_file(file), file.with_suffix(".pt"))
        file.unlink()
    again = load_model(tmp_path / "base", heads=folder)
    assert again.config == model.config
    assert torch.equal(again(TOKENS, heads=3), model(TOKENS, heads=3))
    change_config(folder, num_hidden_layers=2, medusa_num_layers=2)
    with pytest.raises(UsageError, match="heads of one layer"):
        load_model(tmp_path / "base", heads=folder)


@pytest.mark.parametrize("variant", ["plain", "drafts"])
def test_eagle_heads_for_llama_cpp(variant: str, tmp_path: Path) -> None:
    """llama.cpp's names, absolute token ids, and rows of queries and keys in pairs of neighbours."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (headstart[gguf])")
    model = random_model(replace(EAGLE, vocab_size=256, **VARIANTS[variant]))
    if model.unembedding.d2t is not None:
        model.unembedding.d2t.copy_(D2T)
    save_model(model, tmp_path / "full", ByteTokenizer())
    convert(tmp_path / "full", tmp_path / "head.gguf", "eagle3-gguf")
    convert(tmp_path / "full", tmp_path / "head.gguf", "eagle3-gguf")  # replaces an earlier result
    reader = gguf.GGUFReader(tmp_path / "head.gguf")
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    state = model.state_dict()
    q, k, v = state["heads.1.midlayer.attention.qkv.weight"].split([32, 16, 16])
    pairs = torch.arange(8).view(2, 4).T.flatten()
    for name, rows in (("q", q), ("k", k)):
        expected = rows.view(-1, 8, 64)[:, pairs].reshape(-1, 64)
        assert torch.equal(found[f"blk.0.attn_{name}.weight"], expected)
    assert torch.equal(found["blk.0.attn_v.weight"], v)
    assert torch.equal(found["blk.0.attn_norm_2.weight"], state["heads.1.midlayer.hidden_norm.weight"])
    assert torch.equal(found["output.weight"], state["unembedding.weights.1"])
    assert ("d2t" in found) == (variant == "drafts") and torch.equal(found.get("d2t", D2T), D2T)
    assert all(reader.fields[f"eagle3.{key}"].contents() == [2, 4, 5] for key in ("extract_layers", "target_layers"))
    save_model(random_model(replace(EAGLE, vocab_size=256, norm_output=True)), tmp_path / "other", ByteTokenizer())
    with pytest.raises(UsageError, match="have norm_output"):
        convert(tmp_path / "other", tmp_path / "other.gguf", "eagle3-gguf")
