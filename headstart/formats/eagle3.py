"""EAGLE-3 heads as others publish them, read and written: the plain form of most engines, and that of speculators.

    config.json          a Llama of one layer, and what is EAGLE's; with speculators the first lies inside
    model.safetensors    fc.weight, midlayer.*, norm.weight, lm_head.weight, d2t, t2d

Names and shapes are those of our heads files, with three differences: `d2t` holds token id minus draft id, `t2d` marks
the tokens of the draft vocabulary, and one state also has an `fc`, the identity. The number of drafts is the engine's;
only speculators stores one. Layers are counted as in vLLM: layer i means the input of layer i.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from headstart.data.tokenizers import Tokenizer
from headstart.errors import UsageError
from headstart.fileio import read_json
from headstart.formats.assembly import stored_tensors
from headstart.formats.config_fields import Fields, read_rope, write_rope
from headstart.formats.config_json import CONFIG_FILE
from headstart.formats.families import family_of
from headstart.formats.format import Check, Format, compare_all_heads
from headstart.formats.heads import next_token_model
from headstart.formats.published_heads import PublishedHeads, head_parts, is_copy, read_tensors
from headstart.formats.tensor_names import HEADS_FILE, MODEL_FILE
from headstart.model.config import ModelConfig
from headstart.model.eagle import default_features
from headstart.model.heads import Eagle3Heads
from headstart.model.shape import DraftBlock
from headstart.model.transformer import Transformer

DRAFTS = 5
"""Drafts of heads whose files name no number: the policy feeds as many of them as pay."""
FILES = (MODEL_FILE, "pytorch_model.bin")
LAYERS = "eagle_aux_hidden_state_layer_ids"
PREFIXES = ("heads.shared.", "heads.2.")
FC, LM_HEAD, EMBEDDING = "fc.weight", "lm_head.weight", "embed_tokens.weight"
OWN = (
    *("draft_vocab_size", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "target_hidden_size"),
    LAYERS,
)
"""Fields of EAGLE-3, which speculators keeps outside of the layer's."""
PLAIN_VALUES: dict[str, tuple[object, ...]] = {
    **{"num_hidden_layers": (1,), "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    **{"norm_before_fc": (False,), "fc_norm": (False,), "quantization_config": (), "logit_scale": (1,)},
    **{"model_type": ("llama",), "parallel_drafting": (False,), "pard_token": (), "partial_rotary_factor": (1,)},
}
"""The values of config.json that headstart computes, of fields that change the computation."""
EAGLE_VALUES: dict[str, tuple[object, ...]] = {
    **{"use_aux_hidden_state": (True,), "use_input_layernorm_in_first_layer": (True,), "use_last_layernorm": (True,)},
    **{"use_mtp_layernorm": (False,), "next_layer_regular": (True,), "parallel_draft_step": (1,)},
    "norm_before_fc": (False,),
}
"""The same of `eagle_config`. Fields that are not here, in `UNUSED` or `LAYERS` are unknown."""
UNUSED = {"parallel_draft_heads_num_layers", "has_lm_head"}


@dataclass(frozen=True)
class EagleHeads(PublishedHeads):
    """EAGLE-3's module on a model of its sizes."""

    fields: Fields
    heads: int
    """Number of heads, the model's own included."""

    @classmethod
    def detect(cls, directory: Path) -> bool:
        """Return whether config.json speaks of EAGLE-3 or of speculators."""
        file = directory / CONFIG_FILE
        if not file.is_file():
            return False
        content = read_json(file)
        named = content.get("architectures")
        return (
            "draft_vocab_size" in content
            or "speculators_model_type" in content
            or (isinstance(named, list) and any("Eagle3" in str(name) for name in named))
        )

    @classmethod
    def read(cls, directory: Path) -> EagleHeads:
        """Return the heads in a directory; a pickle is read with weights_only."""
        file = directory / CONFIG_FILE
        content = read_json(file)
        outer = Fields(file, content, "copy the heads again")
        outer.only("speculators_model_type", "eagle3")
        drafts = DRAFTS
        if "speculators_model_type" in content:
            # vLLM takes a missing field for true, in this form alone.
            own = {"norm_before_residual": True} | {name: content[name] for name in OWN if name in content}
            drafts = _speculative_tokens(outer)
            content = outer.mapping("transformer_layer_config") | own
        fields = Fields(file, content, "copy the heads again")
        _refuse_unknown(fields)
        tensors = {name.replace("layers.0.", "midlayer."): t for name, t in read_tensors(directory, FILES).items()}
        return cls(directory, tensors, fields, drafts + 1)

    def config_on(self, base: ModelConfig, named: Path) -> ModelConfig:
        """Return the configuration of a base of the same sizes with the heads."""
        self.check_base(base, named)
        self._check_sizes(base, named)
        layers, fields = base.next_token_layers, self.fields
        features = self._features(layers)
        if features and features[-1] > layers:
            raise UsageError(
                f"{self.directory}: its heads read the input of layer {features[-1]}, and {named} has {layers} layers; "
                "take the model that they were trained on"
            )
        theta, scaling = read_rope(fields, 10000.0, base.context)
        own_rope = (theta, scaling) != (base.rope_theta, base.rope_scaling)
        width = fields.get("intermediate_size", int)
        block = DraftBlock(
            None if width == base.hidden else width,
            theta if own_rope else None,
            scaling if own_rope else None,
            fields.get("norm_before_residual", bool, False),
        )
        config = replace(
            base,
            heads=self.heads,
            head_kind="eagle3",
            wiring="causal",
            layers=layers,
            features=features,
            draft_vocab=self._draft_vocab(base.vocab_size),
            norm_output=fields.get("norm_output", bool, False),
            draft_block=None if block == DraftBlock() else block,
        )
        needed = {_published(part.name) for part in head_parts(config)}
        if len(features) > 1 and FC not in self.tensors:
            raise UsageError(
                f"{self.directory}: lacks {FC}, which joins the states of layers {', '.join(map(str, features))}; copy "
                "the heads again"
            )
        unused = {name for name in self.tensors if name.endswith("rotary_emb.inv_freq")}
        self.refuse_others(needed | unused | {FC, "d2t", "t2d", EMBEDDING})
        return config

    def attach(self, base: Transformer, named: Path) -> Transformer:
        """Return the model, whose embedding must be that of the heads if they have one."""
        config = self.config_on(base.config, named)
        weight = base.trunk.embedding.weight
        if EMBEDDING in self.tensors and not is_copy(self.stored(EMBEDDING), weight):
            raise UsageError(
                f"{self.directory}: its {EMBEDDING} is not the embedding of {named}; take the model that the heads "
                "were trained on"
            )
        if len(config.kind.features) == 1 and FC in self.tensors:
            fc, eye = self.stored(FC), torch.eye(config.dim)
            if fc.shape != eye.shape or not torch.equal(fc.float(), eye):
                raise UsageError(
                    f"{self.directory}: {FC} maps one state, which headstart's heads read as it is; take heads that "
                    "read several layers"
                )
        return super().attach(base, named)

    def tensor(self, name: str, base: Transformer) -> Tensor:
        """Return the tensor; a missing output matrix is the model's, and draft ids are in the order of token ids."""
        published = _published(name)
        tokens = self._tokens()
        if published == "d2t" and tokens is not None:
            return tokens.sort().values
        if published != LM_HEAD:
            return self.stored(published)
        if published not in self.tensors:
            weight = base.unembedding.weight(1).detach()
            return weight if tokens is None else weight[tokens.sort().values]
        return self.stored(published) if tokens is None else self.stored(published)[tokens.argsort()]

    def _check_sizes(self, base: ModelConfig, named: Path) -> None:
        get = self.fields.get
        heads = get("num_attention_heads", int)
        dim, head_dim = get("hidden_size", int), self.fields.optional("head_dim", int)
        pairs = {
            "hidden_size": (dim, base.dim),
            "vocab_size": (get("vocab_size", int), base.vocab_size),
            "num_attention_heads": (heads, base.attention_heads),
            "num_key_value_heads": (get("num_key_value_heads", int, heads), base.key_value_heads),
            "head_dim": (dim // max(1, heads) if head_dim is None else head_dim, base.dim_per_head),
            "rms_norm_eps": (get("rms_norm_eps", float, 1e-6), base.norm_eps),
        }
        if get("target_hidden_size", int, dim) != dim:
            pairs["target_hidden_size"] = (get("target_hidden_size", int), dim)
        found = [f"{name} {theirs}, not {ours}" for name, (theirs, ours) in pairs.items() if theirs != ours]
        if found:
            raise UsageError(
                f"{self.directory}: its heads have {', '.join(found)} as {named}; take the model that they were "
                "trained on"
            )
        _refuse_norms(base, f"{named}: has", "its heads in this layout")

    def _features(self, layers: int) -> tuple[int, ...]:
        eagle = Fields(self.fields.file, self.fields.mapping("eagle_config"))
        asked = next((fields.numbers(LAYERS) for fields in (self.fields, eagle) if fields.content.get(LAYERS)), None)
        return tuple(sorted(set(asked))) if asked else default_features(layers)

    def _draft_vocab(self, vocab_size: int) -> int | None:
        tokens = self._tokens()
        asked = self.fields.optional("draft_vocab_size", int)
        if tokens is None and asked not in (None, vocab_size):
            raise UsageError(
                f"{self.directory}: draft_vocab_size is {asked:,}, and d2t, the map to token ids, is missing; copy the "
                "heads again"
            )
        if tokens is None:
            return None
        if asked not in (None, len(tokens)):
            raise UsageError(
                f"{self.directory}: d2t has {len(tokens):,} entries, and draft_vocab_size is {asked:,}; copy the heads "
                "again"
            )
        self.check_draft_tokens("d2t", tokens, vocab_size)
        return len(tokens)

    def _tokens(self) -> Tensor | None:
        """Return the token id of each draft id, if there is a draft vocabulary."""
        offsets = self.tensors.get("d2t")
        if offsets is None:
            return None
        if offsets.ndim != 1 or not len(offsets) or offsets.dtype not in (torch.int64, torch.int32):
            raise UsageError(f"{self.directory}: d2t is no list of whole numbers; copy the heads again")
        return offsets.long() + torch.arange(len(offsets))


def save_eagle3(model: Transformer, directory: Path, speculators: bool) -> list[str]:
    """Write heads 2..n into the existing folder `directory`, and return lines about what engines read and do not.

    Raises UsageError for heads of another kind, or on a model whose norms or embeddings are not Llama's.
    """
    config, tensors = model.config, published_tensors(model)
    if "d2t" in tensors:
        tokens = tensors["d2t"]
        tensors["d2t"] = tokens - torch.arange(len(tokens))
        tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill(0, tokens, True)
    tensors.setdefault(FC, torch.eye(config.dim, dtype=tensors[LM_HEAD].dtype))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / MODEL_FILE, {"format": "pt"})
    dtype = str(tensors[LM_HEAD].dtype).removeprefix("torch.")
    content = _speculators_config(config, dtype) if speculators else _plain_config(config, dtype)
    (directory / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return _left_out(config, speculators)


def published_tensors(model: Transformer) -> dict[str, Tensor]:
    """Return the tensors of heads 2..n by their published names; `d2t` holds token ids.

    Raises UsageError for heads of another kind, or on a model whose norms or embeddings are not Llama's.
    """
    config = model.config
    if config.heads == 1 or not isinstance(config.kind, Eagle3Heads):
        kind = "one head" if config.heads == 1 else f"{config.head_kind} heads"
        raise UsageError(
            f"this model has {kind}; EAGLE-3's layout holds eagle3 heads alone (adapt --head-kind eagle3), and "
            "headstart all kinds"
        )
    _refuse_norms(config, "this model has", "EAGLE-3's layout; take headstart")
    return {_published(name): tensor for name, tensor in stored_tensors(model, None)[HEADS_FILE].items()}


def _published(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _refuse_norms(config: ModelConfig, has: str, place: str) -> None:
    if config.norm_offset or config.scaled_embedding:
        what = "norms with an offset" if config.norm_offset else "scaled embeddings"
        raise UsageError(f"{has} {what} (Gemma), which do not go with {place}")


def _refuse_unknown(fields: Fields) -> None:
    for name, values in PLAIN_VALUES.items():
        value = fields.content.get(name)
        if value is not None and value not in values:
            raise fields.refuse(name, value, " or ".join(map(json.dumps, values)) or "heads without it")
    eagle = Fields(fields.file, fields.mapping("eagle_config"))
    for name, value in eagle.content.items():
        known = name in EAGLE_VALUES or name in UNUSED or name == LAYERS
        if not known or (name in EAGLE_VALUES and value not in EAGLE_VALUES[name]):
            supported = " or ".join(map(json.dumps, EAGLE_VALUES[name])) if known else "heads without it"
            raise fields.refuse(f"eagle_config.{name}", value, supported)


def _speculative_tokens(fields: Fields) -> int:
    """Return the number of drafts of the first proposal method."""
    methods = fields.mapping("speculators_config").get("proposal_methods")
    first = methods[0] if isinstance(methods, list) and methods else {}
    return Fields(fields.file, first if isinstance(first, dict) else {}).positive("speculative_tokens", DRAFTS)


def _layer_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    block = config.kind.block_shape
    if (own := config.draft_rope) is not None and own.rope_theta is not None:
        config = replace(config, rope_theta=own.rope_theta, rope_scaling=own.rope_scaling)
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": block.dim,
        "intermediate_size": block.hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": block.attention_heads,
        "num_key_value_heads": block.key_value_heads,
        "head_dim": block.dim_per_head,
        "rms_norm_eps": block.norm_eps,
        "max_position_embeddings": config.context,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        **write_rope(config),
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def normed_residual(config: ModelConfig) -> bool:
    """Return whether the block adds the normed state."""
    return config.draft_block is not None and config.draft_block.norm_before_residual


def _plain_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    features = config.kind.features
    content = _layer_config(config, dtype) | {
        "draft_vocab_size": config.drafted_tokens,
        "norm_before_residual": normed_residual(config),
    }
    if config.norm_output:
        content["norm_output"] = True
    if not _default_features(config):
        content["eagle_config"] = {LAYERS: list(features), "use_aux_hidden_state": True}
    return content


def _speculators_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    features = config.kind.features
    layer = _layer_config(config, dtype)
    if len(features) != 3:
        layer["num_aux_hidden_states"] = len(features)
    method = {"proposal_type": "greedy", "speculative_tokens": config.heads - 1}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [method],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": None, "architectures": [family_of(config).architecture]},
        },
        "transformer_layer_config": layer,
        "draft_vocab_size": config.drafted_tokens,
        "target_hidden_size": config.dim,
        "norm_before_residual": normed_residual(config),
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": config.norm_output,
        LAYERS: list(features),
        "tie_word_embeddings": False,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _default_features(config: ModelConfig) -> bool:
    return config.kind.features == default_features(config.trunk_layers)


def _left_out(config: ModelConfig, speculators: bool) -> list[str]:
    left = ["trunk and head 1: they are the model that the heads are attached to"]
    if speculators:
        left.append("engines other than vLLM: they read the plain form, --to eagle3")
    else:
        left.append(f"number of heads: engines choose the number of drafts; headstart reads {DRAFTS} drafts back")
    if not _default_features(config):
        left.append(
            f"layers {', '.join(map(str, config.kind.features))}: vLLM reads them; SGLang counts layers otherwise, and "
            "other engines know the default layers alone"
        )
    variants = {"norm_output": config.norm_output, "norm_before_residual": normed_residual(config)}
    for name in [name for name, there in variants.items() if there]:
        left.append(f"{name}: vLLM computes it; SGLang's and llama.cpp's readers may not, and would draft worse")
    return left


class Eagle3(Format):
    """EAGLE-3 heads in the plain form, or in that of speculators."""

    whole = False
    readable = False

    def __init__(self, speculators: bool = False) -> None:
        self.speculators = speculators

    def detect(self, path: Path) -> bool:
        """Return whether the directory holds heads in the same form."""
        there = EagleHeads.detect(path)
        return there and ("speculators_model_type" in read_json(path / CONFIG_FILE)) == self.speculators

    def write(self, model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[str]:
        """Write heads 2..n."""
        return save_eagle3(model, path, self.speculators)

    def name_base(self, path: Path, base: str) -> None:
        """Write the verifier that vLLM loads together with the heads."""
        if self.speculators:
            content = read_json(path / CONFIG_FILE)
            content["speculators_config"]["verifier"]["name_or_path"] = base
            (path / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def check(self, model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[Check]:
        """Compare the logits of all heads, attached to trunk and head 1."""
        stored = replace(EagleHeads.read(path), heads=model.config.heads)
        return [compare_all_heads(model, stored.attach(next_token_model(model), path))]
