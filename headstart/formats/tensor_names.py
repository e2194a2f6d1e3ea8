"""The names and shapes of a model directory's tensors, and the rows of our parameters that each of them holds.

The names are Llama's; other families add to them, and OLMo2 and Gemma have other names for norms. Trunk and head 1 are
stored as an ordinary decoder of the family, so that any tool loads them; parameters that head 1 does not need lie in a
file of their own, which other tools ignore.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headstart.model.config import ModelConfig
from headstart.model.shape import Shape

MODEL_FILE = "model.safetensors"
HEADS_FILE = "heads/heads.safetensors"
EMBEDDING = "model.embed_tokens.weight"
UNEMBEDDING = "lm_head.weight"
NORM_NAMES = {
    "pre": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post": {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
    "both": {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}
"""Names of a block's norms, ours and the families', by the placement of the norms."""


@dataclass(frozen=True)
class Part:
    """Some rows of a parameter, as a file stores them."""

    file: str
    """`MODEL_FILE` or `HEADS_FILE`."""
    name: str
    """Name of the tensor in that file."""
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    """Dtype of the tensor in every file (None: that of the weights)."""


def stored_parts(config: ModelConfig) -> dict[str, list[Part]]:
    """Return the parts of each parameter of `Transformer(config)`, by its name in the state dict, in the order of rows.

    A tied unembedding is not stored.
    """
    V, D = config.vocab_size, config.dim
    parts = {"trunk.embedding.weight": [Part(MODEL_FILE, "model.embed_tokens.weight", (V, D))]}
    for layer in range(config.trunk_layers):
        parts |= _block_parts(config, f"trunk.blocks.{layer}", MODEL_FILE, f"model.layers.{layer}")
    path, layer = config.path(1), config.trunk_layers
    for k in range(1, config.heads + 1):
        for ours, (theirs, shape) in config.kind.tensors(k).items():
            parts[ours] = [Part(HEADS_FILE, theirs, shape)]
        if (names := config.kind.block_names(k)) is not None:
            ours, theirs = names
            if k in path:  # a layer of the ordinary decoder
                parts |= _block_parts(config, ours, MODEL_FILE, f"model.layers.{layer + path.index(k)}")
            else:
                kind = config.kind
                parts |= _block_parts(kind.block_shape, ours, HEADS_FILE, theirs, kind.block_inputs)
    if config.draft_vocab is not None:
        parts["unembedding.d2t"] = [Part(HEADS_FILE, "d2t", (config.draft_vocab,), torch.int64)]
    parts["unembedding.norm.weight"] = [Part(MODEL_FILE, "model.norm.weight", (D,))]
    if not config.tied:
        parts["unembedding.weights.0"] = [Part(MODEL_FILE, "lm_head.weight", (V, D))]
    return parts


def _block_parts(config: Shape, ours: str, file: str, theirs: str, inputs: int | None = None) -> dict[str, list[Part]]:
    """Return the parts of a block whose attention reads `inputs` columns (None: dim)."""
    inputs = inputs or config.dim
    D, Q, K, H = config.dim, config.attention_dim, config.key_value_heads * config.dim_per_head, config.hidden

    def part(name: str, *shape: int) -> Part:
        return Part(file, f"{theirs}.{name}", shape)

    parts = {
        f"{ours}.{norm}.weight": [part(f"{name}.weight", D)] for norm, name in NORM_NAMES[config.norm_placement].items()
    }
    parts |= {
        f"{ours}.attention.qkv.weight": [
            part("self_attn.q_proj.weight", Q, inputs),
            part("self_attn.k_proj.weight", K, inputs),
            part("self_attn.v_proj.weight", K, inputs),
        ],
        f"{ours}.attention.out.weight": [part("self_attn.o_proj.weight", D, Q)],
        f"{ours}.mlp.gate_up.weight": [part("mlp.gate_proj.weight", H, D), part("mlp.up_proj.weight", H, D)],
        f"{ours}.mlp.down.weight": [part("mlp.down_proj.weight", D, H)],
    }
    if config.qk_norm != "none":
        whole = config.qk_norm == "full"
        for name, width in (("q_norm", Q), ("k_norm", K)):
            width = width if whole else config.dim_per_head
            parts[f"{ours}.attention.{name}.weight"] = [part(f"self_attn.{name}.weight", width)]
    if config.attention_bias or config.qkv_bias:
        parts[f"{ours}.attention.qkv.bias"] = [
            part("self_attn.q_proj.bias", Q),
            part("self_attn.k_proj.bias", K),
            part("self_attn.v_proj.bias", K),
        ]
    if config.attention_bias:
        parts[f"{ours}.attention.out.bias"] = [part("self_attn.o_proj.bias", D)]
    return parts
