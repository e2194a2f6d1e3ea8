"""The metadata of a GGUF file as the configuration of a model, and the tensors that its parameters come from.

llama.cpp's keys become the fields of the family's config.json, and `families.py` reads and checks them. A new
architecture is a line in `ARCHITECTURES`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headstart.errors import UsageError, shorten
from headstart.formats.assembly import halved
from headstart.formats.config_fields import FULL, SLIDING, Content, Fields, written_scaling
from headstart.formats.families import FAMILIES, read_decoder
from headstart.formats.gguf_file import GgufFile
from headstart.formats.gguf_header import COPY, import_gguf
from headstart.formats.tensor_names import stored_parts
from headstart.model.config import ModelConfig
from headstart.model.rotary import scaled
from headstart.model.shape import RopeScaling

TOKENS = "tokenizer.ggml.tokens"
EMBEDDING, UNEMBEDDING, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
NEUTRAL = {
    "expert_count": 0,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.alpha": 0,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
}
"""Keys for which headstart computes one value alone, which a file may leave out."""
ROPE_TOLERANCE = 1e-4
"""Largest relative difference between the stored factors of frequencies and those of Llama 3's scaling."""


class _Keys:
    """The keys of a file under the name of its architecture; errors name the file and the key."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file, self.prefix = file, f"{architecture}."
        self.fields = Fields(file.path, file.metadata, COPY)

    def get(self, key: str, kind: type, default: object = None) -> Any:
        """Return a value. Numbers with fractions are the shortest decimals that fp32 rounds to the stored ones."""
        value = self.fields.get(self.prefix + key, kind, default)
        return float(str(np.float32(value))) if kind is float and math.isfinite(value) else value

    def has(self, key: str) -> bool:
        return self.prefix + key in self.fields.content

    def refuse(self, key: str, supported: str) -> UsageError:
        return self.fields.refuse(self.prefix + key, self.fields.content[self.prefix + key], supported)

    def only(self, key: str, value: object) -> None:
        """Raise UsageError if a key is present and something else."""
        if self.has(key) and self.fields.content[self.prefix + key] != value:
            raise self.refuse(key, json.dumps(value))

    def of_every_layer(self, key: str, default: int | None = None) -> int:
        """Return a whole number that may be a list with an entry for each layer, all equal."""
        value = self.fields.content.get(self.prefix + key)
        if not isinstance(value, list):
            return int(self.get(key, int, default))
        if not value or any(entry != value[0] for entry in value):
            raise self.refuse(key, "one number for all layers")
        return int(Fields(self.fields.file, {self.prefix + key: value[0]}, COPY).get(self.prefix + key, int))


def _no_more(keys: _Keys, layers: int) -> Content:
    return {}


def _windows(keys: _Keys, layers: int) -> Content:
    """Return the window that all layers slide over, if there is one."""
    return {"sliding_window": keys.get("attention.sliding_window", int, 0) or None}


def _gemma3(keys: _Keys, layers: int) -> Content:
    window = _windows(keys, layers)["sliding_window"]
    content: Content = {
        "sliding_window": window,
        "rope_local_base_freq": keys.get("rope.freq_base_swa", float, 10000.0),
        # llama.cpp has no key for it: only the model with 62 layers has another one.
        "query_pre_attn_scalar": keys.get("embedding_length", int) // keys.of_every_layer("attention.head_count")
        if layers == 62
        else _head_dim(keys),
    }
    pattern = keys.fields.content.get(keys.prefix + "attention.sliding_window_pattern")
    if window is None:
        content["layer_types"] = [FULL] * layers
    elif isinstance(pattern, list):
        content["layer_types"] = [SLIDING if slides else FULL for slides in pattern]
    elif pattern is not None:
        content["sliding_window_pattern"] = keys.get("attention.sliding_window_pattern", int)
    return content


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures."""

    family: str
    """`model_type` of the family in `FAMILIES`."""
    sliding_family: str | None = None
    """The same for files with a window for all layers, if that is another family."""
    interleaved: bool = False
    """True if rotary positions turn coordinates 2i and 2i + 1 as a pair, so rows of queries and keys change places."""
    norm_shift: float = 0.0
    """Number that llama.cpp adds to weights of norms when it writes them."""
    fields: Callable[[_Keys, int], Content] = _no_more
    """(keys, layers) -> fields of this family's config.json in addition to those of all."""


ARCHITECTURES = {
    "llama": Architecture("llama", "mistral", interleaved=True, fields=_windows),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "smollm3": Architecture("smollm3", interleaved=True),
    "olmo2": Architecture("olmo2", fields=_windows),
    "gemma3": Architecture("gemma3_text", norm_shift=1.0, fields=_gemma3),
}
"""The architectures that are read, by llama.cpp's names."""


def architecture_of(file: GgufFile) -> str:
    """Return the name of a file's architecture. Raises UsageError for one that headstart does not compute."""
    name = file.metadata.get("general.architecture")
    if isinstance(name, str) and name in ARCHITECTURES:
        return name
    raise UsageError(
        f"{file.path}: general.architecture is {shorten(json.dumps(name))}, which headstart does not compute; "
        f"supported: {', '.join(ARCHITECTURES)}"
    )


def read_gguf_config(file: GgufFile) -> ModelConfig:
    """Return the configuration of the model in a file, with one head; the last layer is head 1.

    Raises UsageError for an architecture or a value that headstart does not compute, and for missing keys.
    """
    name = architecture_of(file)
    keys, architecture = _Keys(file, name), ARCHITECTURES[name]
    for key, value in NEUTRAL.items():
        keys.only(key, value)
    layers = keys.get("block_count", int)
    if layers > len(file.names):  # before anything is made for each layer
        raise UsageError(
            f"{file.path}: {name}.block_count is {layers:,}, but it holds {len(file.names)} tensors; {COPY}"
        )
    head_dim, context = _head_dim(keys), keys.get("context_length", int)
    for key in ("attention.value_length", "rope.dimension_count"):
        keys.only(key, head_dim)
    heads = keys.of_every_layer("attention.head_count")
    theta = keys.get("rope.freq_base", float, 10000.0)
    content: Content = {
        "vocab_size": _vocab_size(keys),
        "hidden_size": keys.get("embedding_length", int),
        "intermediate_size": keys.of_every_layer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.of_every_layer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": keys.get("attention.layer_norm_rms_epsilon", float),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(keys, theta, head_dim, context),
        "tie_word_embeddings": UNEMBEDDING not in file.names,
        "attention_bias": any(f"blk.0.attn_{part}.bias" in file.names for part in ("q", "output")),
    }
    content |= architecture.fields(keys, layers)
    slides = content.get("sliding_window") is not None
    family = architecture.sliding_family if slides and architecture.sliding_family else architecture.family
    return read_decoder(file.path, content, FAMILIES[family])


def _head_dim(keys: _Keys) -> int:
    heads = keys.of_every_layer("attention.head_count")
    if heads < 1:
        raise keys.refuse("attention.head_count", "at least 1")
    return int(keys.get("attention.key_length", int, keys.get("embedding_length", int) // heads))


def _vocab_size(keys: _Keys) -> int:
    """Return the number of tokens, as llama.cpp counts them; without tokens, what the embedding has rows for."""
    tokens = keys.file.metadata.length(TOKENS)
    if tokens is not None:
        return tokens
    rows = keys.file.shape(EMBEDDING)[0] if EMBEDDING in keys.file.names else None
    return int(keys.get("vocab_size", int, rows))


def _rope_scaling(keys: _Keys, theta: float, head_dim: int, context: int) -> Content | None:
    """Return the object `rope_scaling` of a config.json."""
    kind = keys.get("rope.scaling.type", str, "linear")
    factor = keys.get("rope.scaling.factor", float, keys.get("rope.scale_linear", float, 1.0)) or 1.0
    if kind == "none" or (kind == "linear" and factor == 1):
        return written_scaling(_llama3_scaling(keys, theta, head_dim))
    if kind not in ("linear", "yarn"):
        raise keys.refuse("rope.scaling.type", '"none", "linear" or "yarn"')
    if ROPE_FACTORS in keys.file.names:
        raise UsageError(f"{keys.file.path}: holds {ROPE_FACTORS} and {kind} scaling, where headstart reads one")
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    found: Content = {
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": keys.get("rope.scaling.original_context_length", int, context),
    }
    for field in ("attention_factor", "beta_fast", "beta_slow"):
        key = f"rope.scaling.yarn_{field.replace('attention', 'attn')}"
        if keys.has(key):
            found[field] = keys.get(key, float)
    return found


def _llama3_scaling(keys: _Keys, theta: float, head_dim: int) -> RopeScaling | None:
    """Return Llama 3's scaling whose factors of the frequencies a file holds, None if it holds none.

    Only the factor and the old context differ between models. Raises UsageError for factors of another scaling.
    """
    file = keys.file
    if ROPE_FACTORS not in file.names:
        return None
    if file.shape(ROPE_FACTORS) != (head_dim // 2,):
        raise _wrong_shape(file, ROPE_FACTORS, (head_dim // 2,))
    factors = file.dequantized(ROPE_FACTORS).double()
    largest = float(factors.max())
    if torch.equal(factors, torch.ones_like(factors)):
        return None
    frequencies = theta ** (-2 * torch.arange(head_dim // 2, dtype=torch.float64) / head_dim)
    between = (factors > 1) & (factors < largest)
    original = 8192
    if largest > 1 and between.any():
        share = (1 / factors[between] - 1 / largest) / (1 - 1 / largest)
        turns = 1.0 + share * (4.0 - 1.0)
        original = round(float((turns * 2 * math.pi / frequencies[between]).median()))
    if largest > 1 and original >= 1:
        scaling = RopeScaling("llama3", float(str(np.float32(largest))), original, 1.0, 4.0)
        if torch.allclose(frequencies / scaled(frequencies, theta, scaling), factors, rtol=ROPE_TOLERANCE, atol=0):
            return scaling
    raise UsageError(f"{file.path}: {ROPE_FACTORS} is no scaling of Llama 3, and headstart reads no other; {COPY}")


@dataclass(frozen=True)
class GgufSource:
    """The tensor of a GGUF file that holds some rows of a parameter."""

    name: str
    shape: tuple[int, ...]
    """Shape in torch's order."""
    interleaved_heads: int = 0
    """Number of attention heads whose rows lie in llama.cpp's order of pairs; 0: the rows lie in our order."""
    shift: float = 0.0
    """Number that is part of the stored values, and not of the parameter."""

    def order(self) -> Tensor | None:
        """Return for each row of the parameter the row of the stored tensor; None: the same."""
        if not self.interleaved_heads:
            return None
        return halved(torch.arange(self.shape[0]), self.interleaved_heads)


def gguf_sources(config: ModelConfig) -> dict[str, list[GgufSource]]:
    """Return the tensors of a GGUF file that hold each parameter, in the order of its rows.

    The parameters have their names in the state dict of `Transformer(config)`. Whoever packs the stored blocks of a
    matrix takes `GgufFile.raw(source.name)`, its rows in `source.order()`, for each source, one below another: whole
    rows change places, so blocks stay whole. Only norms have a `shift`. Norms and biases are vectors, and stored in
    fp32.

    Args:
        config: a configuration of `read_gguf_config`.
    """
    family = config.family or "llama"
    name = next(name for name, each in ARCHITECTURES.items() if family in (each.family, each.sliding_family))
    architecture, gguf = ARCHITECTURES[name], import_gguf()
    names = gguf.get_tensor_name_map(
        next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name), config.next_token_layers
    )
    heads = {"q_proj": config.attention_heads, "k_proj": config.key_value_heads} if architecture.interleaved else {}

    def source(theirs: str, shape: tuple[int, ...]) -> GgufSource:
        part = theirs.split(".")[-2]
        return GgufSource(
            names.get_name(theirs, try_suffixes=(".weight", ".bias")),
            shape,
            heads.get(part, 0),
            architecture.norm_shift if part.endswith("norm") else 0.0,
        )

    return {ours: [source(part.name, part.shape) for part in parts] for ours, parts in stored_parts(config).items()}


def check_tensors(file: GgufFile, config: ModelConfig, sources: dict[str, list[GgufSource]]) -> None:
    """Raise UsageError unless a file holds exactly the tensors of `sources`, of their shapes."""
    expected = {source.name: source.shape for parts in sources.values() for source in parts}
    present = set(file.names) - ({ROPE_FACTORS} if architecture_of(file) == "llama" else set())
    for names, trouble in ((expected.keys() - present, "lacks"), (present - expected.keys(), "holds")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            says = "which its metadata promises" if trouble == "lacks" else "of which its metadata says nothing"
            raise UsageError(f"{file.path}: {trouble} {shorten(min(names))}{more}, {says}; {COPY}")
    for name, shape in expected.items():
        if file.shape(name) != shape:
            raise _wrong_shape(file, name, shape)


def _wrong_shape(file: GgufFile, name: str, shape: tuple[int, ...]) -> UsageError:
    return UsageError(
        f"{file.path}: {name} has shape {list(file.shape(name))}, not {list(shape)} as its metadata says; {COPY}"
    )
