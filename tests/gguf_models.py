"""Small GGUF files of every architecture, written as llama.cpp's converter writes them.

Without the package gguf, a test file that imports this is skipped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headstart.formats.assembly import stored_tensors
from headstart.model.config import ModelConfig
from headstart.model.shape import RopeScaling
from headstart.model.transformer import Transformer
from tests.models import random_model

gguf = pytest.importorskip("gguf", reason="gguf is not installed (headstart[gguf])")

SIZES = ModelConfig(vocab_size=64, dim=64, layers=3, attention_heads=4, kv_heads=2, hidden_dim=96, context=128)
GEMMA = {
    **{"family": "gemma3_text", "qk_norm": "head", "norm_placement": "both", "norm_offset": True, "tied": True},
    **{"activation": "gelu_tanh", "scaled_embedding": True, "norm_eps": 1e-6, "rope_theta": 1e6},
    **{"local_rope_theta": 1e4, "layers": 7, "window": 16, "window_layers": (0, 1, 2, 3, 4, 6), "head_dim": 32},
}
CONFIGS = {
    "llama": SIZES,
    "llama, tied, biases": replace(SIZES, tied=True, attention_bias=True, head_dim=32, norm_eps=1e-6),
    "llama 3": replace(SIZES, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, 24)),
    "mistral": replace(SIZES, family="mistral", window=32),
    "qwen2": replace(SIZES, family="qwen2", qkv_bias=True),
    "qwen2, yarn": replace(
        SIZES, family="qwen2", qkv_bias=True, tied=True,
        rope_scaling=RopeScaling("yarn", 4.0, 32, attention_factor=1.138629436111989),
    ),
    "qwen3": replace(SIZES, family="qwen3", qk_norm="head", head_dim=32, rope_theta=1e6),
    "smollm3": replace(SIZES, family="smollm3", layers=5, nope_layers=(3,), rope_theta=2e6, tied=True),
    "olmo2": replace(SIZES, family="olmo2", qk_norm="full", norm_placement="post"),
    "gemma3": replace(SIZES, **GEMMA),
    "gemma3, linear": replace(SIZES, **GEMMA | {"rope_scaling": RopeScaling("linear", 8.0), "tied": False}),
}  # fmt: skip
"""Configurations by a name that begins with llama.cpp's architecture, or Mistral, which has llama's."""
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def architecture(name: str) -> str:
    """Return llama.cpp's architecture of an entry of `CONFIGS`."""
    return re.split("[ ,]", name)[0].replace("mistral", "llama")


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """Return rows of queries or keys in the order of llama.cpp (`LlamaModel.permute` of its converter)."""
    half = weights.shape[0] // heads // 2
    return weights.reshape(heads, 2, half, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def gguf_name(architecture: str, name: str) -> str:
    """Return llama.cpp's name of a tensor of a Hugging Face model."""
    place, kind = name.rsplit(".", 1)
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", place)
    if match is None:
        return f"{NAMES[place]}.{kind}"
    after_attention = "post_attention_norm" if architecture in ("olmo2", "gemma3") else "ffn_norm"
    return f"blk.{match[1]}.{({'post_attention_layernorm': after_attention} | NAMES)[match[2]]}.{kind}"


def gguf_tensors(architecture: str, model: Transformer) -> dict[str, np.ndarray]:
    """Return the tensors of a model by llama.cpp's names, as its converter stores them."""
    config, found = model.config, {}
    heads = {"q_proj": config.attention_heads, "k_proj": config.key_value_heads}
    for name, tensor in stored_tensors(model, torch.float32)["model.safetensors"].items():
        value = tensor.numpy()
        part = name.split(".")[-2]
        if architecture in ("llama", "smollm3") and part in heads:
            value = permuted(value, heads[part])
        if architecture == "gemma3" and name.endswith("norm.weight"):
            value = value + np.float32(1)
        found[gguf_name(architecture, name)] = np.ascontiguousarray(value)
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        found["rope_freqs.weight"] = llama3_factors(config)
    return found


def llama3_factors(config: ModelConfig) -> np.ndarray:
    """Return the factors of frequencies, as llama.cpp's converter computes them."""
    scaling, dim = config.rope_scaling, config.dim_per_head
    assert scaling is not None
    low = scaling.original_context / scaling.low_freq_factor
    high = scaling.original_context / scaling.high_freq_factor
    factors = []
    for frequency in (1.0 / config.rope_theta ** (np.arange(0, dim, 2, dtype=np.float32) / dim)).tolist():
        length = 2 * np.pi / frequency
        smooth = (scaling.original_context / length - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        between = 1 / ((1 - smooth) / scaling.factor + smooth)
        factors.append(1 if length < high else scaling.factor if length > low else between)
    return np.array(factors, dtype=np.float32)


def gguf_metadata(architecture: str, config: ModelConfig) -> dict[str, Any]:
    """Return the keys under the name of the architecture, as llama.cpp's converter writes them."""
    found: dict[str, Any] = {
        "context_length": config.context,
        "embedding_length": config.dim,
        "block_count": config.next_token_layers,
        "feed_forward_length": config.hidden,
        "attention.head_count": config.attention_heads,
        "attention.head_count_kv": config.key_value_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_theta,
        "vocab_size": config.vocab_size,
    }
    if config.head_dim is not None:
        found |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if architecture == "llama":
        found["rope.dimension_count"] = config.dim_per_head
    if config.window is not None:
        found["attention.sliding_window"] = config.window
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind != "llama3":
        found |= {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
        if scaling.kind == "yarn":
            found["rope.scaling.original_context_length"] = scaling.original_context
    return {f"{architecture}.{key}": value for key, value in found.items()}


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    kinds: Mapping[str, str] | None = None,
    prepare: Callable[[Any], None] = lambda writer: None,
) -> Path:
    """Write a file; `kinds` are types by tensor (F32 without), `prepare` adds further keys to the writer."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    if "tokenizer.ggml.model" not in metadata:
        writer.add_tokenizer_model("no_vocab")
    prepare(writer)
    for name, tensor in tensors.items():
        kind = None if kinds is None or name not in kinds else gguf.GGMLQuantizationType[kinds[name]]
        writer.add_tensor(name, tensor, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_gguf(path: Path, name: str, **changes: Any) -> Transformer:
    """Write a random model of `CONFIGS` to `path` and return it; `changes` replace keys (None: without it)."""
    config, kind = CONFIGS[name], architecture(name)
    model = random_model(config)
    metadata = gguf_metadata(kind, config) | changes
    write_gguf(
        path, kind, {key: value for key, value in metadata.items() if value is not None}, gguf_tensors(kind, model)
    )
    return model


def random_blocks(rows: int, columns: int, kind: str) -> np.ndarray:
    """Return random rows of stored blocks without NaN: their halves are below 2."""
    size, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    generator = np.random.default_rng(0)
    return generator.integers(0, 0x3C, (rows, columns // size * width), dtype=np.uint8)


def dequantized(blocks: np.ndarray, kind: str) -> Tensor:
    """Return what the package gguf makes of stored blocks."""
    return torch.from_numpy(np.array(gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])))


def real_files(pattern: str = "*.gguf") -> list[Path]:
    """Return the files of a pattern in the folder that HEADSTART_GGUF_DIR names; skip the test if there are none."""
    folder = os.environ.get("HEADSTART_GGUF_DIR")
    paths = [] if folder is None else sorted(Path(folder).glob(pattern))
    if not paths:
        pytest.skip(f"HEADSTART_GGUF_DIR names no folder with {pattern}")
    return paths
