"""EAGLE-3 heads as a GGUF file of llama.cpp's architecture "eagle3", which drafts for a GGUF file of their model.

Names and order of rows are llama.cpp's: queries and keys are permuted, and `d2t` holds token ids.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from headstart.data.tokenizers import Tokenizer
from headstart.errors import UsageError
from headstart.fileio import replacing_file
from headstart.formats.assembly import interleaved
from headstart.formats.eagle3 import normed_residual, published_tensors
from headstart.formats.format import Check, Format
from headstart.formats.gguf import Gguf, write_file
from headstart.formats.gguf_header import import_gguf
from headstart.formats.gguf_vocabulary import add_vocabulary, read_vocabulary
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

ARCHITECTURE = "eagle3"
NAMES = {
    **{"fc": "fc", "norm": "output_norm", "lm_head": "output"},
    **{"midlayer.input_layernorm": "blk.0.attn_norm", "midlayer.hidden_norm": "blk.0.attn_norm_2"},
    **{f"midlayer.self_attn.{x}_proj": f"blk.0.attn_{x}" for x in "qkv"},
    **{"midlayer.self_attn.o_proj": "blk.0.attn_output", "midlayer.post_attention_layernorm": "blk.0.ffn_norm"},
    **{f"midlayer.mlp.{x}_proj": f"blk.0.ffn_{x}" for x in ("gate", "up", "down")},
}


def eagle3_gguf_tensors(model: Transformer) -> dict[str, Tensor]:
    """Return the tensors of heads 2..n by llama.cpp's names, in its order of rows."""
    config, found = model.config, dict[str, Tensor]()
    for name, tensor in published_tensors(model).items():
        if name == "d2t":
            found["d2t"] = tensor
            continue
        ours, kind = name.rsplit(".", 1)
        heads = {"q": config.attention_heads, "k": config.key_value_heads}.get(ours.removesuffix("_proj")[-1])
        rows = tensor if heads is None or "self_attn" not in ours else interleaved(tensor, heads)
        found[f"{NAMES[ours]}.{kind}"] = rows
    return found


def _refuse(config: ModelConfig) -> None:
    """Raise UsageError for heads that llama.cpp's graph does not compute."""
    features, scaling = config.kind.features, (config.draft_rope or config).rope_scaling
    reasons = [] if len(features) == 3 and features[-1] < config.trunk_layers else [f"layers {list(features)}"]
    reasons += ["norm_output"] if config.norm_output else []
    reasons += ["stretched rotary positions"] if scaling is not None else []
    if reasons:
        raise UsageError(
            f"llama.cpp's EAGLE-3 reads the inputs of three layers, and these heads have {', '.join(reasons)}; take "
            "eagle3 or headstart"
        )


class Eagle3Gguf(Format):
    """EAGLE-3 heads for llama.cpp."""

    is_file = True
    readable = False

    def detect(self, path: Path) -> bool:
        """Return whether the file is a GGUF file of the architecture."""
        if not Gguf().detect(path):
            return False
        fields = import_gguf().GGUFReader(path).fields
        return "general.architecture" in fields and fields["general.architecture"].contents() == ARCHITECTURE

    def write(self, model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[str]:
        """Write heads 2..n, and the vocabulary of their model, which the reader counts."""
        gguf, config = import_gguf(), model.config
        tensors = eagle3_gguf_tensors(model)
        _refuse(config)
        if tokenizer is None:
            raise UsageError("llama.cpp counts the tokens of the tokenizer, and the source has none; give --tokenizer")
        vocabulary, block = read_vocabulary(tokenizer, config.vocab_size), config.kind.block_shape
        rope = config.draft_rope
        dtype = tensors["output.weight"].dtype
        with replacing_file(path) as temporary:
            writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
            writer.add_vocab_size(config.vocab_size)
            writer.add_context_length(config.context)
            writer.add_embedding_length(block.dim)
            writer.add_block_count(1)
            writer.add_feed_forward_length(block.hidden)
            writer.add_head_count(block.attention_heads)
            writer.add_head_count_kv(block.key_value_heads)
            writer.add_key_length(block.dim_per_head)
            writer.add_value_length(block.dim_per_head)
            writer.add_rope_dimension_count(block.dim_per_head)
            writer.add_rope_freq_base(config.rope_theta if rope is None or rope.rope_theta is None else rope.rope_theta)
            writer.add_layer_norm_rms_eps(block.norm_eps)
            for key in ("target_layers", "extract_layers"):  # the name of newer and of older builds
                writer.add_array(f"{ARCHITECTURE}.{key}", list(config.kind.features))
            writer.add_uint32(f"{ARCHITECTURE}.target_hidden_size", config.dim)
            writer.add_bool(f"{ARCHITECTURE}.norm_before_residual", normed_residual(config))
            add_vocabulary(writer, vocabulary, tokenizer)
            write_file(writer, tensors.items(), dtype)
        return ["trunk and head 1: convert the model with --to gguf", *vocabulary.left]

    def check(self, model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[Check]:
        """Compare every tensor with the model's."""
        gguf, expected = import_gguf(), eagle3_gguf_tensors(model)
        stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        for name, tensor in expected.items():
            data, kind = stored[name].data, stored[name].tensor_type
            values = data if kind.name == "I64" else gguf.dequantize(data, kind)
            if not torch.equal(torch.from_numpy(values.copy()), tensor.float() if kind.name != "I64" else tensor):
                raise UsageError(f"gguf: read back, {name} differs from the model's; nothing was kept, report this")
        return [
            Check("gguf", f"all {len(expected)} tensors equal"),
            Check("llama.cpp", "loads the file (key eagle3.target_layers); no drafting is run", passed=None),
        ]
