"""GGUF files of llama.cpp, read and written: trunk and head 1. Needs the package `gguf` (the extra "gguf").

Models of `gguf_config.ARCHITECTURES` are read, plain Llama decoders are written. Drafting heads are left out, because
llama.cpp decodes with head 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headstart.data.tokenizers import Tokenizer
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.kernels.blocks import put_blocks
from headstart.decoding.kernels.pack import pack
from headstart.decoding.settings import Request
from headstart.errors import UsageError
from headstart.fileio import replacing_file
from headstart.formats.assembly import assemble_in_place, interleaved, refuse_other_blocks, stored_tensors
from headstart.formats.format import NEW_TOKENS, Check, Format, compare_logits
from headstart.formats.gguf_blocks import READERS, StoredBlocks
from headstart.formats.gguf_config import (
    EMBEDDING,
    GgufSource,
    architecture_of,
    check_tensors,
    gguf_sources,
    read_gguf_config,
)
from headstart.formats.gguf_file import GgufFile, open_gguf
from headstart.formats.gguf_header import MAGIC, import_gguf
from headstart.formats.gguf_tokenizer import tokenizer_from_metadata
from headstart.formats.gguf_vocabulary import add_vocabulary, read_vocabulary
from headstart.formats.huggingface import check_vocabulary
from headstart.formats.tensor_names import MODEL_FILE, Part, stored_parts
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def load_gguf(path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Transformer:
    """Return the model in a GGUF file, dequantized as the package gguf does it.

    Args:
        path: the file, or any part of a split model.
        dtype: of all parameters (None: that of the stored embedding, float32 if it is quantized).
        device: where the parameters are made.

    Raises:
        UsageError: a file that cannot be read, an architecture or values that headstart does not compute, tensors that
            are missing or at odds with the metadata.
    """
    file = open_gguf(path)
    config = read_gguf_config(file)
    sources = gguf_sources(config)
    check_tensors(file, config, sources)
    return _load(file, config, sources, stored_dtype(file) if dtype is None else dtype, device, {})


def _load(
    file: GgufFile,
    config: ModelConfig,
    sources: Mapping[str, list[GgufSource]],
    dtype: torch.dtype,
    device: str | torch.device,
    shared: Mapping[str, nn.Parameter],
) -> Transformer:
    """Return the model, without reading what `shared` has; see `assemble_in_place`."""
    by_part = {
        part.name: source for name, parts in stored_parts(config).items() for part, source in zip(parts, sources[name])
    }

    def fill(part: Part, target: Tensor) -> None:
        source = by_part[part.name]
        order = source.order()
        if order is None and not source.shift:
            file.read_into(source.name, target)
            return
        tensor = file.dequantized(source.name) - source.shift
        target.copy_(tensor if order is None else tensor[order])

    try:
        return assemble_in_place(config, fill, dtype, device, shared)
    except UsageError as error:
        raise UsageError(f"{file.path}: {error}") from error


def load_gguf_blocks(path: str | Path, model: Transformer | None = None) -> Transformer | None:
    """Return the model in a GGUF file with its matrices in blocks, for `pack` alone: see `Format.read_blocks`.

    Matrices with a part of another type than those of `READERS` are dequantized.
    """
    file = open_gguf(path)
    config = read_gguf_config(file)
    sources = gguf_sources(config)
    check_tensors(file, config, sources)
    blocks = {
        name: tuple(_stored_blocks(file, part) for part in parts)
        for name, parts in sources.items()
        if all(file.type(part.name).name in READERS for part in parts)
    }
    if "trunk.embedding.weight" not in blocks:
        return None
    if model is None:
        shared = {}
        for name, parts in stored_parts(config).items():
            if name in blocks:
                rows, columns = sum(part.shape[0] for part in parts), parts[0].shape[1]
                shared[parts[0].name] = nn.Parameter(torch.empty(rows, columns, device="meta"))
        model = _load(file, config, sources, torch.float32, "cpu", shared)
    # A block of the file may have another name in a model with heads: that of a layer of the trunk, or of head 1.
    names = {parts[0].name: name for name, parts in stored_parts(model.config).items()}
    stored = stored_parts(config)
    put_blocks(model, {names[stored[name][0].name]: read for name, read in blocks.items()})
    if config.tied:
        put_blocks(model, {"unembedding.weights.0": blocks["trunk.embedding.weight"]})
    return model


def _stored_blocks(file: GgufFile, source: GgufSource) -> StoredBlocks:
    order, name = source.order(), f"{file.path}: {source.name}"
    rows = None if order is None else order.numpy()
    return StoredBlocks(file.raw(source.name), file.type(source.name).name, name, rows)


def stored_dtype(file: GgufFile) -> torch.dtype:
    """Return the dtype in which a file stores the embedding, float32 if it is quantized."""
    kinds = {name: dtype for dtype, name in DTYPES.items()}
    return kinds.get(file.type(EMBEDDING).name, torch.float32)


def save_gguf(
    model: Transformer, path: str | Path, tokenizer: Tokenizer | None = None, dtype: torch.dtype | None = None
) -> list[str]:
    """Write trunk and head 1 of `model` as a GGUF file of the architecture "llama".

    The file is written under a temporary name and renamed. Matrices are stored in `dtype`, vectors (norms, biases) in
    fp32, in which llama.cpp computes them. Returns lines about what the file has no place for.

    Args:
        model: on any device, with whole (unsharded) parameters; head 1 must be a plain Llama decoder.
        path: where the file goes.
        tokenizer: written with its start and end tokens and its chat template: bytes, BPE that llama.cpp has a
            name for, or SentencePiece's. None: a model of bare ids.
        dtype: float32, float16 or bfloat16 (None: what the weights are).

    Raises:
        UsageError: `gguf` is missing, another dtype, a tokenizer that llama.cpp has no name for, or a model whose head
            1 is no plain Llama decoder.
    """
    gguf = import_gguf()
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
        write_file(writer, gguf_tensors(model), dtype)
    return [] if vocabulary is None else vocabulary.left


def write_file(writer: Any, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    """Add tensors to a writer, matrices in `dtype`, vectors in fp32 and ids as they are, and write the file."""
    kinds = import_gguf().GGMLQuantizationType
    for name, tensor in tensors:
        floating = tensor.is_floating_point()
        stored = (tensor.to(torch.float32 if tensor.dim() == 1 else dtype) if floating else tensor).contiguous()
        # numpy has no bfloat16, so all tensors are passed as bytes.
        kind = kinds[DTYPES[stored.dtype] if floating else "I64"]
        writer.add_tensor(name, stored.view(torch.uint8).numpy(), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def gguf_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of trunk and head 1, on the CPU, by llama.cpp's names and in its order of rows."""
    gguf = import_gguf()
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.next_token_layers)
    heads = {"q_proj": config.attention_heads, "k_proj": config.key_value_heads}
    for name, tensor in stored_tensors(model, None)[MODEL_FILE].items():
        for part, count in heads.items():
            if f".{part}." in name:
                tensor = interleaved(tensor, count)
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), tensor


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


@torch.no_grad()
def compare_gguf_tensors(model: Transformer, file: Path) -> Check:
    """Compare every tensor of a GGUF file, dequantised by the package gguf, with the model's."""
    stored, expected = GgufFile(file), dict(gguf_tensors(model))
    same = set(stored.names) == expected.keys() and all(
        torch.equal(stored.dequantized(name), tensor.float()) for name, tensor in expected.items()
    )
    if not same:
        raise UsageError("gguf: read back, its tensors differ from the model's; nothing was kept, report this")
    return Check("gguf", f"all {len(expected)} tensors equal")


def greedy_tokens(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Return the tokens that head 1 generates greedily."""
    engine = Engine(pack(model), EngineConfig(context=len(prompt) + count))
    return generate_all(engine, [Request(tuple(prompt), count, heads=1)])[0].tokens


def compare_with_llama_cpp(model: Transformer, file: Path, tokenizer: Tokenizer | None) -> Check:
    """Compare the greedy tokens of llama.cpp with ours; a check that is not possible here says why."""
    try:
        import llama_cpp
    except ImportError:
        return Check("llama.cpp", "llama-cpp-python is not installed: greedy text not compared", passed=None)
    if tokenizer is None:
        return Check("llama.cpp", "a model of bare ids: greedy text not compared", passed=None)
    if model.trunk.embedding.weight.dtype != torch.float32:
        # llama.cpp multiplies 16-bit weights with rounded activations: greedy tokens may differ after near ties.
        return Check("llama.cpp", "compared in float32 only: convert with --dtype float32 to see it", passed=None)
    new = min(NEW_TOKENS, model.config.context // 2)
    prompt = tokenizer.encode("def f(x):")[: model.config.context - new]
    theirs = llama_cpp.Llama(
        str(file), n_ctx=model.config.context, n_threads=1, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    end = theirs.token_eos()
    written: list[int] = []
    for token in theirs.generate(prompt, temp=0.0, repeat_penalty=1.0):
        if token == end or len(written) == new:
            break
        written.append(token)
    mine = greedy_tokens(model, prompt, new)
    mine = mine[: mine.index(end)] if end in mine else mine
    if written != mine:
        raise UsageError("llama.cpp: writes another greedy text than the model; nothing was kept, report this")
    return Check("llama.cpp", f"the same greedy text, {len(mine)} tokens")


def _check_gguf_in_transformers(model: Transformer, path: Path) -> Check:
    try:
        import transformers
    except ImportError:
        return Check("transformers", "transformers is not installed: logits not compared", passed=None)
    if model.config.attention_bias:
        return Check("transformers", "its GGUF loader leaves out biases of attention: not compared", passed=None)
    transformers.logging.disable_progress_bar()
    again = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)

    def logits(tokens: Tensor) -> Tensor:
        return again(tokens).logits[:, :, None]

    return compare_logits("transformers", model.float(), logits, 1)


class Gguf(Format):
    """A GGUF file, or the files of a split one."""

    is_file = True

    def detect(self, path: Path) -> bool:
        """Return whether the file begins like a GGUF file."""
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC

    def opened(self, path: Path) -> AbstractContextManager[object]:
        """Keep the file open, so that its header is read once."""
        return nullcontext(open_gguf(path))

    def files(self, path: Path) -> list[Path]:
        """Return the file, or all files of a split model."""
        return open_gguf(path).paths

    def details(self, path: Path) -> dict[str, Any]:
        """Return the architecture, the types of tensors with their numbers and bytes, and if there is a template."""
        file, types = open_gguf(path), dict[str, dict[str, int]]()
        for name in file.names:
            counts = types.setdefault(file.type(name).name, {"tensors": 0, "bytes": 0})
            counts["tensors"] += 1
            counts["bytes"] += file.stored_bytes(name)
        return {
            "architecture": architecture_of(file),
            "tensor_types": types,
            "chat_template": "tokenizer.chat_template" in file.metadata,
        }

    def write(self, model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[str]:
        """Write trunk and head 1; further heads are left out."""
        heads = model.config.heads
        left = [] if heads == 1 else ["head 2: left out" if heads == 2 else f"heads 2..{heads}: left out"]
        left += save_gguf(model, path, tokenizer)
        if tokenizer is None:
            left.append("tokenizer: the source has none, so the file takes and gives ids")
        return left

    def check(self, model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[Check]:
        """Compare tensors, and what transformers and llama.cpp compute with them."""
        checks = [compare_gguf_tensors(model, path), _check_gguf_in_transformers(model, path)]
        return [*checks, compare_with_llama_cpp(model, path, tokenizer)]

    def read(self, path: Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Transformer:
        """Return the model, with one head."""
        return load_gguf(path, dtype, device)

    def read_blocks(self, path: Path, model: Transformer | None = None) -> Transformer | None:
        """Return the model with its matrices in blocks, if its embedding is stored so."""
        return load_gguf_blocks(path, model)

    def read_config(self, path: Path) -> ModelConfig:
        """Return what the metadata says. Raises UsageError if the tensors contradict it."""
        file = open_gguf(path)
        config = read_gguf_config(file)
        check_tensors(file, config, gguf_sources(config))
        return config

    def read_dtype(self, path: Path) -> torch.dtype:
        """Return the dtype of the embedding, float32 if it is quantized."""
        self.read_config(path)
        return stored_dtype(open_gguf(path))

    def read_tokenizer(self, path: Path) -> Tokenizer | None:
        """Return the tokenizer of the metadata, if there is one."""
        file = open_gguf(path)
        tokenizer = tokenizer_from_metadata(file.metadata, str(path))
        if tokenizer is not None:
            check_vocabulary(tokenizer, read_gguf_config(file).vocab_size, f"load {path}")
        return tokenizer
