"""Meta's released multi-token checkpoints (arXiv 2404.19737): `consolidated*.pth` and `params.json`, read and written.

`layers.{i}` are the trunk's blocks and, last, head 1; `extra_heads.{j}` is head j + 2. All heads read the output of the
last block but one. Rotary positions turn coordinates 2i and 2i + 1 as a pair, Hugging Face's (and ours) i and i + E/2,
so rows of queries and keys change places. The files are pickles, and are read with `weights_only=True`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.data.tokenizers import Tokenizer
from headstart.errors import UsageError
from headstart.fileio import read_json
from headstart.formats.assembly import assemble, halved, inexpressible, interleaved, stored_tensors
from headstart.formats.config_fields import Fields
from headstart.formats.config_json import CONFIG_FILE
from headstart.formats.huggingface import DirectoryFormat
from headstart.formats.published_heads import read_pickle
from headstart.formats.tensor_names import UNEMBEDDING, Part, stored_parts
from headstart.model.config import ModelConfig
from headstart.model.heads import TransformerHeads
from headstart.model.transformer import Transformer

PARAMS_FILE = "params.json"
WEIGHTS_FILE = "consolidated.pth"
PATTERN = "consolidated*.pth"
CONTEXT = 4096
"""Context of the released models (Table S13). params.json has no field for it."""
BLOCK = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
OUTER = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    UNEMBEDDING: "output.weight",
}
EXPRESSIBLE = (
    *("vocab_size", "dim", "layers", "attention_heads", "kv_heads", "hidden_dim", "context", "heads", "extra_layers"),
    *("head_dim", "head_kind", "wiring", "tied", "norm_eps", "rope_theta"),
)
"""Fields of ModelConfig that the format expresses, except the values that `_refuse` names."""


def is_meta_release(directory: str | Path) -> bool:
    """Return whether `directory` holds a model in Meta's format."""
    directory = Path(directory)
    return (directory / PARAMS_FILE).is_file() and next(directory.glob(PATTERN), None) is not None


def load_meta_release(
    directory: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Transformer:
    """Return the model in a directory of Meta's format, with all its heads.

    Parameters have `dtype` (None: that in which the embedding is stored). Raises UsageError for files that are missing,
    damaged, or at odds with params.json.
    """
    directory = Path(directory)
    tensors = _read_weights(directory)
    config = _config(directory, tensors)
    names = {part.name: _meta_name(part.name, config) for parts in stored_parts(config).values() for part in parts}
    _check_names(directory, tensors, set(names.values()))
    heads = {"q_proj": config.attention_heads, "k_proj": config.key_value_heads}

    def read(part: Part) -> Tensor:
        tensor = tensors[names[part.name]]
        for rows, count in heads.items():
            if f".{rows}." in part.name and tuple(tensor.shape) == part.shape:
                return halved(tensor, count)
        return tensor

    try:
        return assemble(config, read, tensors["tok_embeddings.weight"].dtype if dtype is None else dtype, device)
    except UsageError as error:
        raise UsageError(f"{directory}: {error}") from error


def save_meta_release(model: Transformer, directory: Path, dtype: torch.dtype | None = None) -> list[str]:
    """Write `model` into the existing folder `directory`, and return lines about what the format has no place for.

    Parameters must be whole (unsharded). Raises UsageError for a model that the format cannot express, such as one
    whose heads are not transformer heads, all on the trunk.
    """
    config = model.config
    _refuse(config)
    heads = {"q_proj": config.attention_heads, "k_proj": config.key_value_heads}
    tensors: dict[str, Tensor] = {}
    for name, tensor in (pair for file in stored_tensors(model, dtype).values() for pair in file.items()):
        for rows, count in heads.items():
            if f".{rows}." in name:
                tensor = interleaved(tensor, count)
        # Parts are views of one matrix, and torch.save would write the whole matrix for each of them.
        tensors[_meta_name(name, config)] = tensor.clone()
    if config.tied:
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
    torch.save(tensors, directory / WEIGHTS_FILE)
    text = json.dumps(_params(config), indent=2) + "\n"
    (directory / PARAMS_FILE).write_text(text, encoding="utf-8")
    left = [f"context of {config.context} tokens: {PARAMS_FILE} has no field for it (read back as {CONTEXT})"]
    if config.tied:
        left.append("tied unembedding: written as a matrix of its own, equal to the embedding")
    return left


def _meta_name(name: str, config: ModelConfig) -> str:
    """Return Meta's name of a tensor of a model directory."""
    if name in OUTER:
        return OUTER[name]
    match = re.fullmatch(r"(?:model\.layers|(heads))\.(\d+)\.(.+)\.weight", name)
    if match is None or match[3] not in BLOCK:
        raise UsageError(f"{name}: Meta's format has no tensor of that kind")
    place = f"extra_heads.{int(match[2]) - 2}" if match[1] else f"layers.{match[2]}"
    return f"{place}.{BLOCK[match[3]]}.weight"


def _refuse(config: ModelConfig) -> None:
    reasons = []
    if config.heads > 1 and not isinstance(config.kind, TransformerHeads):
        reasons.append(f"{config.head_kind} heads")
    if config.heads > 1 and config.wiring != "parallel":
        reasons.append(f"{config.wiring} wiring")
    if config.heads == 1 and not isinstance(config.kind, TransformerHeads):
        reasons.append("a single layer")
    if config.dim_per_head * config.attention_heads != config.dim:
        reasons.append(f"head_dim {config.dim_per_head}, which is not dim / attention_heads")
    reasons += inexpressible(config, EXPRESSIBLE)
    if reasons:
        raise UsageError(
            f"Meta's format cannot express {', '.join(reasons)}; it holds plain Llama blocks with transformer heads, "
            "all on the trunk (headstart holds everything)"
        )


def _params(config: ModelConfig) -> dict[str, Any]:
    """Return the content of params.json: the arguments of Meta's ModelArgs."""
    params = {
        "dim": config.dim,
        "n_layers": config.trunk_layers + config.heads,
        "n_heads": config.attention_heads,
        "n_kv_heads": config.key_value_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "n_future_tokens": config.heads,
        "multiple_of": 256,
    }
    # Meta computes the hidden width: 8/3 of dim, times a factor, up to a multiple. Any width is a multiple of itself.
    usual = int(2 * 4 * config.dim / 3)
    if -(-usual // 256) * 256 != config.hidden:
        params["multiple_of"] = config.hidden
        if usual > config.hidden:
            params["ffn_dim_multiplier"] = config.hidden / usual
    return params


def _config(directory: Path, tensors: dict[str, Tensor]) -> ModelConfig:
    file = directory / PARAMS_FILE
    params = read_json(file)
    get = Fields(file, params).get
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in tensors:
            raise UsageError(f"{directory}: {PATTERN} lacks {name}; copy the directory again")
    if params.get("use_scaled_rope"):
        raise UsageError(f"{file}: use_scaled_rope is true, which headstart does not read from Meta's format")
    heads = get("n_future_tokens", int, 1)
    layers, attention_heads = get("n_layers", int), get("n_heads", int)
    kv_heads = get("n_kv_heads", int, attention_heads)
    try:
        return ModelConfig(
            # params.json may hold -1: the tokenizer decides.
            vocab_size=tensors["tok_embeddings.weight"].shape[0],
            dim=get("dim", int),
            layers=layers,
            attention_heads=attention_heads,
            kv_heads=None if kv_heads == attention_heads else kv_heads,
            hidden_dim=tensors["layers.0.feed_forward.w1.weight"].shape[0],
            context=get("max_seq_len", int, CONTEXT),
            heads=heads,
            norm_eps=get("norm_eps", float, 1e-5),
            rope_theta=get("rope_theta", float, 10000.0),
        )
    except UsageError as error:
        raise error if str(error).startswith(str(file)) else UsageError(f"{file}: {error}") from error


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """Return all tensors by Meta's names; if each of several files holds a share of every matrix, the whole ones."""
    files = sorted(directory.glob(PATTERN))
    if not files:
        raise UsageError(f"{directory}: holds no {PATTERN}; name a directory of Meta's release")
    shares = []
    for file in files:
        shares.append(read_pickle(file))
    if len(shares) == 1:
        return dict(shares[0])
    if any(share.keys() != shares[0].keys() for share in shares):
        raise UsageError(f"{directory}: its {PATTERN} hold tensors of different names; copy the directory again")
    dim = next((t.shape[0] for name, t in shares[0].items() if name == "norm.weight"), 0)
    return {name: _joined(name, [share[name] for share in shares], dim) for name in shares[0]}


def _joined(name: str, shares: list[Tensor], dim: int) -> Tensor:
    """Return the whole of a tensor of which each model-parallel process has saved a share."""
    if shares[0].ndim == 1:
        return shares[0]
    by_columns = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
    if name == "tok_embeddings.weight":  # by columns in Llama 1 and 2, by rows since
        by_columns = shares[0].shape[1] != dim
    return torch.cat(shares, 1 if by_columns else 0)


def _check_names(directory: Path, tensors: dict[str, Tensor], expected: set[str]) -> None:
    missing = sorted(expected - tensors.keys())
    extra = sorted(name for name in tensors.keys() - expected if name != "rope.freqs")
    for names, trouble in ((missing, "lacks"), (extra, "holds")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            says = "which params.json promises" if names is missing else "of which params.json says nothing"
            raise UsageError(f"{directory}: {PATTERN} {trouble} {names[0]}{more}, {says}; copy the directory again")


class MetaRelease(DirectoryFormat):
    """Meta's multi-token release."""

    def detect(self, path: Path) -> bool:
        """Return whether the folder is in Meta's format, and no ordinary model as well."""
        return is_meta_release(path) and not (path / CONFIG_FILE).is_file()

    def write(self, model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[str]:
        """Write the weights and params.json, without a tokenizer."""
        left = save_meta_release(model, path)
        if tokenizer is not None:
            left.append("tokenizer: the format takes a SentencePiece tokenizer.model, which headstart does not write")
        return left

    def read(self, path: Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Transformer:
        """Return the model with all its heads."""
        return load_meta_release(path, dtype, device)

    def read_config(self, path: Path) -> ModelConfig:
        """Return the configuration, part of which only the shapes of the weights tell."""
        return _config(path, _read_weights(path))

    def read_dtype(self, path: Path) -> torch.dtype:
        """Return the dtype of the embedding."""
        return _read_weights(path)["tok_embeddings.weight"].dtype
