from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch

from headstart.data.byte_tokenizer import byte_alphabet
from headstart.data.prepare.bpe import train
from headstart.data.tokenizers import ByteTokenizer, PretrainedTokenizer
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.kernels.pack import pack
from headstart.decoding.settings import Request
from headstart.errors import UsageError
from headstart.formats.assembly import interleaved
from headstart.formats.gguf import save_gguf
from headstart.formats.gguf_vocabulary import read_vocabulary
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

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
    other = PretrainedTokenizer(bpe.directory)
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
    ours = generate_all(Engine(pack(model), EngineConfig(context=100)), [Request(tuple(prompt), 40, heads=1)])[0]
    assert written == ours.tokens


def test_llama_cpp_splits_text_as_the_tokenizer_does(tmp_path, bpe):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    save_gguf(random_model(SIZES), tmp_path / "m.gguf", bpe)
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=128, n_threads=1, verbose=False)
    for text in ("def add(a, b):\n    return a", "it's  1999\n\n\n  naïve 你好\ttabs", " x", ""):
        assert theirs.tokenize(text.encode(), add_bos=True, special=True) == bpe.encode(text)


REGEX = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}%s"
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)


def steps(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def split_by(regex: str, **changes: object) -> dict[str, Any]:
    pattern = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} | changes
    return steps(pattern, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": True})


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True}
DIGITS = {"type": "Digits", "individual_digits": True}
SPLIT_NAMES: list[tuple[dict[str, Any], bool, str | None]] = [
    (BYTES, False, "gpt-2"),
    (BYTES, True, None),
    (BYTES | {"add_prefix_space": True}, False, None),
    (steps(DIGITS, BYTES), False, "smollm"),
    (steps(DIGITS | {"individual_digits": False}, BYTES), False, None),
    (steps(BYTES, DIGITS), False, None),
    (split_by(REGEX % "{1,3}"), True, "llama-bpe"),
    (split_by(REGEX % "{1,3}"), False, "smaug-bpe"),
    (split_by(REGEX % ""), False, "qwen2"),
    (split_by(REGEX % ""), True, None),
    (split_by(REGEX % "{1,3}", behavior="Removed"), True, None),
    (split_by("\\s+"), False, None),
]


def changed(folder, source, **changes):
    """A tokenizer whose tokenizer.json says something else; `model` adds to its part of that name."""
    content = json.loads((source / "tokenizer.json").read_text())
    content["model"] |= changes.pop("model", {})
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content | changes))
    shutil.copy(source / "tokenizer_config.json", folder)
    return PretrainedTokenizer(folder)


@pytest.mark.parametrize(("splitting", "whole_words", "name"), SPLIT_NAMES)
def test_the_name_of_how_text_is_split(tmp_path, bpe, splitting, whole_words, name):
    tokenizer = changed(tmp_path, bpe.directory, pre_tokenizer=splitting, model={"ignore_merges": whole_words})
    if name is None:
        with pytest.raises(UsageError, match="another split"):
            read_vocabulary(tokenizer, 300)
    else:
        found = read_vocabulary(tokenizer, 300)
        assert (found.model, found.pre, found.left) == ("gpt2", name, [])
    nfc = changed(tmp_path, bpe.directory, normalizer={"type": "NFC"})
    assert read_vocabulary(nfc, 300).left == ["normalization NFC: llama.cpp takes text as it is"]


def test_where_texts_begin_and_end(tmp_path, bpe):
    tokenizer = changed(tmp_path, bpe.directory)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    for start, ends, left in (
        ((), {tokenizer.end_id}, []),
        ((3,), {tokenizer.end_id, 5, 7}, []),
        ((3, 4), {tokenizer.end_id, 5, 7, 9}, ["end token *: the file", "start token %: llama.cpp puts one"]),
    ):
        tokenizer.start_ids, tokenizer.end_ids = start, frozenset(ends)
        lines = save_gguf(random_model(SIZES), tmp_path / "m.gguf", tokenizer)
        by_id = {i: token for token, i in tokenizer.definition()["model"]["vocab"].items()}
        expected = [line.replace("*", by_id[9]).replace("%", by_id[4]) for line in left]
        assert len(lines) == len(left) and all(line.startswith(each) for line, each in zip(lines, expected))
        fields, _ = read(tmp_path / "m.gguf")
        assert fields["tokenizer.ggml.bos_token_id"] == (start[0] if start else tokenizer.end_id)
        assert fields["tokenizer.ggml.add_bos_token"] is bool(start)
        assert fields["tokenizer.ggml.add_eos_token"] is False
        assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.end_id
        further = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
        assert further == ([5, 7] if start else [None, None])
        assert fields["tokenizer.chat_template"] == "{{ messages }}"


def test_tokens_of_chats(tmp_path, bpe):
    """A start token that templates alone write, the end of a turn, and ends that llama.cpp knows by their names."""
    names = ["<|begin|>", "<|im_end|>", "<|turn|>", "<reponame>", "<|other|>"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": bpe.vocab_size + i, "content": text, **flags} for i, text in enumerate(names)]
    changed(tmp_path, bpe.directory, added_tokens=[*bpe.definition()["added_tokens"], *added])
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bos_token": "<|begin|>"}))
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|turn|>{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = PretrainedTokenizer(tmp_path)
    begin, im_end, turn, reponame, other = (tokenizer.encode(name)[0] for name in names)
    tokenizer.end_ids = frozenset({tokenizer.end_id, im_end, reponame, other})
    save_gguf(random_model(SIZES), tmp_path / "m.gguf", tokenizer)
    fields, _ = read(tmp_path / "m.gguf")
    assert fields["tokenizer.ggml.bos_token_id"] == begin and fields["tokenizer.ggml.add_bos_token"] is False
    places = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    assert places == [tokenizer.end_id, turn, other]


def sentencepiece(folder, merges, **changes):
    letters = [f"<0x{byte:02X}>" for byte in range(256)] + ["\u2581", "a", "b", "c", "ab", "bc", "abc"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "added_tokens": [{"id": i, "content": text, **flags} for i, text in enumerate(["<unk>", "<s>", "</s>"])],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges, "byte_fallback": True, "unk_token": "<unk>"},
    }
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content | changes))
    return PretrainedTokenizer(folder)


def test_sentencepiece_as_a_vocabulary(tmp_path):
    """Scores are the order of merges. llama.cpp merges whatever makes a token, and a line reports missing merges."""
    whole = [["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"]]
    tokenizer = sentencepiece(tmp_path, whole)
    assert save_gguf(random_model(SIZES), tmp_path / "m.gguf", tokenizer) == []
    fields, _ = read(tmp_path / "m.gguf")
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"] is True
    assert fields["tokenizer.ggml.unknown_token_id"] == 0 and "tokenizer.ggml.merges" not in fields
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    of = {token: scores[i] for i, token in enumerate(tokens)}
    assert of["ab"] > of["bc"] > of["abc"]
    kinds = gguf.TokenType
    types = [kinds(fields["tokenizer.ggml.token_type"][i]) for i in (0, 1, 2, 3, 258, 259, 265, 266)]
    assert types == [kinds.UNKNOWN, *[kinds.CONTROL] * 2, *[kinds.BYTE] * 2, *[kinds.NORMAL] * 2, kinds.UNUSED]

    for merges in (whole[:3], [*whole[:1], whole[2], whole[1], whole[3]]):
        assert read_vocabulary(sentencepiece(tmp_path, merges), 300).left[0].startswith("the order of merges: 1 tokens")
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": False}
    never = sentencepiece(tmp_path, whole, normalizer=None, pre_tokenizer=metaspace)
    assert not read_vocabulary(never, 300).space_prefix and not read_vocabulary(never, 300).left
    first = metaspace | {"prepend_scheme": "first"}
    found = read_vocabulary(sentencepiece(tmp_path, whole, normalizer=None, pre_tokenizer=first), 300)
    assert found.space_prefix and found.left[0].startswith("the space before text")
    with pytest.raises(UsageError, match="another way to split text"):
        read_vocabulary(sentencepiece(tmp_path, whole, pre_tokenizer={"type": "Whitespace"}), 300)
