"""Which tensor of a model directory holds which rows of which parameter: Hugging Face's names and ours.

The names are Llama's; other families add to them, and OLMo2 and Gemma give their norms others. Trunk and head 1 are
stored as an ordinary decoder of the family, so that any tool loads them; what head 1 does not need lies in
a file of its own that other tools never look at.
"""

from __future__ import annotations

from dataclasses import dataclass

from headstart.model.config import ModelConfig

MODEL_FILE = "model.safetensors"
HEADS_FILE = "heads/heads.safetensors"
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
"""By where blocks norm: the names of their norms, ours and those of the families that do so."""


@dataclass(frozen=True)
class Part:
    """Some rows of a parameter, as a file stores them."""

    file: str
    """`MODEL_FILE` or `HEADS_FILE`."""
    name: str
    """Name of the tensor in that file."""
    shape: tuple[int, ...]


def path_to_head_1(config: ModelConfig) -> list[int]:
    """The heads that head 1 is computed through, in order, head 1 last."""
    order, k = [], 1
    while k:
        order.append(k)
        k = config.parents[k - 1]
    return order[::-1]


def llama_layers(config: ModelConfig) -> int:
    """How many `model.layers` the directory holds: the trunk's blocks, then the transformer heads on the path."""
    return config.trunk_layers + (len(path_to_head_1(config)) if config.head_kind == "transformer" else 0)


def stored_parts(config: ModelConfig) -> dict[str, list[Part]]:
    """For each parameter of `Transformer(config)`, by its name in the state dict, its parts in the order of rows.

    A tied unembedding is not stored.
    """
    V, D = config.vocab_size, config.dim
    parts = {"trunk.embedding.weight": [Part(MODEL_FILE, "model.embed_tokens.weight", (V, D))]}
    for layer in range(config.trunk_layers):
        parts |= _block_parts(config, f"trunk.blocks.{layer}", MODEL_FILE, f"model.layers.{layer}")
    # Head k is called heads.{k} in the file, as everywhere in speech; a ModuleList counts from 0.
    path = path_to_head_1(config)
    for k in range(1, config.heads + 1):
        if config.head_kind == "transformer":
            on_path = k in path
            file = MODEL_FILE if on_path else HEADS_FILE
            name = f"model.layers.{config.trunk_layers + path.index(k)}" if on_path else f"heads.{k}"
            parts |= _block_parts(config, f"heads.{k - 1}", file, name)
        elif config.head_kind == "linear" and not (k == 1 and config.plain_decoder):
            parts[f"heads.{k - 1}.map.weight"] = [Part(HEADS_FILE, f"heads.{k}.map.weight", (D, D))]
        elif k > 1:
            parts |= _further_head(config, k)
    parts["unembedding.norm.weight"] = [Part(MODEL_FILE, "model.norm.weight", (D,))]
    if not config.tied:
        parts["unembedding.weights.0"] = [Part(MODEL_FILE, "lm_head.weight", (V, D))]
    return parts


def _further_head(config: ModelConfig, k: int) -> dict[str, list[Part]]:
    """What head k, 2 or more, of a kind whose head 1 is the plain unembedding, has of its own or with the others."""
    V, D, kind, H = config.vocab_size, config.dim, config.head_kind, config.stern_hidden

    def part(ours: str, theirs: str, *shape: int) -> dict[str, list[Part]]:
        return {ours: [Part(HEADS_FILE, theirs, shape)]}

    parts: dict[str, list[Part]] = {}
    if kind == "replicated" or (kind == "medusa" and not config.shared):
        parts |= part(f"unembedding.weights.{k - 1}", f"heads.{k}.lm_head.weight", V, D)
    if kind == "medusa":
        parts |= part(f"unembedding.residuals.maps.{k - 2}.weight", f"heads.{k}.residual.weight", D, D)
        parts |= part(f"unembedding.residuals.maps.{k - 2}.bias", f"heads.{k}.residual.bias", D)
    if kind == "stern":
        if k == 2:
            parts |= part("unembedding.residuals.hidden.weight", "heads.hidden.weight", H, D)
        parts |= part(f"unembedding.residuals.outputs.{k - 2}.weight", f"heads.{k}.output.weight", D, H)
    if kind == "sequential" and (k == 2 or not config.shared):
        ours, theirs = f"heads.{k - 1}", "heads.shared" if config.shared else f"heads.{k}"
        parts |= part(f"{ours}.latent_norm.weight", f"{theirs}.latent_norm.weight", D)
        parts |= part(f"{ours}.token_norm.weight", f"{theirs}.token_norm.weight", D)
        parts |= part(f"{ours}.join.weight", f"{theirs}.join.weight", D, 2 * D)  # columns: latent, token
        parts |= _block_parts(config, f"{ours}.block", HEADS_FILE, theirs)
    return parts


def _block_parts(config: ModelConfig, ours: str, file: str, theirs: str) -> dict[str, list[Part]]:
    D, Q, K, H = config.dim, config.attention_dim, config.key_value_heads * config.dim_per_head, config.hidden

    def part(name: str, *shape: int) -> Part:
        return Part(file, f"{theirs}.{name}", shape)

    parts = {
        f"{ours}.{norm}.weight": [part(f"{name}.weight", D)] for norm, name in NORM_NAMES[config.norm_placement].items()
    }
    parts |= {
        f"{ours}.attention.qkv.weight": [
            part("self_attn.q_proj.weight", Q, D),
            part("self_attn.k_proj.weight", K, D),
            part("self_attn.v_proj.weight", K, D),
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
