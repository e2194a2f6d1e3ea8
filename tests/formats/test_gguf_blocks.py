"""Matrices of GGUF files in blocks: the weights are those of the package gguf, and decoding takes them as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import headstart
from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.kernels.cpu import weights as layout
from headstart.decoding.kernels.cpu_backend import CompiledLinear
from headstart.decoding.kernels.pack import multiplies_blocks, pack
from headstart.errors import UsageError
from headstart.formats import gguf_file
from headstart.formats.gguf import load_gguf, load_gguf_blocks
from headstart.formats.gguf_blocks import READERS, StoredBlocks, block_weight_from_gguf
from headstart.formats.gguf_file import GgufFile
from headstart.formats.heads import save_heads
from headstart.model.transformer import Transformer
from tests.gguf_models import (
    CONFIGS,
    architecture,
    dequantized,
    gguf,
    gguf_metadata,
    gguf_tensors,
    random_blocks,
    write_gguf,
)
from tests.models import WIRINGS, random_model, with_heads_of

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""The types whose blocks are as long as a group."""


def write_quantized(path: Path, name: str, model: Transformer, keep: tuple[str, ...] = ()) -> Path:
    """Write a model of `CONFIGS` with matrices of all types of `KINDS` in turn, except those that `keep` names."""
    kind, tensors, kinds = architecture(name), {}, {}
    for i, (key, value) in enumerate(gguf_tensors(kind, model).items()):
        tensors[key] = value
        if value.ndim == 2 and not any(part in key for part in keep):
            kinds[key] = KINDS[i % len(KINDS)]
            tensors[key] = gguf.quants.quantize(value, gguf.GGMLQuantizationType[kinds[key]])
    return write_gguf(path, kind, gguf_metadata(kind, model.config), tensors, kinds)


def weights(model: Transformer) -> dict[str, Tensor]:
    """Return the parameters of a model whose matrices may be in blocks, dequantized."""
    found = dict(model.named_parameters(remove_duplicate=False))
    for place, module in model.named_modules():
        for attribute, blocks in vars(module).items():
            if isinstance(blocks, tuple) and blocks and isinstance(blocks[0], StoredBlocks):
                found[f"{place}.{attribute}"] = torch.cat([part.rows(slice(None)).dequantize() for part in blocks])
    return found


@pytest.mark.parametrize("kind", READERS)
def test_blocks_are_the_weights_that_gguf_dequantizes(kind: str) -> None:
    stored = random_blocks(7, 512, kind)
    part = block_weight_from_gguf(stored, kind)
    assert torch.equal(part.dequantize(), dequantized(stored, kind))
    assert part.bits == (8 if kind[1] in "68" else int(kind[1]))  # no wider than the file, Q6_K excepted


@pytest.mark.parametrize("name", ["llama", "llama, tied, biases", "qwen2", "gemma3"])
def test_a_model_in_blocks_has_the_weights_of_the_dequantized_one(tmp_path, name: str) -> None:
    """Rows of queries and keys change places, and fused matrices have parts of several types."""
    path = write_quantized(tmp_path / "m.gguf", name, random_model(CONFIGS[name]))
    model = load_gguf_blocks(path)
    got, want = weights(model), weights(load_gguf(path))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)
    types = {part.kind for part in model.trunk.blocks[0].attention.qkv.weight}
    assert len(types) > 1


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_decoding_in_blocks_is_near_decoding_in_float32(tmp_path, name: str) -> None:
    path = write_quantized(tmp_path / "m.gguf", name, random_model(CONFIGS[name], scale=0.05))
    tokens = torch.randint(0, 64, (2, 20))
    want = load_gguf(path)(tokens)
    for compiled in (True, False):
        got = pack(load_gguf_blocks(path), compiled=compiled)(tokens)
        assert 0 < (got - want).norm() / want.norm() < 0.03


def test_a_matrix_with_a_part_of_another_type_is_dequantized(tmp_path) -> None:
    path = write_quantized(tmp_path / "m.gguf", "llama", random_model(CONFIGS["llama"]), keep=("attn_k", "ffn_down"))
    model = load_gguf_blocks(path)
    attention, mlp = model.trunk.blocks[0].attention, model.trunk.blocks[0].mlp
    assert isinstance(attention.qkv.weight, Tensor) and isinstance(mlp.down.weight, Tensor)
    assert isinstance(attention.out.weight, tuple) and isinstance(mlp.gate_up.weight, tuple)
    assert pack(model)(torch.arange(9)[None]).isfinite().all()
    path = write_quantized(tmp_path / "n.gguf", "llama", random_model(CONFIGS["llama"]), keep=("token_embd",))
    assert load_gguf_blocks(path) is None


def test_a_dtype_or_another_quantization_replaces_the_blocks(tmp_path) -> None:
    path = write_quantized(tmp_path / "m.gguf", "llama", random_model(CONFIGS["llama"]))
    forms = {
        form: backend_of(headstart.load(path, **how).transformer).form
        for form, how in {"blocks": {}, None: {"dtype": "float32"}, "q8": {"quantize": "q8"}}.items()
    }
    assert forms == {form: form for form in forms} | {"blocks": "blocks" if multiplies_blocks("cpu") else None}


@pytest.mark.parametrize(("kind", "wiring"), [pair for pair in WIRINGS if pair != ("linear", "anticausal")])
def test_drafts_of_heads_on_blocks_change_no_output(kind: str, wiring: str, tmp_path) -> None:
    """Blocks of the file are layers of the trunk or head 1, by the kind of the heads."""
    layers = {"extra_layers": 2, "layers": 5} if kind == "transformer" else {}
    model = random_model(with_heads_of(CONFIGS["qwen2"], kind, wiring, heads=3, **layers))
    save_heads(model, tmp_path / "heads")
    path = write_quantized(tmp_path / "m.gguf", "qwen2", model)
    loaded = headstart.load(path, heads=tmp_path / "heads")
    assert backend_of(loaded.transformer).form == ("blocks" if multiplies_blocks("cpu") else None)
    plain, drafted = (loaded.generate([1, 2, 3], 30, heads=heads, temperature=1.0).tokens for heads in (1, 3))
    assert plain == drafted and len(plain) == 30
    if multiplies_blocks("cpu"):  # nothing that a pass multiplies with is wider than blocks
        assert {each.packed.dtype for each in loaded.transformer.modules() if isinstance(each, CompiledLinear)} == {
            torch.uint8
        }


def test_a_matrix_of_head_1_that_is_no_block_keeps_its_values(tmp_path) -> None:
    """Rounding it would change the output: heads 2..n alone take blocks of 8 bits."""
    model = random_model(with_heads_of(CONFIGS["qwen2"], "transformer", "parallel", heads=3, extra_layers=2, layers=5))
    save_heads(model, tmp_path / "heads")
    path = write_quantized(tmp_path / "m.gguf", "qwen2", model, keep=("output", "blk.4.ffn_down"))
    loaded = headstart.load(path, heads=tmp_path / "heads").transformer
    if multiplies_blocks("cpu"):
        assert loaded.unembedding.first.packed.dtype != torch.uint8 != loaded.heads[0].block.mlp.down.packed.dtype
    tokens = torch.randint(0, 64, (1, 9))
    assert torch.equal(loaded(tokens), headstart.load(path).transformer(tokens))


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "blk.0.attn_q.weight", "token_embd.weight"])
def test_blocks_that_are_not_finite_are_refused(tmp_path, name: str, value: str) -> None:
    path = write_quantized(tmp_path / "m.gguf", "llama", random_model(CONFIGS["llama"]))
    stored = GgufFile(path).raw(name)
    content = bytearray(path.read_bytes())
    begin = content.index(stored.tobytes())
    content[begin : begin + 2] = np.float16(value).tobytes()  # the scale of the first block
    path.write_bytes(content)
    for settings in ({}, {"dtype": "float32"}):
        with pytest.raises(UsageError, match="holds NaN or infinite values"):
            headstart.load(path, **settings)


def test_several_threads_pack_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_PIECE", 1)  # pieces of 16 rows
    blocks = tuple(
        block_weight_from_gguf(random_blocks(rows, 96, kind), kind) for rows, kind in ((50, "Q5_1"), (64, "Q8_0"))
    )
    before, packed = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            packed.append(layout.pack_blocks(blocks))
            assert torch.get_num_threads() == threads
        monkeypatch.setattr(layout, "_PIECE", 1 << 18)
        packed.append(layout.pack_blocks(blocks))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(packed[0], packed[1]) and torch.equal(packed[0], packed[2])


def test_loading_reads_the_header_once(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = write_quantized(tmp_path / "m.gguf", "llama", random_model(CONFIGS["llama"])), []
    original = gguf_file.read_header
    monkeypatch.setattr(gguf_file, "read_header", lambda part: read.append(part) or original(part))
    headstart.load(path)
    assert read == [path]
    write_quantized(path, "llama", random_model(replace(CONFIGS["llama"], layers=4)))
    assert headstart.load(path).config.layers == 4  # nothing is kept
