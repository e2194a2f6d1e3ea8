"""GGUF files: trunk and head 1 of a model as llama.cpp reads them. Needs the package `gguf` (the extra "gguf").

Drafting heads are left out: llama.cpp decodes with head 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.data.tokenizers import Tokenizer
from headstart.errors import UsageError
from headstart.fileio import replacing_file
from headstart.formats.assembly import refuse_other_blocks
from headstart.formats.gguf_vocabulary import add_vocabulary, read_vocabulary
from headstart.formats.huggingface import stored_tensors
from headstart.formats.tensor_names import MODEL_FILE
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def save_gguf(
    model: Transformer, path: str | Path, tokenizer: Tokenizer | None = None, dtype: torch.dtype | None = None
) -> list[str]:
    """Write trunk and head 1 of `model` as a GGUF file of the architecture "llama", and return lines about what it has
    no place for.

    The file is written beside and renamed. Matrices are stored in `dtype`, vectors (norms, biases) in fp32, which is
    what llama.cpp computes them in.

    Args:
        model: on any device, with whole (unsharded) parameters; head 1 must be a plain Llama decoder.
        tokenizer: written along with its start and end tokens and its chat template: bytes, BPE that llama.cpp has a
            name for, or SentencePiece's. None: a model of bare ids.
        dtype: float32, float16 or bfloat16 (None: what the weights are).

    Raises:
        UsageError: `gguf` is missing, another dtype, a tokenizer that llama.cpp has no name for, or a model whose head
            1 is no plain Llama decoder.
    """
    gguf = _gguf()
    config, path = model.config, Path(path)
    if not config.kind.plain_decoder:
        raise UsageError("linear heads wired anticausally: head 1 is no plain Llama decoder, and GGUF holds no other")
    refuse_other_blocks(config, "a GGUF file")
    dtype = model.trunk.embedding.weight.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype}: a GGUF file is written in float32, float16 or bfloat16")
    vocabulary = None if tokenizer is None else read_vocabulary(tokenizer, config.vocab_size)
    with replacing_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama")
        _add_config(writer, config)
        writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if dtype == torch.float32 else 'MOSTLY'}_{DTYPES[dtype]}"])
        if tokenizer is None or vocabulary is None:
            writer.add_tokenizer_model("no_vocab")
        else:
            add_vocabulary(writer, vocabulary, tokenizer)
        for name, tensor in gguf_tensors(model):
            stored = tensor.to(torch.float32 if tensor.dim() == 1 else dtype).contiguous()
            # numpy has no bfloat16, so all go as bytes.
            kind = gguf.GGMLQuantizationType[DTYPES[stored.dtype]]
            writer.add_tensor(name, stored.view(torch.uint8).numpy(), raw_dtype=kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return [] if vocabulary is None else vocabulary.left


def gguf_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The tensors of trunk and head 1, on the CPU, by llama.cpp's names and in its order of rows."""
    gguf = _gguf()
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.next_token_layers)
    heads = {"q_proj": config.attention_heads, "k_proj": config.key_value_heads}
    for name, tensor in stored_tensors(model, None)[MODEL_FILE].items():
        for part, count in heads.items():
            if f".{part}." in name:
                tensor = interleaved(tensor, count)
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), tensor


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads * E, ...) of queries or keys, reordered: Hugging Face's Llama turns coordinates i and i + E/2 as a
    pair, llama.cpp's 2i and 2i + 1."""
    halves = rows.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UsageError("gguf is not installed; install headstart[gguf]") from error
    return gguf


def _add_config(writer: Any, config: ModelConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.next_token_layers)
    writer.add_feed_forward_length(config.hidden)
    writer.add_head_count(config.attention_heads)
    writer.add_head_count_kv(config.key_value_heads)
    writer.add_key_length(config.dim_per_head)
    writer.add_value_length(config.dim_per_head)
    writer.add_rope_dimension_count(config.dim_per_head)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
