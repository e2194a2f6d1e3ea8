from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import headstart
from headstart.commands.convert import convert
from headstart.errors import UsageError
from headstart.formats.gguf_config import gguf_sources
from headstart.formats.gguf_file import GgufFile
from headstart.formats.gguf_header import SUPPORTED_TYPES
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_config, load_dtype, load_model
from headstart.model.shape import RopeScaling
from tests.gguf_models import (
    CONFIGS,
    SIZES,
    architecture,
    dequantized,
    gguf_metadata,
    gguf_tensors,
    permuted,
    random_blocks,
    random_gguf,
    real_files,
    write_gguf,
)
from tests.models import random_model


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_is_read_as_it_was_written(tmp_path, name):
    model = random_gguf(tmp_path / "m.gguf", name)
    again = load_model(tmp_path / "m.gguf")
    assert again.config == load_config(tmp_path / "m.gguf") == CONFIGS[name]
    state = again.state_dict()
    for key, tensor in model.state_dict().items():
        # Gemma's norms are stored with 1 added.
        rounding = 1e-6 if "norm" in key and "gemma3" in name else 0
        assert torch.allclose(state[key], tensor, rtol=0, atol=rounding), key


@pytest.mark.parametrize(("name", "head_dim"), [("llama", None), ("qwen2", None), ("qwen3", 128), ("gemma3", 256)])
def test_transformers_reads_the_same_model(tmp_path, name, head_dim):
    """The widths of heads are those that transformers takes for every model of a family."""
    transformers = pytest.importorskip("transformers")
    config = replace(CONFIGS[name], head_dim=head_dim, layers=2 if name != "gemma3" else 7)
    tensors = gguf_tensors(name, random_model(config, scale=0.05))
    path = write_gguf(tmp_path / "m.gguf", name, gguf_metadata(name, config), tensors)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    tokens = torch.randint(0, SIZES.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = load_model(path)(tokens), peer(tokens).logits
    assert float((ours - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())


@pytest.mark.parametrize("kind", SUPPORTED_TYPES)
def test_every_type_of_tensors_is_dequantized_and_its_rows_change_places(tmp_path, kind):
    config = replace(SIZES, dim=256, layers=2, attention_heads=4, kv_heads=2, hidden_dim=256)
    expected = gguf_tensors("llama", random_model(config))
    stored, kinds = {}, {}
    for name, tensor in expected.items():
        stored[name] = tensor
        if tensor.ndim == 2:
            stored[name], kinds[name] = random_blocks(*tensor.shape, kind), kind
    path = write_gguf(tmp_path / "m.gguf", "llama", gguf_metadata("llama", config), stored, kinds)
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    model = load_model(path, dtype=torch.float32)
    assert load_dtype(path) == dtype and load_model(path).trunk.embedding.weight.dtype == dtype
    block = model.trunk.blocks[0]
    q, k, v = block.attention.qkv.weight.split([256, 128, 128])
    for ours, name, heads in ((q, "attn_q", 4), (k, "attn_k", 2)):
        theirs = dequantized(stored[f"blk.0.{name}.weight"], kind)
        assert np.array_equal(permuted(ours.detach().numpy(), heads), theirs.numpy())
    assert torch.equal(v, dequantized(stored["blk.0.attn_v.weight"], kind))
    assert torch.equal(block.mlp.down.weight, dequantized(stored["blk.0.ffn_down.weight"], kind))
    assert torch.equal(model.trunk.embedding.weight, dequantized(stored["token_embd.weight"], kind))
    assert torch.equal(block.attention_norm.weight, torch.from_numpy(stored["blk.0.attn_norm.weight"]))


@pytest.mark.parametrize("name", CONFIGS)
def test_stored_rows_in_the_order_of_sources_are_the_parameters(tmp_path, name):
    random_gguf(tmp_path / "m.gguf", name)
    file, state = GgufFile(tmp_path / "m.gguf"), load_model(tmp_path / "m.gguf").state_dict()
    for parameter, sources in gguf_sources(CONFIGS[name]).items():
        rows = []
        for source in sources:
            raw, order = file.raw(source.name), source.order()
            raw = raw.reshape(source.shape[0], -1)
            raw = raw if order is None else raw[order]
            rows.append(torch.from_numpy(raw.copy()).view(torch.float32).view(source.shape) - source.shift)
        assert torch.equal(torch.cat(rows), state[parameter])


@pytest.mark.parametrize("name", ["plain", "heads", "tied"])
def test_a_model_converted_to_gguf_and_back_computes_the_same_bits(tmp_path, name):
    changes = {"plain": {}, "heads": {"heads": 3, "layers": 5}, "tied": {"tied": True, "attention_bias": True}}[name]
    model = random_model(replace(SIZES, vocab_size=300, **changes))
    save_model(model, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "m.gguf", "gguf", dtype="float32")
    tokens = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "m.gguf")(tokens), model(tokens, heads=1)[:, :, 0])
    plain = headstart.load(tmp_path / "model").generate([1, 2, 3], 20, heads=1)
    assert headstart.load(tmp_path / "m.gguf").generate([1, 2, 3], 20).tokens == plain.tokens
    convert(tmp_path / "m.gguf", tmp_path / "again", "headstart")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "again")(tokens), model(tokens, heads=1)[:, :, 0])


def test_scaling_of_llama_3_is_found_for_its_models(tmp_path):
    for factor, original in ((8.0, 8192), (32.0, 8192), (4.0, 4096)):
        scaling = RopeScaling("llama3", factor, original)
        config = replace(SIZES, head_dim=128, rope_theta=5e5, context=131072, rope_scaling=scaling)
        tensors = gguf_tensors("llama", random_model(config))
        write_gguf(tmp_path / "m.gguf", "llama", gguf_metadata("llama", config), tensors)
        assert load_config(tmp_path / "m.gguf") == config


def test_values_that_are_written_in_several_ways(tmp_path):
    path = tmp_path / "m.gguf"
    lists = {f"llama.{key}": [value] * 3 for key, value in
             (("attention.head_count", 4), ("attention.head_count_kv", 2), ("feed_forward_length", 96))}  # fmt: skip
    random_gguf(path, "llama", **lists)
    assert load_config(path) == SIZES
    random_gguf(path, "llama", **{"llama.rope.freq_base": None, "llama.vocab_size": None})  # as llama.cpp's defaults
    assert load_config(path) == SIZES
    random_gguf(path, "llama", **{"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0})
    assert load_config(path) == SIZES
    random_gguf(path, "llama", **{"llama.rope.scale_linear": 2.0})
    assert load_config(path).rope_scaling == RopeScaling("linear", 2.0)
    random_gguf(path, "llama", **{"general.alignment": 256})
    assert load_config(path) == SIZES


def test_windows_of_gemma(tmp_path):
    path, gemma = tmp_path / "m.gguf", CONFIGS["gemma3"]
    key = "gemma3.attention.sliding_window"
    random_gguf(path, "gemma3", **{f"{key}_pattern": 2})
    assert load_config(path).window_layers == (0, 2, 4, 6)
    random_gguf(path, "gemma3", **{f"{key}_pattern": [True, True, False, False, False, False, True]})
    assert load_config(path).window_layers == (0, 1, 6)
    random_gguf(path, "gemma3", **{key: None})
    assert load_config(path) == replace(gemma, window=None, window_layers=None, local_rope_theta=None)
    large = replace(gemma, layers=62, window_layers=tuple(i for i in range(62) if (i + 1) % 6))
    model = random_model(large)
    write_gguf(path, "gemma3", gguf_metadata("gemma3", large), gguf_tensors("gemma3", model))
    assert load_config(path) == replace(large, query_scalar=16.0)


def no(**changes):
    return {key.replace("__", "."): value for key, value in changes.items()}


BAD = {
    "no layers": ("llama", no(llama__block_count=None), ("llama.block_count is missing; copy the file",)),
    "text for a number": ("llama", no(llama__context_length="many"), ("llama.context_length is 'many'",)),
    "no head": ("llama", no(llama__attention__head_count=0), ("head_count is 0",)),
    "layers without tensors": ("llama", no(llama__block_count=10**9), ("block_count is 1,000,000,000",)),
    "more layers": ("llama", no(llama__block_count=4), ("lacks blk.3.attn_k.weight and 8 more",)),
    "fewer layers": ("llama", no(llama__block_count=2), ("holds blk.2.attn_k.weight and 8 more",)),
    "other width": ("llama", no(llama__feed_forward_length=64), ("ffn_gate.weight has shape [96, 64], not [64",)),
    "other heads": ("llama", no(llama__attention__head_count_kv=4), ("attn_k.weight has shape [32, 64], not [64",)),
    "heads of layers": ("llama", {"llama.attention.head_count": [4, 4, 2]}, ("[4, 4, 2]", "for all layers")),
    "other vocabulary": ("llama", {"tokenizer.ggml.tokens": ["a", "b"]}, ("token_embd.weight has shape", "not [2")),
    "width of values": ("llama", no(llama__attention__value_length=8), ("value_length is 8", "16")),
    "part of the rotary": ("llama", no(llama__rope__dimension_count=8), ("dimension_count is 8", "16")),
    "experts": ("llama", no(llama__expert_count=8), ("expert_count is 8", "supported: 0")),
    "capped logits": ("gemma3", no(gemma3__final_logit_softcapping=30.0), ("final_logit_softcapping is 30.0",)),
    "both ways": ("llama", no(llama__attention__causal=False), ("causal is false",)),
    "another scaling": ("llama", {"llama.rope.scaling.type": "longrope"}, ("longrope",)),
    "infinite base": ("llama", {"llama.rope.freq_base": float("inf")}, ("rope.freq_base",)),
    "base of 0": ("llama", {"llama.rope.freq_base": 0.0}, ("rope_theta",)),
    "NaN": ("llama", {"llama.attention.layer_norm_rms_epsilon": float("nan")}, ("layer_norm_rms_epsilon",)),
    "windows of Olmo 3": ("olmo2", no(olmo2__attention__sliding_window=64), ("sliding_window is 64",)),
    "two scalings": ("llama 3", {"llama.rope.scaling.factor": 2.0}, ("rope_freqs.weight and linear scaling",)),
    "pattern of other length": (
        "gemma3", {"gemma3.attention.sliding_window_pattern": [True]}, ("for each of the 7 layers",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_metadata_at_odds_is_refused_in_one_line(tmp_path, case):
    name, changes, expected = BAD[case]
    path = tmp_path / "m.gguf"
    random_gguf(path, name, **changes)
    for reads in (load_config, load_model, headstart.load):
        with pytest.raises(UsageError) as caught:
            reads(path)
        message = str(caught.value)
        assert message.startswith(str(path)) and "\n" not in message and len(message) < 400
        assert all(part in message for part in expected), message


@pytest.mark.parametrize("name", ["mamba", "qwen2moe", "gemma2"])
def test_other_architectures_are_refused_by_name(tmp_path, name):
    path = write_gguf(tmp_path / "m.gguf", name, {}, {"token_embd.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(UsageError, match=f'general.architecture is "{name}", .* supported: llama, qwen2'):
        headstart.load(path)


def edited(tmp_path, name, edit):
    config, kind = CONFIGS[name], architecture(name)
    tensors = gguf_tensors(kind, random_model(config))
    edit(tensors)
    return write_gguf(tmp_path / "m.gguf", kind, gguf_metadata(kind, config), tensors)


@pytest.mark.parametrize(
    ("name", "edit", "expected"),
    [
        ("llama", lambda t: t.pop("blk.1.ffn_up.weight"), "lacks blk.1.ffn_up.weight, which"),
        ("llama", lambda t: t.pop("token_embd.weight"), "lacks token_embd.weight, which"),
        ("llama", lambda t: t.update({"blk.0.ffn_up.bias": np.zeros(96, np.float32)}), "holds blk.0.ffn_up.bias"),
        ("qwen2", lambda t: t.pop("blk.2.attn_k.bias"), "lacks blk.2.attn_k.bias"),
        ("qwen2", lambda t: t.update({"rope_freqs.weight": np.ones(8, np.float32)}), "holds rope_freqs.weight"),
        ("llama 3", lambda t: t.update({"rope_freqs.weight": np.ones(7, np.float32)}), "has shape [7], not [8]"),
        ("llama 3", lambda t: t["rope_freqs.weight"].__imul__(0.5), "no scaling of Llama 3"),
        ("llama 3", lambda t: t["rope_freqs.weight"].fill(np.nan), "no scaling of Llama 3"),
        ("llama", lambda t: t["blk.0.attn_q.weight"].fill(np.nan), "model.layers.0.self_attn.q_proj.weight: holds NaN"),
    ],
)  # fmt: skip
def test_tensors_at_odds_are_refused_in_one_line(tmp_path, name, edit, expected):
    path = edited(tmp_path, name, edit)
    with pytest.raises(UsageError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and expected in message and "\n" not in message


def test_names_of_files_that_are_not_there(tmp_path):
    for name in (tmp_path / "none.gguf", "runs/none.gguf"):  # not a name on the hub
        with pytest.raises(UsageError, match=r"none.gguf: no such file"):
            headstart.load(name)
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(UsageError, match="no GGUF file"):
        headstart.load(tmp_path / "text.gguf")
    random_gguf(tmp_path / "model", "llama")  # any name, if it holds one
    assert headstart.load(tmp_path / "model").config == SIZES


@pytest.mark.slow
def test_real_files_continue_a_text():
    for path in real_files():
        model = headstart.load(path, dtype="float32")
        likely = model.generate("The capital of France is Paris. The capital of Italy is", 4).text
        assert "Rome" in likely, path
