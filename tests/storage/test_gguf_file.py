from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headstart.data.bpe import train
from headstart.data.tokenizers import ByteTokenizer, PretrainedTokenizer, byte_alphabet
from headstart.decoding.engine import Engine, generate_all
from headstart.decoding.generation import Request
from headstart.decoding.packing import pack
from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.storage.gguf_file import interleaved, save_gguf
from headstart.storage.model_directory import load_model, save_model

gguf = pytest.importorskip("gguf", reason="gguf is not installed (headstart[gguf])")

SIZES = ModelConfig(vocab_size=300, dim=64, layers=4, attention_heads=4, kv_heads=2, context=128, norm_eps=1e-6)
SHAPES = {
    "plain": SIZES,
    "four heads": replace(SIZES, heads=4, layers=6),
    "anticausal": replace(SIZES, heads=2, wiring="anticausal"),
    "linear": replace(SIZES, heads=3, head_kind="linear"),
    "replicated": replace(SIZES, heads=3, head_kind="replicated"),
    "tied, biases, wide heads": replace(SIZES, tied=True, attention_bias=True, head_dim=32, rope_theta=5e5),
}


def random_model(config: ModelConfig) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config)
    for parameter in model.parameters():  # norms and biases too
        torch.nn.init.normal_(parameter, std=0.05 if parameter.dim() > 1 else 1.0)
    return model


def read(path):
    reader = gguf.GGUFReader(path)
    tensors = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[tensor.tensor_type.name]
        tensors[tensor.name] = torch.from_numpy(tensor.data.copy()).flatten().view(torch.uint8).view(kind).view(shape)
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_those_of_the_model(tmp_path, name, dtype):
    model = random_model(SHAPES[name])
    path = tmp_path / "model.gguf"
    save_gguf(model, path, dtype=dtype)
    fields, tensors = read(path)

    save_model(model, tmp_path / "model")
    expected = load_model(tmp_path / "model").to("cpu")  # what other tools load: trunk and head 1
    config = expected.config
    blocks = [*expected.trunk.blocks]
    if config.head_kind == "transformer":
        blocks += [expected.heads[k - 1] for k in expected.path(1)]
    assert fields["llama.block_count"] == len(blocks)
    H, K, E = config.attention_heads, config.key_value_heads, config.dim_per_head
    for i, block in enumerate(blocks):
        q, k, v = block.attention.qkv.weight.split([H * E, K * E, K * E])
        gate, up = block.mlp.gate_up.weight.split(config.hidden)
        parts = {
            "attn_norm": block.attention_norm.weight,
            "ffn_norm": block.mlp_norm.weight,
            "attn_v": v,
            "attn_output": block.attention.out.weight,
            "ffn_gate": gate,
            "ffn_up": up,
            "ffn_down": block.mlp.down.weight,
        }
        for part, tensor in parts.items():
            _same(tensors.pop(f"blk.{i}.{part}.weight"), tensor, dtype)
        # Row 2i of a head is our coordinate i, row 2i+1 our coordinate i + E/2.
        for part, tensor, heads in (("attn_q", q, H), ("attn_k", k, K)):
            theirs, ours = tensors.pop(f"blk.{i}.{part}.weight").view(heads, E, -1), tensor.view(heads, E, -1)
            _same(theirs[:, 0::2], ours[:, : E // 2], dtype)
            _same(theirs[:, 1::2], ours[:, E // 2 :], dtype)
        if config.attention_bias:
            bias_q, bias_k, bias_v = block.attention.qkv.bias.split([H * E, K * E, K * E])
            _same(tensors.pop(f"blk.{i}.attn_q.bias"), interleaved(bias_q, H), dtype)
            _same(tensors.pop(f"blk.{i}.attn_k.bias"), interleaved(bias_k, K), dtype)
            _same(tensors.pop(f"blk.{i}.attn_v.bias"), bias_v, dtype)
            _same(tensors.pop(f"blk.{i}.attn_output.bias"), block.attention.out.bias, dtype)
    _same(tensors.pop("token_embd.weight"), expected.trunk.embedding.weight, dtype)
    _same(tensors.pop("output_norm.weight"), expected.unembedding.norm.weight, dtype)
    if not config.tied:
        _same(tensors.pop("output.weight"), expected.unembedding.weights[0], dtype)
    assert not tensors  # no drafting heads, nothing twice
    assert fields["llama.rope.freq_base"] == config.rope_theta and fields["llama.vocab_size"] == 300
    assert fields["llama.attention.head_count_kv"] == K and fields["llama.attention.key_length"] == E
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(config.norm_eps)
    assert fields["tokenizer.ggml.model"] == "no_vocab"


def _same(stored, tensor, dtype):
    assert stored.dtype == (dtype if tensor.dim() > 1 else torch.float32)
    assert torch.equal(stored, tensor.detach().to(stored.dtype))


def test_bytes_and_unused_ids_as_a_vocabulary(tmp_path):
    save_gguf(random_model(SIZES), tmp_path / "m.gguf", ByteTokenizer())
    fields, _ = read(tmp_path / "m.gguf")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[:255] == byte_alphabet()[:255] and tokens[255] == "<|end|>" and len(set(tokens)) == 300
    assert types[255] == gguf.TokenType.CONTROL and set(types[256:]) == {gguf.TokenType.UNUSED}
    assert set(types[:255]) == {gguf.TokenType.NORMAL}
    assert fields["tokenizer.ggml.eos_token_id"] == 255 and not fields["tokenizer.ggml.add_bos_token"]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    train(iter(["def add(a, b):\n    return a + b  # the sum\n" * 5, "it's 1999 naïve 你好"]), 290, folder)
    return PretrainedTokenizer(folder)


def test_byte_level_bpe_as_a_vocabulary(tmp_path, bpe):
    save_gguf(random_model(SIZES), tmp_path / "m.gguf", bpe)
    fields, _ = read(tmp_path / "m.gguf")
    definition = bpe.definition()
    for token, i in definition["model"]["vocab"].items():
        assert fields["tokenizer.ggml.tokens"][i] == token
    assert len(fields["tokenizer.ggml.merges"]) == len(definition["model"]["merges"]) > 0
    assert fields["tokenizer.ggml.token_type"][bpe.end_id] == gguf.TokenType.CONTROL


def test_what_gguf_cannot_hold_is_refused_in_one_line(tmp_path, bpe, monkeypatch):
    other = PretrainedTokenizer(bpe._directory)
    definition = bpe.definition()
    monkeypatch.setattr(other, "definition", lambda: {**definition, "pre_tokenizer": {"type": "Whitespace"}})
    cases = [
        (random_model(replace(SIZES, heads=2, head_kind="linear", wiring="anticausal")), {}),
        (random_model(SIZES), {"dtype": torch.float64}),
        (random_model(SIZES), {"tokenizer": other}),
        (random_model(replace(SIZES, vocab_size=100)), {"tokenizer": ByteTokenizer()}),
    ]
    for model, arguments in cases:
        with pytest.raises(UsageError) as error:
            save_gguf(model, tmp_path / "m.gguf", **arguments)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []  # nothing half written


@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_writes_the_same_tokens(tmp_path, name):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = random_model(SHAPES[name])
    save_gguf(model, tmp_path / "m.gguf", ByteTokenizer())
    theirs = llama_cpp.Llama(
        str(tmp_path / "m.gguf"), n_ctx=128, type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
        n_threads=1, verbose=False,
    )  # fmt: skip
    prompt = list(b"def f(x):")
    assert theirs.tokenize(b"def f(x):\n \xc3\xa9", add_bos=True) == list("def f(x):\n é".encode())
    written = [token for token, _ in zip(theirs.generate(prompt, temp=0.0, repeat_penalty=1.0), range(40))]
    ours = generate_all(Engine(pack(model), context=100), [Request(tuple(prompt), 40, heads=1)])[0]
    assert written == ours.tokens


def test_llama_cpp_splits_text_as_the_tokenizer_does(tmp_path, bpe):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    save_gguf(random_model(SIZES), tmp_path / "m.gguf", bpe)
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=128, n_threads=1, verbose=False)
    for text in ("def add(a, b):\n    return a", "it's  1999\n\n\n  naïve 你好\ttabs", " x", ""):
        assert theirs.tokenize(text.encode(), add_bos=True, special=True) == bpe.encode(text)
