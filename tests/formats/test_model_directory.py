"""Other tools load what we save, and we load what was saved, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forks import Forks
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headstart.data.tokenizers import ByteTokenizer
from headstart.errors import UsageError
from headstart.formats import huggingface
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_config, load_model, load_model_tokenizer
from headstart.model.config import ModelConfig
from headstart.model.heads import MedusaHeads
from headstart.model.transformer import Transformer
from tests.cases import pairwise
from tests.models import WIRINGS as EVERY_WIRING
from tests.models import random_model, with_heads_of

transformers = pytest.importorskip("transformers", reason="parity is with transformers; install headstart[hf]")

SMALL = ModelConfig(vocab_size=61, dim=32, layers=5, attention_heads=4, context=64)
FANCY = replace(SMALL, kv_heads=2, tied=True, attention_bias=True, head_dim=16, hidden_dim=48, rope_theta=500.0)
WIRINGS = [pair for pair in EVERY_WIRING if pair != ("linear", "anticausal")]  # whose head 1 is no plain decoder
NOT_PLAIN = replace(SMALL, heads=3, head_kind="linear", wiring="anticausal")


def tokens(config: ModelConfig, shape: tuple[int, int] = (2, 24)) -> Tensor:
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def assert_same(model: Transformer, other: Transformer) -> None:
    assert other.config == model.config
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].dtype == theirs[name].dtype, name
        assert torch.equal(mine[name], theirs[name]), name


def load_in_transformers(directory: Path) -> torch.nn.Module:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model


@pairwise({"kind,wiring": WIRINGS, "heads": [1, 2, 3, 4], "base": {"plain": SMALL, "tied-gqa-bias": FANCY}})
@torch.no_grad()
def test_transformers_computes_head_1_and_headstart_every_head(
    kind: str, wiring: str, heads: int, base: ModelConfig, tmp_path: Path
) -> None:
    config = with_heads_of(base, kind, wiring, heads=heads, norm_eps=1e-6)
    model = random_model(config)
    save_model(model, tmp_path / "model")
    expected = model(tokens(config))
    theirs = load_in_transformers(tmp_path / "model")(tokens(config)).logits
    assert (theirs - expected).abs().max() < 1e-4 * expected.abs().max()
    again = load_model(tmp_path / "model")
    assert_same(model, again)
    mine, saved = again(tokens(config), heads=config.heads), model(tokens(config), heads=config.heads)
    assert torch.allclose(mine, saved, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("config", [NOT_PLAIN, replace(NOT_PLAIN, heads=1), replace(NOT_PLAIN, tied=True)])
def test_a_model_that_is_no_plain_decoder_says_so(config: ModelConfig, tmp_path: Path) -> None:
    model = random_model(config)
    save_model(model, tmp_path / "model")
    with pytest.raises(ValueError, match="headstart"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert_same(model, load_model(tmp_path / "model"))


@pytest.mark.parametrize("config", [replace(SMALL, heads=2, norm_eps=1e-6), replace(FANCY, heads=3), NOT_PLAIN])
def test_bf16_round_trip(config: ModelConfig, tmp_path: Path) -> None:
    model = random_model(config).to(torch.bfloat16)
    save_model(model, tmp_path / "model")
    assert_same(model, load_model(tmp_path / "model"))
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "bfloat16"


def test_dtypes_are_converted_on_the_way_out_and_in(tmp_path: Path) -> None:
    model = random_model(replace(SMALL, heads=2))
    save_model(model, tmp_path / "model", dtype=torch.bfloat16)
    assert_same(random_model(replace(SMALL, heads=2)).to(torch.bfloat16), load_model(tmp_path / "model"))
    assert {p.dtype for p in load_model(tmp_path / "model", dtype=torch.float64).parameters()} == {torch.float64}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_loaded_parameters_are_trainable_tied_and_their_own(tmp_path: Path) -> None:
    save_model(random_model(replace(FANCY, heads=2)), tmp_path / "model")
    model = load_model(tmp_path / "model")
    assert model.unembedding.weights[0] is model.trunk.embedding.weight
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == model.config.parameters()["total"]
    before = (tmp_path / "model/model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (tmp_path / "model/model.safetensors").read_bytes() == before


def test_files_of_a_directory(tmp_path: Path) -> None:
    save_model(random_model(SMALL), tmp_path / "one")
    assert sorted(str(p.relative_to(tmp_path / "one")) for p in (tmp_path / "one").rglob("*")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    save_model(random_model(replace(SMALL, heads=3, wiring="causal")), tmp_path / "three")
    with safe_open(tmp_path / "three/heads/heads.safetensors", "pt") as file:
        assert {name.split(".")[1] for name in file.keys()} == {"2", "3"}  # noqa: SIM118
        assert "heads.2.self_attn.q_proj.weight" in file.keys()  # noqa: SIM118
    with safe_open(tmp_path / "three/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {name.split(".")[2] for name in file.keys() if ".layers." in name} == {"0", "1", "2"}  # noqa: SIM118


def test_anticausal_heads_are_layers_in_the_order_of_computation(tmp_path: Path) -> None:
    config = replace(SMALL, heads=3, wiring="anticausal")
    model = random_model(config)
    save_model(model, tmp_path / "model")
    assert not (tmp_path / "model/heads").exists()
    with safe_open(tmp_path / "model/model.safetensors", "pt") as file:
        for layer, k in ((2, 3), (3, 2), (4, 1)):
            stored = file.get_tensor(f"model.layers.{layer}.self_attn.o_proj.weight")
            assert torch.equal(stored, model.heads[k - 1].attention.out.weight)


def test_a_directory_alone_makes_text(tmp_path: Path) -> None:
    save_model(random_model(replace(SMALL, vocab_size=256, heads=2)), tmp_path / "model", ByteTokenizer())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    model = load_in_transformers(tmp_path / "model")
    assert model.generation_config.eos_token_id == 255
    inputs = tokenizer("def f(", return_tensors="pt")
    assert inputs.input_ids.tolist() == [list(b"def f(")]
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(out[0]).startswith("def f(")
    assert out.shape[1] > 6
    ours = load_model_tokenizer(tmp_path / "model")
    assert isinstance(ours, ByteTokenizer)


def test_a_directory_without_tokenizer_takes_ids(tmp_path: Path) -> None:
    save_model(random_model(SMALL), tmp_path / "model")
    assert load_model_tokenizer(tmp_path / "model") is None
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


def llama(directory: Path, shard: str = "5GB", **changes: object) -> torch.nn.Module:
    """A random Llama that transformers made and saved."""
    torch.manual_seed(0)
    fields = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(fields | changes)))
    model.save_pretrained(directory, max_shard_size=shard)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"head_dim": 16},
        {"num_hidden_layers": 1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    ],
    ids=str,
)
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@torch.no_grad()
def test_an_ordinary_llama_loads(changes: dict[str, object], shard: str, tmp_path: Path) -> None:
    theirs = llama(tmp_path / "hf", shard, **changes)
    assert (tmp_path / "hf/model.safetensors.index.json").exists() == (shard == "20KB")
    ours = load_model(tmp_path / "hf")
    assert ours.config.heads == 1
    expected = theirs(tokens(ours.config)).logits
    assert (ours(tokens(ours.config)) - expected).abs().max() < 1e-4 * expected.abs().max()
    # And goes back out as the same Llama.
    save_model(ours, tmp_path / "again")
    again = load_in_transformers(tmp_path / "again")
    assert torch.equal(again(tokens(ours.config)).logits, expected)


def test_older_configurations_are_read(tmp_path: Path) -> None:
    llama(tmp_path / "hf")
    edit(tmp_path / "hf", rope_parameters=None, rope_theta=123, rope_scaling=None, num_key_value_heads=2, head_dim=None)
    assert load_config(tmp_path / "hf").rope_theta == 123.0


def edit(directory: Path, **changes: object) -> None:
    """Changes config.json as a text editor would; a name with dots reaches into the key "headstart"."""
    file = directory / "config.json"
    content = json.loads(file.read_text())
    for name, value in changes.items():
        content[name] = value
    file.write_text(json.dumps(content))


def refusal(directory: Path, *words: str) -> None:
    """load_model refuses with one line that has these words."""
    with pytest.raises(UsageError) as caught:
        load_model(directory)
    message = str(caught.value)
    assert "\n" not in message and str(directory) in message and "; " in message, message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model_type": "gpt2"},
            ["model_type", "gpt2", "llama, mistral, ministral, qwen2, qwen3, smollm3, olmo2, gemma3_text"],
        ),
        ({"model_type": "gemma2"}, ["gemma2", "caps", "llama"]),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, ["own", "code of its own", "llama"]),
        ({"model_type": None}, ["model_type", "llama"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, ["low_freq_factor", "missing"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2}}, ["rope_scaling", "yarn"]),
        ({"rope_scaling": {"type": "yarn", "factor": "2"}}, ["factor", "a number"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"hidden_size": None}, ["hidden_size", "missing"]),
        ({"hidden_size": "32"}, ["hidden_size", "whole number"]),
        ({"num_attention_heads": 3}, ["attention_heads"]),
        ({"num_key_value_heads": 0}, ["kv_heads"]),
        ({"vocab_size": 62}, ["model.safetensors", "embed_tokens", "[61, 32]", "[62, 32]"]),
        ({"num_hidden_layers": 4}, ["model.safetensors", "model.layers.3", "lacks"]),
        ({"num_hidden_layers": 2}, ["model.safetensors", "model.layers.2", "holds"]),
        ({"attention_bias": True}, ["lacks", "bias"]),
    ],
    ids=str,
)
def test_a_configuration_we_do_not_compute_is_refused(
    changes: dict[str, object], words: list[str], tmp_path: Path
) -> None:
    llama(tmp_path / "hf")
    edit(tmp_path / "hf", **changes)
    refusal(tmp_path / "hf", *words)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(random_model(replace(SMALL, heads=3)), tmp_path / "model")
    return tmp_path / "model"


def own(directory: Path) -> dict[str, object]:
    return json.loads((directory / "config.json").read_text())["headstart"]["model"]


def test_headstart_key_at_odds_with_itself_or_the_files(saved: Path) -> None:
    model = own(saved)
    for headstart, words in (
        ({"format": 2, "model": model}, ["format 2", "update"]),
        ({"format": 1}, ["format"]),
        ("no", ["format"]),
        ({"format": 1, "model": model | {"depth": 3}}, ["model.depth"]),
        ({"format": 1, "model": model | {"heads": "3"}}, ["model.heads", "whole number"]),
        ({"format": 1, "model": model | {"tied": 1}}, ["model.tied", "true or false"]),
        ({"format": 1, "model": model | {"wiring": "circular"}}, ["model.wiring", "circular"]),
        ({"format": 1, "model": model | {"heads": 9}}, ["model.heads 9"]),
        ({"format": 1, "model": model | {"rope_theta": 5.0}}, ["rope_theta"]),
        ({"format": 1, "model": model | {"dim": 64}}, ["hidden_size"]),
        # Each of these is a possible model, but not the one in the files.
        ({"format": 1, "model": model | {"heads": 4, "extra_layers": 1}}, ["heads.safetensors", "heads.4", "lacks"]),
        ({"format": 1, "model": model | {"heads": 2, "layers": 4}}, ["heads.safetensors", "heads.3", "holds"]),
    ):
        edit(saved, headstart=headstart)
        refusal(saved, "config.json", *words)


def test_missing_heads_are_named_and_the_mend_works(saved: Path) -> None:
    expected = load_model(saved)(tokens(SMALL))
    (saved / "heads/heads.safetensors").unlink()
    refusal(saved, "heads/heads.safetensors", "3 heads", 'remove the key "headstart"')
    edit(saved, headstart=None)
    alone = load_model(saved)
    assert alone.config.heads == 1
    assert torch.equal(alone(tokens(SMALL)), expected)


@pytest.mark.parametrize("file", ["model.safetensors", "heads/heads.safetensors"])
def test_damaged_weights(saved: Path, file: str) -> None:
    whole = (saved / file).read_bytes()
    for part in (whole[: len(whole) // 2], whole[:-1], whole[:20], whole[:4], b""):
        (saved / file).write_bytes(part)
        refusal(saved, file, "damaged or cut short")


def test_weights_that_are_not_there(saved: Path, tmp_path: Path) -> None:
    (saved / "model.safetensors").rename(saved / "model.bin")
    refusal(saved, "pickles", "safetensors")
    (saved / "model.bin").unlink()
    refusal(saved, "model.safetensors", "is missing")
    llama(tmp_path / "hf", "20KB")
    shard = sorted((tmp_path / "hf").glob("model-*.safetensors"))[1]
    shard.unlink()
    refusal(tmp_path / "hf", shard.name, "is missing")
    (tmp_path / "hf/model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "../x.safetensors"}}')
    refusal(tmp_path / "hf", "index.json", "../x.safetensors")
    (tmp_path / "hf/model.safetensors.index.json").write_text('{"weight_map": {}}')
    refusal(tmp_path / "hf", "index.json", "weight_map")


def test_quantised_weights(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    content = load_file(saved / "model.safetensors")
    content["model.norm.weight"] = content["model.norm.weight"].to(torch.int8)
    save_file(content, saved / "model.safetensors")
    refusal(saved, "model.safetensors", "model.norm.weight", "I8")


def test_a_tied_model_with_a_stored_unembedding(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = random_model(FANCY)
    save_model(model, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    content = load_file(file)
    save_file(content | {"lm_head.weight": content["model.embed_tokens.weight"].clone()}, file)
    assert_same(model, load_model(tmp_path / "model"))
    save_file(content | {"lm_head.weight": content["model.embed_tokens.weight"] + 1}, file)
    refusal(tmp_path / "model", "lm_head.weight", "tie_word_embeddings")


def test_old_rotary_tables_are_passed_over(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    before = load_model(saved)
    content = load_file(saved / "model.safetensors")
    save_file(content | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, saved / "model.safetensors")
    assert_same(before, load_model(saved))


def test_no_model_at_all(tmp_path: Path) -> None:
    refusal(tmp_path / "nowhere", "no such directory")
    refusal(tmp_path, "holds no config.json")
    (tmp_path / "config.json").write_text("{")
    refusal(tmp_path, "config.json", "not JSON")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    refusal(tmp_path, "config.json", "not JSON")
    (tmp_path / "config.json").write_text("[]")
    refusal(tmp_path, "config.json", "object")
    refusal(tmp_path / "config.json", "is no GGUF file; name one, or the directory")


def test_a_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    model = random_model(SMALL)
    with pytest.raises(UsageError, match=r"256 ids, the model's vocabulary 61"):
        save_model(model, tmp_path / "model", ByteTokenizer())
    assert not list(tmp_path.iterdir())
    save_model(model, tmp_path / "model")
    ByteTokenizer().save(tmp_path / "model")
    with pytest.raises(UsageError, match=r"256 ids, the model's vocabulary 61"):
        load_model_tokenizer(tmp_path / "model")


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_save_that_fails_midway_leaves_the_previous_model(
    saved: Path, failure: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(saved)

    def fail(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise failure(28, "No space left on device")

    monkeypatch.setattr(huggingface, "save_file", fail)
    with pytest.raises(UsageError if failure is OSError else failure):
        save_model(random_model(SMALL, seed=5), saved)
    assert content(saved) == before
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.slow
def test_a_killed_save_leaves_the_previous_model(saved: Path, tmp_path: Path, forks: Forks) -> None:
    before = content(saved)
    program = f"""
import os
from headstart.model.config import ModelConfig
from headstart.model.heads import MedusaHeads
from headstart.model.transformer import Transformer
from tests.cases import pairwise
from tests.models import WIRINGS as EVERY_WIRING
from tests.models import with_heads_of
from headstart.formats import tensor_names
from headstart.formats import huggingface
whole = huggingface.save_file
def die(*arguments, **named):
    whole(*arguments, **named)
    os._exit(9)
huggingface.save_file = die
huggingface.save_model(Transformer(ModelConfig(dim=32, layers=2, attention_heads=4)), {str(saved)!r})
"""
    assert forks.run(tmp_path / "said.txt", tmp_path, program=program)[0] == 9
    assert content(saved) == before
    load_model(saved)


def test_saving_replaces_a_model_and_nothing_else(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(SMALL, seed=5)
    save_model(model, saved)
    assert_same(model, load_model(saved))
    (tmp_path / "link").symlink_to(saved)
    save_model(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "work").mkdir()
    (tmp_path / "work/thesis.tex").write_text("years")
    with pytest.raises(UsageError, match="holds files but no model"):
        save_model(model, tmp_path / "work")
    assert (tmp_path / "work/thesis.tex").read_text() == "years"
    with pytest.raises(UsageError, match="is a file"):
        save_model(model, tmp_path / "work/thesis.tex")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    save_model(model, ".")
    assert_same(model, load_model(tmp_path / "empty"))


def test_a_model_can_be_saved_over_the_directory_it_came_from(tmp_path: Path) -> None:
    save_model(random_model(replace(SMALL, vocab_size=256)), tmp_path / "model", ByteTokenizer())
    model, tokenizer = load_model(tmp_path / "model"), load_model_tokenizer(tmp_path / "model")
    save_model(model, tmp_path / "model", tokenizer)
    assert_same(model, load_model(tmp_path / "model"))
    assert load_model_tokenizer(tmp_path / "model") is not None


def test_a_tensor_without_a_place_is_refused_and_not_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(replace(SMALL, heads=2, tied=True))
    model.heads[1].register_parameter("scale", torch.nn.Parameter(torch.ones(3)))
    model.trunk.register_buffer("seen", torch.zeros(2))
    with pytest.raises(UsageError, match=r"has no place for heads.1.scale, trunk.seen; name every tensor") as raised:
        save_model(model, tmp_path / "model")
    assert "\n" not in str(raised.value) and not (tmp_path / "model").exists()
    short = Transformer(replace(SMALL, heads=2))
    del short.heads[1]
    with pytest.raises(UsageError, match=r"a model directory needs heads.1.\S+, \S+, \S+ and 3 more"):
        save_model(short, tmp_path / "model")

    # A kind of heads that has its modules and no names in a directory yet.
    save_model(Transformer(replace(SMALL, heads=3, head_kind="medusa")), tmp_path / "medusa")
    monkeypatch.setattr(MedusaHeads, "tensors", lambda self, k: {})
    with pytest.raises(UsageError, match=r"medusa heads: a model directory has no place for unembedding.residuals"):
        save_model(Transformer(replace(SMALL, heads=3, head_kind="medusa")), tmp_path / "model")
    (tmp_path / "medusa" / "heads" / "heads.safetensors").unlink()
    with pytest.raises(UsageError, match=r"medusa heads: a model directory has no place for unembedding.residuals"):
        load_model(tmp_path / "medusa")


def test_a_full_disk_under_the_weights_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **more: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(huggingface, "save_file", full)
    with pytest.raises(UsageError, match=r"model: the disk is full") as raised:
        save_model(Transformer(SMALL), tmp_path / "model")
    assert raised.value.status == 1 and not list(tmp_path.iterdir())
