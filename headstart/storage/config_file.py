"""`config.json` of a model directory: what transformers' LlamaConfig reads, and beside it the key "headstart"."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.storage.llama_names import llama_layers

CONFIG_FILE = "config.json"
FORMAT = 1


def config_json(config: ModelConfig, dtype: str, end_id: int | None) -> dict[str, Any]:
    """The content of config.json. `dtype` is torch's name without the prefix; `end_id` None where ids have no text."""
    plain = config.plain_decoder
    return {
        # A model that is no plain decoder says so, rather than let other tools decode it wrongly.
        "architectures": ["LlamaForCausalLM" if plain else "HeadstartForCausalLM"],
        "model_type": "llama" if plain else "headstart",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden,
        "num_hidden_layers": llama_layers(config),
        "num_attention_heads": config.attention_heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.dim_per_head,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        # transformers 5 reads the first, everything older and most other tools the second.
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.attention_bias,
        "mlp_bias": False,
        "hidden_act": "silu",
        "dtype": dtype,
        "torch_dtype": dtype,
        # Explicit nulls: left out, transformers would take 1 and 2.
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "pad_token_id": end_id,
        "headstart": {"format": FORMAT, "model": asdict(config)},
    }


def load_config(directory: str | Path) -> ModelConfig:
    """The shape of the model in `directory`; an ordinary Hugging Face Llama gives a model with one head.

    Raises UsageError where there is no model, or one that headstart does not compute.
    """
    file = _config_path(Path(directory))
    content = read_json(file)
    own = content.get("headstart")
    if own is None:
        return _plain_llama(file, content)
    config = _own_config(file, own)
    _check_agreement(file, config, content)
    return config


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; UsageError where it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror}); name a model directory you may read") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: is not JSON ({error}); copy the model directory again") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file}: must hold a JSON object; copy the model directory again")
    return content


def _config_path(directory: Path) -> Path:
    if not directory.exists():
        raise UsageError(f"{directory}: no such directory; name a directory that holds a model's {CONFIG_FILE}")
    if not directory.is_dir():
        raise UsageError(f"{directory}: is a file; name the directory that holds the model's {CONFIG_FILE}")
    file = directory / CONFIG_FILE
    if not file.is_file():
        raise UsageError(
            f"{directory}: holds no {CONFIG_FILE}, so it is no model; name a model directory, as RUN/model"
        )
    return file


def _own_config(file: Path, own: object) -> ModelConfig:
    if not isinstance(own, dict) or not isinstance(own.get("model"), dict) or not isinstance(own.get("format"), int):
        raise UsageError(
            f'{file}: "headstart" must be {{"format": 1, "model": {{...}}}}; copy the model directory again'
        )
    if own["format"] != FORMAT:
        raise UsageError(
            f'{file}: "headstart" has format {own["format"]}, this version reads {FORMAT}; update headstart'
        )
    values = own["model"]
    known = {field.name: field.default for field in fields(ModelConfig)}
    for name, value in values.items():
        if name not in known:
            raise UsageError(
                f'{file}: "headstart" names the unknown field model.{name}; update headstart, or remove it'
            )
        default = known[name]
        _check_type(file, f"headstart.model.{name}", value, type(0 if default is None else default), default is None)
    try:
        return ModelConfig(**values)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error


def _check_type(file: Path, name: str, value: object, kind: type, optional: bool = False) -> None:
    right = type(value) in ((int, float) if kind is float else (kind,)) or (optional and value is None)
    if not right:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise UsageError(f"{file}: {name} is {value!r}; it must be {names[kind]}")


def _refuse(file: Path, field: str, value: object, supported: str) -> UsageError:
    return UsageError(
        f"{file}: {field} is {json.dumps(value)}, which headstart does not compute; supported: {supported}"
    )


def _plain_llama(file: Path, content: dict[str, Any], model_type: str = "llama") -> ModelConfig:
    """An ordinary Llama: its last layer is head 1. Fields that are left out have transformers' defaults."""
    if content.get("model_type") != model_type:
        raise _refuse(file, "model_type", content.get("model_type"), '"llama"')
    if content.get("hidden_act", "silu") not in ("silu", "swish"):
        raise _refuse(file, "hidden_act", content["hidden_act"], '"silu"')
    for name in ("mlp_bias", "quantization_config", "sliding_window"):
        if content.get(name):
            raise _refuse(file, name, content[name], "a Llama without it")

    def get(name: str, kind: type, default: object = None) -> Any:
        value = content.get(name)
        value = default if value is None else value
        if value is None:
            raise UsageError(f"{file}: {name} is missing; copy the model directory again")
        _check_type(file, name, value, kind)
        return value

    layers, dim, attention_heads = (
        get("num_hidden_layers", int),
        get("hidden_size", int),
        get("num_attention_heads", int),
    )
    head_dim = content.get("head_dim")
    _check_type(file, "head_dim", head_dim, int, optional=True)
    try:
        return ModelConfig(
            vocab_size=get("vocab_size", int),
            dim=dim,
            layers=layers,
            attention_heads=attention_heads,
            kv_heads=get("num_key_value_heads", int, attention_heads),
            # None where it says nothing new, so that equal models have equal configurations.
            head_dim=None if head_dim is not None and head_dim * attention_heads == dim else head_dim,
            hidden_dim=get("intermediate_size", int),
            context=get("max_position_embeddings", int, 2048),
            # A head needs a trunk below it; the only layer of a model is the trunk, and head 1 reads it as it is.
            head_kind="transformer" if layers > 1 else "linear",
            tied=get("tie_word_embeddings", bool, False),
            attention_bias=get("attention_bias", bool, False),
            norm_eps=get("rms_norm_eps", float, 1e-6),
            rope_theta=float(_rope_theta(file, content)),
        )
    except UsageError as error:
        raise error if str(error).startswith(str(file)) else UsageError(f"{file}: {error}") from error


def _rope_theta(file: Path, content: dict[str, Any]) -> float:
    """The base of the rotary positions, from transformers 5's `rope_parameters` or the fields it replaced."""
    theta = content.get("rope_theta")
    for name in ("rope_parameters", "rope_scaling"):
        rope = content.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
            raise _refuse(file, name, rope, 'rope_type "default", unscaled rotary positions')
        partial = rope.get("partial_rotary_factor")
        if partial not in (None, 1):
            raise _refuse(file, f"{name}.partial_rotary_factor", partial, "1")
        theta = rope.get("rope_theta", theta)
    if content.get("partial_rotary_factor") not in (None, 1):
        raise _refuse(file, "partial_rotary_factor", content["partial_rotary_factor"], "1")
    theta = 10000.0 if theta is None else theta
    _check_type(file, "rope_theta", theta, float)
    return theta


def _check_agreement(file: Path, config: ModelConfig, content: dict[str, Any]) -> None:
    """Other tools read the Llama fields, we the key "headstart": edited apart, they would compute different models."""
    theirs = _plain_llama(file, content, "llama" if config.plain_decoder else "headstart")
    pairs = {
        "vocab_size": (theirs.vocab_size, config.vocab_size),
        "hidden_size": (theirs.dim, config.dim),
        "intermediate_size": (theirs.hidden, config.hidden),
        "num_hidden_layers": (theirs.layers, llama_layers(config)),
        "num_attention_heads": (theirs.attention_heads, config.attention_heads),
        "num_key_value_heads": (theirs.key_value_heads, config.key_value_heads),
        "head_dim": (theirs.dim_per_head, config.dim_per_head),
        "rms_norm_eps": (theirs.norm_eps, config.norm_eps),
        "rope_theta": (theirs.rope_theta, config.rope_theta),
        "tie_word_embeddings": (theirs.tied, config.tied),
        "attention_bias": (theirs.attention_bias, config.attention_bias),
    }
    for name, (said, expected) in pairs.items():
        if said != expected:
            raise UsageError(
                f'{file}: {name} is {json.dumps(said)}, but "headstart" describes a model with {json.dumps(expected)}; '
                "change both, or remove the key to load head 1 alone"
            )
