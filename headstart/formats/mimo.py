"""Sequential heads in MiMo's layout (model_type mimo), the simplest that vLLM and SGLang decode natively.

Trunk and head 1 are a Qwen2: a Llama with biases on queries, keys and values. `model.mtp_layers.0` is head 2, the
module of DeepSeek: `hidden_layernorm`, `token_layernorm`, `input_proj` over [hidden, embedding], a block, and
`final_layernorm`, which is our final norm, shared with head 1, or with `norm_output` the module's own. Both engines
decode with one module; vLLM may run it again and again for further drafts, on its normed output and over one cache, as
heads with `norm_output` do. Heads without it read the output as it is, over a cache each.

Both zero the embedding that the module reads at position 0, and let the module propose any token: a draft vocabulary
is not written. Drafts therefore differ a little from ours; the text does not.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from headstart.data.tokenizers import Tokenizer
from headstart.errors import UsageError
from headstart.fileio import read_json
from headstart.formats.assembly import LLAMA, assemble, inexpressible, stored_tensors
from headstart.formats.config_fields import Fields
from headstart.formats.config_json import CONFIG_FILE
from headstart.formats.format import Check, compare_logits, random_text
from headstart.formats.hf_code_export import template
from headstart.formats.huggingface import DirectoryFormat, read_tokenizer
from headstart.formats.safetensors_files import TensorFiles, model_files
from headstart.formats.tensor_names import EMBEDDING, MODEL_FILE, UNEMBEDDING, Part
from headstart.model.config import ModelConfig
from headstart.model.heads import SequentialHeads
from headstart.model.transformer import Transformer

MODULE = "model.mtp_layers.0"
CODE = "modeling_mimo.py"
NAMES = {
    "latent_norm": "hidden_layernorm",
    "token_norm": "token_layernorm",
    "join": "input_proj",
    "norm": "final_layernorm",
}
FINAL = f"{MODULE}.final_layernorm.weight"
QKV = ("q_proj", "k_proj", "v_proj")


def save_mimo(model: Transformer, directory: Path, tokenizer: Tokenizer | None = None) -> list[str]:
    """Write `model` into the existing folder `directory`, and return lines about what is not carried.

    Raises UsageError for a model that the layout cannot express, naming the reason.
    """
    config = model.config
    files = {name: tensor for file in stored_tensors(model, None).values() for name, tensor in file.items()}
    _refuse(config, files)
    module = "heads.shared." if config.shared else "heads.2."
    tensors: dict[str, Tensor] = {}
    for name, tensor in files.items():
        if name.endswith("o_proj.bias") or name == "d2t" or (name.startswith("heads.") and not name.startswith(module)):
            continue  # zero, the draft vocabulary, or of a further head
        tensors[_mimo_name(name) if name.startswith("heads.") else name] = tensor
    for name, tensor in list(tensors.items()):
        bias = name.removesuffix("weight") + "bias"
        if any(f".{rows}.weight" in name for rows in QKV) and bias not in tensors:
            tensors[bias] = tensor.new_zeros(tensor.shape[0])
    if FINAL not in tensors:
        tensors[FINAL] = tensors["model.norm.weight"].clone()
    if config.tied:
        tensors[UNEMBEDDING] = tensors[EMBEDDING].clone()
    save_file(tensors, directory / MODEL_FILE, metadata={"format": "pt"})
    end_id = None
    if tokenizer is not None:
        tokenizer.save(directory)
        end_id = tokenizer.end_id
    content = _config_json(config, str(tensors[EMBEDDING].dtype).removeprefix("torch."), end_id)
    if tokenizer is not None and tokenizer.start_ids:
        content["bos_token_id"] = tokenizer.start_ids[0]
    (directory / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (directory / CODE).write_text(template(CODE), encoding="utf-8")
    return _left_out(config)


def load_mimo(
    directory: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Transformer:
    """Return the model in a directory of MiMo's layout with one module: two sequential heads.

    Parameters have `dtype` (None: that in which the embedding is stored). Raises UsageError for files that are missing
    or damaged.
    """
    directory = Path(directory)
    tensors = TensorFiles(model_files(directory, MODEL_FILE))
    names = set(tensors.names())
    config = _config(directory / CONFIG_FILE, tensors)
    for name in (FINAL, "model.norm.weight", EMBEDDING):
        if name not in names:
            raise UsageError(f"{directory}: lacks {name}; copy the model directory again")
    if not torch.equal(tensors.read(FINAL), tensors.read("model.norm.weight")):
        config = replace(config, norm_output=True)

    def read(part: Part) -> Tensor:
        name = _mimo_name(part.name) if part.name.startswith("heads.") else part.name
        if name not in names:
            raise UsageError(f"{directory}: lacks {name}, which {CONFIG_FILE} promises; copy the directory again")
        return tensors.read(name)

    return assemble(config, read, tensors.dtype(EMBEDDING) if dtype is None else dtype, device)


@torch.no_grad()
def drafts_as_engines_compute(model: Transformer, tokens_BT: Tensor) -> Tensor:
    """Return the logits (B, T - 1, V) of head 2 with the embedding that it reads at position 0 zeroed."""
    T = tokens_BT.shape[1]
    rotary = model.rotary(torch.arange(T, device=tokens_BT.device), model.trunk.embedding.weight.dtype)
    z_BTD, embeddings_BTD = model.trunk(tokens_BT, rotary, length=T)
    ahead_BTD = torch.nn.functional.pad(embeddings_BTD[:, 1:], (0, 0, 0, 1))
    ahead_BTD[:, 0] = 0
    return model.unembedding(model.head(2)(z_BTD, rotary, ahead_BTD=ahead_BTD), 2)[:, :-1]


def _mimo_name(name: str) -> str:
    """Return MiMo's name of a tensor of head 2."""
    first, *rest = name.split(".")[2:]
    return ".".join([MODULE, NAMES.get(first, first), *rest])


def _refuse(config: ModelConfig, files: dict[str, Tensor]) -> None:
    if config.heads == 1 or not isinstance(config.kind, SequentialHeads):
        kind = "one head" if config.heads == 1 else f"{config.head_kind} heads"
        raise UsageError(
            f"this model has {kind}; MiMo's layout holds sequential heads alone (model.head_kind: sequential), and "
            "headstart and hf-code all kinds"
        )
    reasons = inexpressible(config, (*LLAMA, "family", "qkv_bias", "draft_vocab", "norm_output"))
    if config.dim_per_head * config.attention_heads != config.dim:
        reasons.append(f"head_dim {config.dim_per_head}, which is not dim / attention_heads")
    if any(name.endswith("o_proj.bias") and bool(tensor.any()) for name, tensor in files.items()):
        reasons.append("biases on the output of attention")
    if reasons:
        raise UsageError(f"MiMo's layout cannot express {', '.join(reasons)}; take headstart or hf-code")


def _left_out(config: ModelConfig) -> list[str]:
    left = ["position 0: vLLM and SGLang zero the embedding that the module reads there; drafts differ, no text does"]
    if config.heads > 2 and not config.norm_output:
        heads = "head 3" if config.heads == 3 else f"heads 3..{config.heads}"
        again = "; vLLM may run the module again for them, which --norm-output trains for" if config.shared else ""
        left.append(f"{heads}: left out, as the engines decode with one module{again}")
    if config.draft_vocab is not None:
        left.append(
            f"draft vocabulary of {config.draft_vocab:,} tokens: left out, the module proposes any token, and fewer of "
            "its drafts may be right; no text differs"
        )
    if config.tied:
        left.append("tied unembedding: written as a matrix of its own, equal to the embedding")
    return left


def _config_json(config: ModelConfig, dtype: str, end_id: int | None) -> dict[str, Any]:
    name = Path(CODE).stem
    return {
        "architectures": ["MiMoForCausalLM"],
        "model_type": "mimo",
        "auto_map": {"AutoConfig": f"{name}.MiMoConfig", "AutoModelForCausalLM": f"{name}.MiMoForCausalLM"},
        "num_nextn_predict_layers": 1,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.attention_heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.dim_per_head,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "use_sliding_window": False,
        "hidden_act": "silu",
        "dtype": dtype,
        "torch_dtype": dtype,
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "pad_token_id": end_id,
    }


def _config(file: Path, tensors: TensorFiles) -> ModelConfig:
    content = read_json(file)
    get = Fields(file, content).get
    if content.get("num_nextn_predict_layers") != 1:
        raise UsageError(f"{file}: num_nextn_predict_layers must be 1: headstart reads models with one module")
    if content.get("rope_scaling") or content.get("use_sliding_window"):
        raise UsageError(f"{file}: headstart reads MiMo's layout without rope_scaling and sliding windows")
    biases = [name for name in tensors.names() if name.endswith(tuple(f"{rows}.bias" for rows in QKV))]
    try:
        heads, kv_heads = get("num_attention_heads", int), get("num_key_value_heads", int)
        rope = Fields(file, Fields(file, content).mapping("rope_parameters"))
        return ModelConfig(
            vocab_size=get("vocab_size", int),
            dim=get("hidden_size", int),
            layers=get("num_hidden_layers", int),
            attention_heads=heads,
            kv_heads=None if kv_heads == heads else kv_heads,
            hidden_dim=get("intermediate_size", int),
            context=get("max_position_embeddings", int),
            heads=2,
            head_kind="sequential",
            wiring="causal",
            qkv_bias=any(bool(tensors.read(name).any()) for name in biases),
            norm_eps=get("rms_norm_eps", float),
            rope_theta=get("rope_theta", float) if content.get("rope_theta") else rope.get("rope_theta", float),
        )
    except UsageError as error:
        raise error if str(error).startswith(str(file)) else UsageError(f"{file}: {error}") from error


class Mimo(DirectoryFormat):
    """Sequential heads in MiMo's layout."""

    def detect(self, path: Path) -> bool:
        """Return whether config.json says so."""
        file = path / CONFIG_FILE
        return file.is_file() and read_json(file).get("model_type") == "mimo"

    def write(self, model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[str]:
        """Write trunk, head 1 and head 2."""
        return save_mimo(model, path, tokenizer)

    def check(self, model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[Check]:
        """Compare the logits of both heads, and count the drafts that stay the same in the engines."""
        again = load_mimo(path)
        tokens_BT, d2t = random_text(model), model.unembedding.d2t

        @torch.no_grad()
        def within_draft_vocabulary(tokens: Tensor) -> Tensor:
            logits_BTKV = again(tokens, heads=2)
            if d2t is not None:
                outside_V = torch.ones(model.config.vocab_size, dtype=torch.bool).index_fill(0, d2t, False)
                logits_BTKV[:, :-1, 1].masked_fill_(outside_V, -torch.inf)
            return logits_BTKV

        ours = within_draft_vocabulary(tokens_BT)[:, :-1, 1].argmax(-1)
        same = drafts_as_engines_compute(again, tokens_BT).argmax(-1) == ours
        share = f"head 2 proposes the same token at {int(same.sum())} of {same.numel()} positions"
        return [
            compare_logits("headstart", model, within_draft_vocabulary, 2),
            Check("headstart, drafts as the engines compute them", share),
        ]

    def read(self, path: Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Transformer:
        """Return the model with its two heads."""
        return load_mimo(path, dtype, device)

    def read_config(self, path: Path) -> ModelConfig:
        """Return the configuration, with two heads."""
        return _config(path / CONFIG_FILE, TensorFiles(model_files(path, MODEL_FILE)))

    def read_tokenizer(self, path: Path) -> Tokenizer | None:
        """Return the tokenizer; its start token is the bos_token_id of config.json, like in a model of ours."""
        content = read_json(path / CONFIG_FILE)
        return read_tokenizer(path, Fields(path / CONFIG_FILE, content).get("vocab_size", int), {"headstart": {}})
