"""The families of models: their `config.json` as `ModelConfig`, and back. Their tensors are in `tensor_names.py`.

Each family is read like transformers reads it, defaults of missing fields included. A family can hold a model if the
fields that it writes are read back as the same model; there is no other list of what families support.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headstart.errors import UsageError
from headstart.formats.config_fields import (
    FULL,
    LAYER_TYPES,
    SLIDING,
    Content,
    Fields,
    read_rope,
    read_scaling,
    write_rope,
    written_scaling,
)
from headstart.model.bounds import MOST_LAYERS
from headstart.model.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """One family, with transformers' defaults for missing fields."""

    model_type: str
    architecture: str
    read: Callable[[Fields, int], Content]
    """(fields, layers) -> arguments of ModelConfig except sizes and rotary positions."""
    write: Callable[[ModelConfig, int], Content]
    """(config, layers) -> the same as fields, with others that tools look for."""
    context: int
    kv_heads: int | None = None
    head_dim: int | None = None
    norm_eps: float = 1e-6
    tied: bool = False
    rope_theta: float = 10000.0
    rope_by_layer_type: bool = False
    """True if `rope_parameters` holds an object for each type of layer; `read` then reads rotary positions."""


def read_decoder(file: Path, content: Content, family: Family) -> ModelConfig:
    """Return the model with one head that the fields of a family in `content` describe; the last layer is head 1."""
    fields = Fields(file, content)
    for name in ("mlp_bias", "quantization_config", "per_layer_config"):
        if content.get(name):
            raise fields.refuse(name, content[name], f"a {family.model_type} without it")
    fields.only("partial_rotary_factor", 1)
    fields.only("is_causal", True)
    layers, attention_heads = fields.get("num_hidden_layers", int), fields.get("num_attention_heads", int)
    if layers > MOST_LAYERS:
        raise UsageError(f"{file}: num_hidden_layers is {layers}; headstart reads models of up to {MOST_LAYERS:,}")
    dim, context = fields.get("hidden_size", int), fields.get("max_position_embeddings", int, family.context)
    head_dim = fields.optional("head_dim", int, family.head_dim)
    kv_heads = fields.optional("num_key_value_heads", int, family.kv_heads)
    try:
        sizes: Content = {
            "vocab_size": fields.get("vocab_size", int),
            "dim": dim,
            "layers": layers,
            "attention_heads": attention_heads,
            "kv_heads": attention_heads if kv_heads is None else kv_heads,
            # None for the default, so that equal models have equal configurations.
            "head_dim": None if head_dim is not None and head_dim * attention_heads == dim else head_dim,
            "hidden_dim": fields.get("intermediate_size", int),
            "context": context,
            # A head needs a trunk below it. If there is one layer, it is the trunk, and head 1 reads it as it is.
            "head_kind": "transformer" if layers > 1 else "linear",
            "tied": fields.get("tie_word_embeddings", bool, family.tied),
            "norm_eps": fields.get("rms_norm_eps", float, family.norm_eps),
            # Llama is the default.
            "family": None if family.model_type == "llama" else family.model_type,
        }
        if not family.rope_by_layer_type:
            sizes["rope_theta"], sizes["rope_scaling"] = read_rope(fields, family.rope_theta, context)
        return ModelConfig(**(sizes | family.read(fields, layers)))
    except UsageError as error:
        raise error if str(error).startswith(str(file)) else UsageError(f"{file}: {error}") from error


def decoder_fields(config: ModelConfig, family: Family) -> Content:
    """Return the fields of trunk and head 1 that a family writes."""
    layers = config.next_token_layers
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": config.attention_heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.dim_per_head,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        **write_rope(config),
        **family.write(config, layers),
    }


_AGREED: dict[str, Callable[[ModelConfig], object]] = {
    "vocab_size": lambda c: c.vocab_size,
    "hidden_size": lambda c: c.dim,
    "intermediate_size": lambda c: c.hidden,
    "num_hidden_layers": lambda c: c.next_token_layers,
    "num_attention_heads": lambda c: c.attention_heads,
    "num_key_value_heads": lambda c: c.key_value_heads,
    "head_dim": lambda c: c.dim_per_head,
    "rms_norm_eps": lambda c: c.norm_eps,
    "rope_theta": lambda c: c.rope_theta,
    "rope_scaling": lambda c: c.rope_scaling and asdict(c.rope_scaling),
    "tie_word_embeddings": lambda c: c.tied,
    "attention_bias": lambda c: c.attention_bias,
    "qkv_bias": lambda c: c.qkv_bias or c.attention_bias,
    "qk_norm": lambda c: c.qk_norm,
    "norm_placement": lambda c: c.norm_placement,
    "norm_offset": lambda c: c.norm_offset,
    "hidden_act": lambda c: c.activation,
    "scaled_embedding": lambda c: c.scaled_embedding,
    "query_pre_attn_scalar": lambda c: c.score_dim,
    "sliding_window": lambda c: [c.window_of(layer) for layer in range(c.next_token_layers)],
    "rope_local_base_freq": lambda c: c.local_rope_theta,
    "no_rope_layers": lambda c: [layer for layer in c.nope_layers if layer < c.next_token_layers],
}
"""The values that agree between two models that compute the same, by the fields of files that hold them."""


def differences(theirs: ModelConfig, ours: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which trunk and head 1 of two models differ, with both values."""
    values = {name: (value(theirs), value(ours)) for name, value in _AGREED.items()}
    return {name: pair for name, pair in values.items() if pair[0] != pair[1]}


def family_of(config: ModelConfig) -> Family:
    """Return the family that stores a model: its own, or the first that can. Raises UsageError if there is none."""
    if config.family is not None and config.family not in FAMILIES:
        raise UsageError(f"model.family {config.family!r} is unknown; take one of {', '.join(FAMILIES)}")
    why: list[tuple[int, str]] = []
    for family in FAMILIES.values() if config.family is None else [FAMILIES[config.family]]:
        try:
            wrong = differences(read_decoder(Path(family.model_type), decoder_fields(config, family), family), config)
        except UsageError as error:
            why.append((len(_AGREED), str(error)))
            continue
        if not wrong:
            return family
        name, (theirs, ours) = next(iter(wrong.items()))
        there = f"{family.model_type} has {name} {json.dumps(theirs)}, this model {json.dumps(ours)}"
        why.append((len(wrong), there))
    whose = "no family's" if config.family is None else f"no {config.family}"
    raise UsageError(f"{whose} directory can hold this model: {min(why)[1]}; change the model's settings")


def _biases(fields: Fields) -> Content:
    return {"attention_bias": fields.get("attention_bias", bool, False)}


def _slides(window: int | None, layers: Iterable[int], of: int) -> Content:
    """Return the arguments for `layers`, out of `of`, that slide over `window` positions."""
    sliding = tuple(layers)
    if window is None or not sliding:
        return {}
    return {"window": window, "window_layers": None if sliding == tuple(range(of)) else sliding}


def _read_windows(fields: Fields, layers: int, window: int | None, default: Callable[[int], bool]) -> Content:
    """Return the arguments for the layers that slide over `window` positions, by `layer_types`, else by `default`.

    Layers that slide without a window are refused.
    """
    types = fields.content.get("layer_types")
    if types is None:
        return _slides(window, filter(default, range(layers)), layers)
    supported = LAYER_TYPES if window is not None else {FULL}
    if not isinstance(types, list) or len(types) != layers or any(x not in supported for x in types):
        names = " or ".join(json.dumps(name) for name in sorted(supported))
        why = "" if window is not None else ", as no sliding_window is in use"
        raise fields.refuse("layer_types", types, f"{names} for each of the {layers} layers{why}")
    return _slides(window, [layer for layer in range(layers) if types[layer] == SLIDING], layers)


def _sliding(config: ModelConfig, layers: int) -> list[bool]:
    return [config.window_of(layer) is not None for layer in range(layers)]


def _written_types(config: ModelConfig, layers: int) -> list[str]:
    return [SLIDING if slides else FULL for slides in _sliding(config, layers)]


def _read_llama(fields: Fields, layers: int) -> Content:
    fields.only("hidden_act", "silu", "swish")
    if fields.content.get("sliding_window"):
        raise fields.refuse("sliding_window", fields.content["sliding_window"], "this family without it")
    return {**_biases(fields), **_read_windows(fields, layers, None, lambda layer: False)}


def _write_llama(config: ModelConfig, layers: int) -> Content:
    return {"attention_bias": config.attention_bias, "mlp_bias": False}


def _read_mistral(fields: Fields, layers: int) -> Content:
    fields.only("hidden_act", "silu", "swish")
    return _read_windows(fields, layers, fields.optional("sliding_window", int, 4096), lambda layer: True)


def _write_mistral(config: ModelConfig, layers: int) -> Content:
    return {"sliding_window": config.window}


def _write_ministral(config: ModelConfig, layers: int) -> Content:
    # transformers makes a mask for sliding layers even if the model has none.
    return {"sliding_window": config.window or config.context, "layer_types": _written_types(config, layers)}


def _window_in_use(fields: Fields, default: int | None) -> int | None:
    """Return the window of families that turn it on by `use_sliding_window`."""
    on = fields.get("use_sliding_window", bool, False)
    return fields.optional("sliding_window", int, default) if on else None


def _read_qwen_windows(fields: Fields, layers: int) -> Content:
    fields.only("hidden_act", "silu", "swish")
    first = fields.get("max_window_layers", int, 28)
    return _read_windows(fields, layers, _window_in_use(fields, 4096), lambda layer: layer >= first)


def _write_qwen_windows(config: ModelConfig, layers: int) -> Content:
    sliding = _sliding(config, layers)
    return {
        "use_sliding_window": any(sliding),
        "sliding_window": config.window if any(sliding) else None,
        "max_window_layers": sliding.index(True) if any(sliding) else layers,
        "layer_types": _written_types(config, layers),
    }


def _read_qwen2(fields: Fields, layers: int) -> Content:
    return {"qkv_bias": True, **_read_qwen_windows(fields, layers)}


def _read_qwen3(fields: Fields, layers: int) -> Content:
    return {"qk_norm": "head", **_biases(fields), **_read_qwen_windows(fields, layers)}


def _write_qwen3(config: ModelConfig, layers: int) -> Content:
    return {"attention_bias": config.attention_bias, **_write_qwen_windows(config, layers)}


def _read_smollm3(fields: Fields, layers: int) -> Content:
    fields.only("hidden_act", "silu", "swish")
    if fields.content.get("no_rope_layers") is None:
        interval = fields.positive("no_rope_layer_interval", 4)
        turned = [int((layer + 1) % interval != 0) for layer in range(layers)]
    else:
        turned = fields.numbers("no_rope_layers")
        if len(turned) < layers:
            raise UsageError(f"{fields.file}: no_rope_layers names {len(turned)} of {layers} layers; name them all")
    still = tuple(layer for layer in range(layers) if not turned[layer])
    windows = _read_windows(fields, layers, _window_in_use(fields, None), lambda layer: layer in still)
    return {"nope_layers": still, **_biases(fields), **windows}


def _write_smollm3(config: ModelConfig, layers: int) -> Content:
    sliding = any(_sliding(config, layers))
    return {
        "no_rope_layers": [int(layer not in config.nope_layers) for layer in range(layers)],
        "use_sliding_window": sliding,
        "sliding_window": config.window if sliding else None,
        "layer_types": _written_types(config, layers),
        **_write_llama(config, layers),
    }


def _read_olmo2(fields: Fields, layers: int) -> Content:
    return {"qk_norm": "full", "norm_placement": "post", **_read_llama(fields, layers)}


def _write_olmo2(config: ModelConfig, layers: int) -> Content:
    return {"attention_bias": config.attention_bias}


def _read_gemma3(fields: Fields, layers: int) -> Content:
    fields.only("hidden_activation", "gelu_pytorch_tanh")
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if fields.content.get(name):
            raise fields.refuse(name, fields.content[name], "a gemma3_text without it")
    pattern = fields.positive("sliding_window_pattern", 6)
    window = fields.optional("sliding_window", int, 4096)
    windows = _read_windows(fields, layers, window, lambda layer: (layer + 1) % pattern != 0)
    ropes = _read_gemma3_ropes(fields, bool(windows))
    scalar = fields.get("query_pre_attn_scalar", float, 256)
    return {
        "qk_norm": "head",
        "norm_placement": "both",
        "norm_offset": True,
        "activation": "gelu_tanh",
        "scaled_embedding": True,
        "query_scalar": None if scalar == fields.optional("head_dim", int, 256) else scalar,
        **_biases(fields),
        **windows,
        **ropes,
    }


def _read_gemma3_ropes(fields: Fields, slides: bool) -> Content:
    """Return bases and scaling as transformers 5 takes them.

    `rope_scaling` adds to the part of `rope_parameters` for layers that do not slide. A base in neither is
    `rope_theta` or `rope_local_base_freq`.
    """
    ropes, given = fields.mapping("rope_parameters"), fields.mapping("rope_scaling")
    if ropes and not LAYER_TYPES & ropes.keys():
        raise fields.refuse("rope_parameters", ropes, f'an object each for "{FULL}" and "{SLIDING}"')
    context = fields.get("max_position_embeddings", int, 131072)
    full = Fields(fields.file, ropes).mapping(FULL)
    if given and "type" in given and "rope_type" not in given:
        raise fields.refuse("rope_scaling", given, '"rope_type" in place of "type", which transformers passes over')
    where = "rope_scaling" if given else f"rope_parameters.{FULL}"
    full = full | given
    if full.get("truncate", True) is not True:
        raise fields.refuse(f"{where}.truncate", full["truncate"], "true")
    theta, scaling = read_scaling(fields, where, full, fields.get("rope_theta", float, 1e6), context)
    if not slides:
        return {"rope_theta": theta, "rope_scaling": scaling}
    near = fields.get("rope_local_base_freq", float, 10000.0)
    local, stretched = read_scaling(fields, f"rope_parameters.{SLIDING}", ropes.get(SLIDING) or {}, near, context)
    if stretched is not None:
        raise fields.refuse(f"rope_parameters.{SLIDING}", ropes[SLIDING], 'rope_type "default"')
    return {"rope_theta": theta, "rope_scaling": scaling, "local_rope_theta": local}


def _write_gemma3(config: ModelConfig, layers: int) -> Content:
    local = config.rope_theta if config.local_rope_theta is None else config.local_rope_theta
    scaling = written_scaling(config.rope_scaling) or {"rope_type": "default"}
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": config.attention_bias,
        "query_pre_attn_scalar": int(config.score_dim),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window": config.window or config.context,
        "layer_types": _written_types(config, layers),
        "rope_parameters": {
            FULL: {"rope_theta": config.rope_theta, **scaling},
            SLIDING: {"rope_theta": local, "rope_type": "default"},
        },
        "rope_local_base_freq": local,
    }


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", _read_llama, _write_llama, 2048),
        Family("mistral", "MistralForCausalLM", _read_mistral, _write_mistral, 4096 * 32, kv_heads=8),
        Family("ministral", "MinistralForCausalLM", _read_mistral, _write_ministral, 4096 * 32, kv_heads=8),
        Family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen_windows, 32768, kv_heads=32),
        Family("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3, 32768, kv_heads=32, head_dim=128),
        Family(
            "smollm3", "SmolLM3ForCausalLM", _read_smollm3, _write_smollm3, 32768, kv_heads=4, tied=True, rope_theta=2e6
        ),
        Family("olmo2", "Olmo2ForCausalLM", _read_olmo2, _write_olmo2, 2048, norm_eps=1e-5),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            _read_gemma3,
            _write_gemma3,
            131072,
            kv_heads=4,
            head_dim=256,
            tied=True,
            rope_theta=1e6,
            rope_by_layer_type=True,
        ),
    )
}
"""The families by `model_type`. A model without family is stored as the first that can hold it."""
