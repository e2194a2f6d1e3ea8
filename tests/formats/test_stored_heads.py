"""Heads without their base: attached again they are the model that they came from, and no other model takes them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import headstart
from headstart.cli import main
from headstart.commands.convert import convert
from headstart.data.tokenizers import ByteTokenizer
from headstart.errors import UsageError
from headstart.formats.heads import HEADS_CONFIG, IDENTITY_FILE, StoredHeads, next_token_model, save_heads
from headstart.formats.hub import name_of
from headstart.formats.huggingface import save_model
from headstart.formats.identity import Identity, digest_of
from headstart.formats.registry import load_config, load_model
from headstart.formats.tensor_names import HEADS_FILE, MODEL_FILE
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from tests.cases import each_value, pairwise
from tests.models import WIRINGS as EVERY_WIRING
from tests.models import random_model, with_heads_of

LLAMA = ModelConfig(vocab_size=256, dim=32, layers=5, attention_heads=4, hidden_dim=64, context=64)
BASES = {
    "llama": LLAMA,
    "tied": replace(LLAMA, kv_heads=2, tied=True, attention_bias=True, head_dim=16, rope_theta=500.0),
    "gemma": replace(
        LLAMA, family="gemma3_text", tied=True, qk_norm="head", norm_placement="both", norm_offset=True,
        activation="gelu_tanh", scaled_embedding=True, window=8, window_layers=(0, 2), local_rope_theta=1e4,
    ),
}  # fmt: skip
WIRINGS = [pair for pair in EVERY_WIRING if pair != ("linear", "anticausal")]  # whose head 1 is no plain decoder
TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))


def write(model: Transformer, folder: Path) -> tuple[Path, Path, Path]:
    """Write a model, its trunk with head 1, and its heads; return the three directories."""
    full, base, heads = folder / "full", folder / "base", folder / "heads"
    save_model(model, full, ByteTokenizer())
    save_model(next_token_model(model), base, ByteTokenizer())
    save_heads(model, heads, "owner/base")
    return full, base, heads


@pytest.fixture
def medusa(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A model of medusa heads, its base and its heads."""
    return write(random_model(with_heads_of(LLAMA, "medusa", heads=3)), tmp_path)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pairwise({"kind,wiring": WIRINGS, "base": BASES, "heads": [2, 4], "dtype": DTYPES})
@torch.no_grad()
def test_heads_on_their_base_are_the_model_again(
    kind: str, wiring: str, base: ModelConfig, heads: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = random_model(with_heads_of(base, kind, wiring, heads=heads), dtype=dtype, scale=0.1)
    save_model(next_token_model(model), tmp_path / "base")
    save_heads(model, tmp_path / "heads")
    again = load_model(tmp_path / "base", heads=tmp_path / "heads")
    assert again.config == model.config
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in mine)
    saved, found = model(TOKENS, heads=heads), again(TOKENS, heads=heads)
    assert torch.allclose(saved, found, rtol=0, atol=0, equal_nan=True)


def with_draft_vocabulary(base: ModelConfig, kind: str, wiring: str = "parallel") -> Transformer:
    """A model whose heads draft from 9 of the 256 tokens."""
    model = random_model(with_heads_of(base, kind, wiring, heads=3, draft_vocab=9), scale=0.1)
    model.unembedding.d2t.copy_(torch.tensor([0, 3, 7, 32, 97, 101, 116, 200, 255]))
    return model


@each_value({"kind,wiring": WIRINGS, "base": BASES})
@torch.no_grad()
def test_a_draft_vocabulary_travels_with_the_heads(kind: str, wiring: str, base: ModelConfig, tmp_path: Path) -> None:
    model = with_draft_vocabulary(base, kind, wiring)
    full, plain, heads = write(model, tmp_path)
    stored = load_file(heads / HEADS_FILE)
    assert (
        stored["d2t"].dtype == torch.int64
        and json.loads((heads / HEADS_CONFIG).read_text())["model"]["draft_vocab"] == 9
    )
    own = model.config.kind.own_unembeddings
    assert all(256 not in tensor.shape[:1] for tensor in stored.values())
    assert not own or stored["heads.2.lm_head.weight"].shape == (9, 32)
    for again in (load_model(full), load_model(plain, heads=heads)):
        assert again.config == model.config and again.unembedding.d2t.dtype == torch.int64
        mine, theirs = model.state_dict(), again.state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(load_model(plain, dtype, heads=heads).unembedding.d2t, model.unembedding.d2t)
    found = convert(full, tmp_path / "split", "heads")
    assert found["checks"][0]["differences"] == [0, 0, 0]
    convert(plain, tmp_path / "merged", heads=tmp_path / "split")
    for file in (MODEL_FILE, HEADS_FILE, "config.json"):
        assert (tmp_path / "merged" / file).read_bytes() == (full / file).read_bytes(), file


@pytest.mark.parametrize(
    ("kind", "form", "place"),
    [
        ("transformer", "meta", "cannot express draft_vocab"),
    ],
)
def test_formats_without_draft_vocabularies_refuse_them(
    kind: str, form: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wiring = "causal" if kind == "sequential" else "parallel"
    save_model(with_draft_vocabulary(LLAMA, kind, wiring), tmp_path / "full", ByteTokenizer())
    status = run("convert", str(tmp_path / "full"), str(tmp_path / "out"), "--to", form)
    said = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(said) == 1 and place in said[0], said
    assert not (tmp_path / "out").exists()


@each_value({"kind,wiring": WIRINGS, "base": BASES, "dtype": DTYPES})
def test_the_command_takes_a_model_apart_and_puts_it_together(
    kind: str, wiring: str, base: ModelConfig, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = random_model(with_heads_of(base, kind, wiring, heads=3), dtype=dtype, scale=0.1)
    full, alone, _ = write(model, tmp_path)
    found = convert(full, tmp_path / "split", "heads")
    assert found["checks"][0]["differences"] == [0, 0, 0]
    names = {str(file.relative_to(tmp_path / "split")) for file in (tmp_path / "split").rglob("*.*")}
    assert names == {HEADS_CONFIG, HEADS_FILE, IDENTITY_FILE}
    convert(alone, tmp_path / "merged", heads=tmp_path / "split")
    for file in full.rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "merged" / file.relative_to(full)).read_bytes(), file


@pytest.mark.parametrize("kind", ["transformer", "medusa", "stern", "sequential", "eagle3"])
def test_the_outputs_and_the_passes_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    wiring = "causal" if kind in ("sequential", "eagle3") else "parallel"
    model = random_model(with_heads_of(LLAMA, kind, wiring, heads=3))
    full, base, heads = write(model, tmp_path)
    whole, attached, plain = headstart.load(full), headstart.load(base, heads=heads), headstart.load(base)
    for temperature in (0.0, 0.8):
        expected = whole.generate("def f(", 24, temperature=temperature, seed=3, heads=3)
        found = attached.generate("def f(", 24, temperature=temperature, seed=3, heads=3)
        assert found.tokens == expected.tokens == plain.generate("def f(", 24, temperature=temperature, seed=3).tokens
        assert found.stats.passes == expected.stats.passes


@torch.no_grad()
def test_heads_share_the_parameters_of_the_base(medusa: tuple[Path, Path, Path]) -> None:
    base = load_model(medusa[1])
    attached = StoredHeads.read(medusa[2]).attach(base, medusa[1])
    assert attached.trunk.embedding.weight is base.trunk.embedding.weight
    wide = load_model(medusa[1], torch.float64, heads=medusa[2])
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float64}


def test_a_digest_is_of_values_and_not_of_their_dtype() -> None:
    values = torch.randn(40, 70, generator=torch.Generator().manual_seed(0))
    for narrow in (torch.bfloat16, torch.float16, torch.float32):
        held = values.to(narrow)
        assert digest_of(held) == digest_of(held.double()) == digest_of(held.double().to(narrow))
    assert digest_of(values) != digest_of(values.bfloat16()) != digest_of(values.half())
    assert digest_of(values) != digest_of(values.view(70, 40))
    changed = values.clone()
    changed[39, 69] += 1e-6
    assert digest_of(changed) != digest_of(values)


def quantized(model: Transformer, kind: str) -> Transformer:
    """Return the model with the matrices of trunk and head 1 as GGUF quantizes them; norms stay as they are."""
    gguf = pytest.importorskip("gguf", reason="quantizes; install headstart[gguf]")
    of = gguf.GGMLQuantizationType[kind]
    copy = Transformer(model.config)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in copy.parameters():
            if parameter.ndim == 2:
                packed = gguf.quants.quantize(parameter.numpy(), of)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(packed, of)))
    return copy


def nudged(model: Transformer, share: float, norms: bool = False) -> Transformer:
    """Return the model with normal noise of a share of their spread on the matrices, or on the norms alone."""
    copy, generator = Transformer(model.config), torch.Generator().manual_seed(5)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in copy.parameters():
            if (parameter.ndim == 1) == norms:
                parameter += share * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return copy


def rounded(model: Transformer) -> Transformer:
    """Return the model in bfloat16."""
    copy = Transformer(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.to(torch.bfloat16)


COPIES: dict[str, Callable[[Transformer], Transformer]] = {
    **{kind: lambda model, kind=kind: quantized(model, kind) for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")},
    "in bfloat16": lambda model: quantized(model, "Q4_0").to(torch.bfloat16).float(),
    "fine-tuned, then Q4_0": lambda model: quantized(nudged(model, 0.01), "Q4_0"),  # nobody can tell
}
OTHERS: dict[str, Callable[[Transformer], Transformer]] = {
    "fine-tuned": lambda model: nudged(model, 0.01),
    "fine-tuned, in bfloat16": lambda model: rounded(nudged(model, 0.01)),
    "norms fine-tuned": lambda model: nudged(model, 0.01, norms=True),
    "norms fine-tuned, then Q4_0": lambda model: quantized(nudged(model, 0.01, norms=True), "Q4_0"),
    "another seed": lambda model: random_model(model.config, seed=1),
    "another seed, Q4_0": lambda model: quantized(random_model(model.config, seed=1), "Q4_0"),
    "other matrices, Q4_0": lambda model: quantized(nudged(model, 3.0), "Q4_0"),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_quantized_copy_of_the_base_is_accepted_with_a_note(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also the reverse: heads that were trained on the copy, attached to the original."""
    model = random_model(with_heads_of(LLAMA, "medusa", heads=3))
    base = next_token_model(model)
    save_model(COPIES[name](base), tmp_path / "copy")
    save_model(base, tmp_path / "base")
    save_heads(model, tmp_path / "heads")
    load_model(tmp_path / "copy", heads=tmp_path / "heads")
    assert "copy: is quantized differently from the model of " in capsys.readouterr().err
    attached = StoredHeads.read(tmp_path / "heads").attach(load_model(tmp_path / "copy"), tmp_path / "copy")
    save_heads(attached, tmp_path / "of-copy")
    capsys.readouterr()
    load_model(tmp_path / "copy", heads=tmp_path / "of-copy")
    assert capsys.readouterr().err == ""
    load_model(tmp_path / "base", heads=tmp_path / "of-copy")
    assert "base: is quantized differently" in capsys.readouterr().err


def test_a_copy_in_16_bits_is_accepted_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model(with_heads_of(LLAMA, "medusa", heads=3))
    save_heads(model, tmp_path / "heads")
    for dtype in (torch.bfloat16, torch.float16):
        save_model(next_token_model(model), tmp_path / "copy", dtype=dtype)
        load_model(tmp_path / "copy", heads=tmp_path / "heads")
        assert "copy: is rounded differently" in capsys.readouterr().err
    # In float32 again: the same values as the 16 bits, so the same as for heads trained on those.
    save_heads(model.to(torch.float16), tmp_path / "of-half")
    save_model(next_token_model(model), tmp_path / "wide", dtype=torch.float32)
    load_model(tmp_path / "wide", heads=tmp_path / "of-half")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_norms_that_were_stored_with_1_added_are_rounded(scale: float) -> None:
    """llama.cpp stores Gemma's norms so, in float32."""
    model = random_model(with_heads_of(BASES["gemma"], "medusa", heads=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= scale if parameter.ndim == 1 else 1
    identity = Identity.of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[:] = (parameter + 1) - 1 if parameter.ndim == 1 else parameter
    assert identity.changed(model) and identity.compare_samples(model) == ("rounded", [])


@pytest.mark.parametrize("name", OTHERS)
def test_other_weights_are_refused(name: str, tmp_path: Path) -> None:
    model = random_model(with_heads_of(LLAMA, "medusa", heads=3))
    save_heads(model, tmp_path / "heads", "owner/base")
    save_model(OTHERS[name](next_token_model(model)), tmp_path / "other")
    with pytest.raises(UsageError, match=r"are not for .*: \d+ of \d+ tensors have other values .*take .*owner/base$"):
        load_model(tmp_path / "other", heads=tmp_path / "heads")


def test_a_single_other_value_is_found_where_all_are_compared(medusa: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, base, heads = medusa
    tensors = load_file(base / MODEL_FILE)
    tensors["model.layers.2.mlp.up_proj.weight"][63, 31] += 1e-3
    save_file(tensors, base / MODEL_FILE, {"format": "pt"})
    load_model(base, heads=heads)  # compares samples
    with pytest.raises(UsageError, match=r"1 of \d+ tensors .*model.layers.2.mlp.up_proj.weight"):
        convert(base, tmp_path / "merged", heads=heads)
    assert not (tmp_path / "merged").exists()


def test_a_tied_matrix_may_be_stored_twice(tmp_path: Path) -> None:
    """Some GGUF files hold the embedding and the unembedding, quantized differently."""
    model = random_model(with_heads_of(BASES["tied"], "medusa", heads=3))
    save_heads(model, tmp_path / "heads")
    base = next_token_model(model)
    untied, state = Transformer(replace(base.config, tied=False)), base.state_dict()
    untied.load_state_dict({name: state[name] for name in untied.state_dict()})
    save_model(untied, tmp_path / "untied")
    assert not load_model(tmp_path / "untied", heads=tmp_path / "heads").config.tied
    with torch.no_grad():
        untied.unembedding.weights[0][:] = untied.unembedding.weights[0].flip(0)
    save_model(untied, tmp_path / "untied")
    with pytest.raises(UsageError, match=r"1 of .*lm_head\.weight"):
        load_model(tmp_path / "untied", heads=tmp_path / "heads")


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (replace(LLAMA, dim=64), "hidden_size 64, not 32"),
        (replace(LLAMA, vocab_size=320), "vocab_size 320, not 256"),
        (replace(LLAMA, layers=6), "num_hidden_layers 6, not 5"),
        (replace(LLAMA, kv_heads=2), "num_key_value_heads 2, not 4"),
        (replace(LLAMA, hidden_dim=96), "intermediate_size 96, not 64"),
        (replace(LLAMA, rope_theta=5e5), "rope_theta 500000.0, not 10000.0"),
        (replace(LLAMA, qkv_bias=True), 'model_type "qwen2", not "llama", qkv_bias true, not false'),
        (replace(LLAMA, heads=2), "has 2 heads already"),
    ],
)
def test_other_sizes_are_named_before_weights_are_read(
    other: ModelConfig, difference: str, medusa: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    save_model(Transformer(other), tmp_path / "other")
    (tmp_path / "other" / MODEL_FILE).write_bytes(b"")
    with pytest.raises(UsageError, match=difference):
        load_model(tmp_path / "other", heads=medusa[2])
    with pytest.raises(UsageError, match=difference):
        load_config(tmp_path / "other", medusa[2])


def change(heads: Path, **fields: object) -> None:
    content = json.loads((heads / HEADS_CONFIG).read_text())
    (heads / HEADS_CONFIG).write_text(json.dumps(content | fields))


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def without_a_tensor(heads: Path) -> None:
    tensors = load_file(heads / HEADS_FILE)
    del tensors["heads.3.residual.bias"]
    save_file(tensors, heads / HEADS_FILE)


def with_nan(heads: Path) -> None:
    tensors = load_file(heads / HEADS_FILE)
    tensors["heads.3.residual.bias"][0] = float("nan")
    save_file(tensors, heads / HEADS_FILE)


def with_map(heads: Path, d2t: torch.Tensor, **fields: object) -> None:
    """Turn heads into some with a draft vocabulary, which `fields` of the configuration may contradict."""
    content = json.loads((heads / HEADS_CONFIG).read_text())
    change(heads, model=content["model"] | {"draft_vocab": 3} | fields)
    save_file(load_file(heads / HEADS_FILE) | {"d2t": d2t}, heads / HEADS_FILE)


def of_other_kind(heads: Path) -> None:
    content = json.loads((heads / HEADS_CONFIG).read_text())
    change(heads, model=content["model"] | {"head_kind": "tall"})


def with_other_identity(heads: Path) -> None:
    Identity.of(random_model(LLAMA, seed=4)).save(heads / IDENTITY_FILE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "heads: no such directory"),
        (lambda heads: (heads / HEADS_CONFIG).unlink(), "holds no heads.json"),
        (lambda heads: (heads / HEADS_CONFIG).write_text("{"), "heads.json: is not JSON"),
        (lambda heads: change(heads, base=None), "heads.json: must be"),
        (lambda heads: change(heads, base={"name": 3}), "heads.json: must be"),
        (lambda heads: change(heads, format=2), "has format 2, this version reads 1; update headstart"),
        (lambda heads: change(heads, model={"draft": 1}), "no setting model.draft; update headstart"),
        (lambda heads: change(heads, model={"heads": 1}), "has one head"),
        (of_other_kind, "tall"),
        (lambda heads: shorten(heads / HEADS_FILE), "heads.safetensors: is damaged or cut short"),
        (lambda heads: (heads / HEADS_FILE).unlink(), "heads.safetensors: is missing"),
        (without_a_tensor, "lacks heads.3.residual.bias, which heads.json promises"),
        (with_nan, "heads.safetensors: heads.3.residual.bias: holds NaN"),
        (lambda heads: with_map(heads, torch.tensor([0, 2, 256])), "d2t: holds token 256, and the vocabulary has 256"),
        (lambda heads: with_map(heads, torch.tensor([-1, 2, 5])), "d2t: holds token -1"),
        (lambda heads: with_map(heads, torch.tensor([0, 5, 5])), "d2t: its token ids do not ascend"),
        (lambda heads: with_map(heads, torch.tensor([0, 5, 4])), "d2t: its token ids do not ascend"),
        (lambda heads: with_map(heads, torch.tensor([0, 5])), "d2t has shape [2], not [3]"),
        (lambda heads: with_map(heads, torch.tensor([0.0, 5.0, 6.0])), "d2t is stored as F32, and token ids are I64"),
        (
            lambda heads: with_map(heads, torch.tensor([0]), draft_vocab=257),
            "draft_vocab is 257, and the vocabulary has",
        ),
        (lambda heads: with_map(heads, torch.tensor([0]), draft_vocab=0), "draft_vocab is 0; it must be at least 1"),
        (lambda heads: shorten(heads / IDENTITY_FILE), "identity.safetensors: is damaged or cut short"),
        (lambda heads: (heads / IDENTITY_FILE).unlink(), "identity.safetensors: is missing"),
        (lambda heads: save_file({}, heads / IDENTITY_FILE), "identity.safetensors: is damaged"),
        (with_other_identity, "identity.safetensors: is not the base's"),
    ],
)
def test_damaged_heads_are_refused_in_one_line(
    damage: Callable[[Path], None], message: str, medusa: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, base, heads = medusa
    damage(heads)
    status = run("generate", str(base), "--heads-from", str(heads), "--prompt", "x")
    said = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(said) == 1 and message in said[0], said


def run(*arguments: str) -> int:
    """Return the exit status of `headstart ARGUMENTS`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["headstart", *arguments])
        try:
            main()
        except SystemExit as done:
            return done.code if isinstance(done.code, int) else 1
    return 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", "HEADS", "--prompt", "x"],
            r"without their model; name the model \(owner/base\) and give --heads-from",
        ),
        (["inspect", "HEADS"], "without their model"),
        (["serve", "HEADS"], "without their model"),
        (["adapt", "HEADS", "--data", "BASE", "--run-dir", "OUT"], "without their model"),
        (["generate", "BASE", "--heads-from", "FULL", "--prompt", "x"], "is a model, not heads alone"),
        (["generate", "FULL", "--heads-from", "HEADS", "--prompt", "x"], "has 3 heads already"),
        (["inspect", "FULL", "--heads-from", "HEADS"], "has 3 heads already"),
        (["generate", "--heads-from", "HEADS", "--prompt", "x"], "has 8 heads already"),
        (["doctor", "--heads-from", "HEADS"], "name it"),
        (["convert", "BASE", "OUT", "--to", "heads"], "has one head"),
        (["convert", "HEADS", "OUT"], "without their model"),
        (["convert", "FULL", "BASE", "--to", "heads"], "holds something else"),
        (["push", "BASE", "--to", "HEADS"], "holds something else"),
    ],
)
def test_wrong_use(
    arguments: list[str],
    message: str,
    medusa: tuple[Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = dict(zip(("FULL", "BASE", "HEADS"), map(str, medusa))) | {"OUT": str(tmp_path / "out")}
    assert run(*[places.get(argument, argument) for argument in arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert [line for line in said if line.startswith("headstart: ")] == said[-1:]
    assert re.search(message, said[-1]), said


def test_a_model_that_needs_its_heads_keeps_them(tmp_path: Path) -> None:
    save_model(Transformer(replace(LLAMA, heads=3, head_kind="linear", wiring="anticausal")), tmp_path / "model")
    with pytest.raises(UsageError, match="no plain decoder"):
        convert(tmp_path / "model", tmp_path / "heads", "heads")
    with pytest.raises(UsageError, match="no plain decoder"):
        save_model(Transformer(replace(LLAMA, head_kind="linear", wiring="anticausal")), tmp_path / "one")
        save_heads(random_model(with_heads_of(LLAMA, "medusa", heads=2)), tmp_path / "heads")
        load_model(tmp_path / "one", heads=tmp_path / "heads")


def test_saving_replaces_heads_and_nothing_else(medusa: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model = random_model(with_heads_of(LLAMA, "medusa", heads=2))
    save_heads(model, medusa[2])
    assert StoredHeads.read(medusa[2]).model.heads == 2
    for place, why in ((medusa[1], "holds files but no heads"), (medusa[1] / "config.json", "is a file")):
        with pytest.raises(UsageError, match=why):
            save_heads(model, place)
    assert load_config(medusa[1]).heads == 1


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("hub/models--owner--a-model/snapshots/0f3", "owner/a-model"),
        ("runs/plain/model", "plain"),
        ("models/llama", "llama"),
        ("files/llama.Q4_1.gguf", "llama.Q4_1.gguf"),
    ],
)
def test_the_name_of_a_base_shows_nothing_of_this_machine(path: str, name: str, tmp_path: Path) -> None:
    assert name_of(tmp_path / path) == name


def test_heads_on_a_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="reads GGUF files; install headstart[gguf]")
    full, _, heads = write(random_model(with_heads_of(LLAMA, "transformer", heads=3)), tmp_path)
    convert(full, tmp_path / "model.gguf", "gguf")
    model = headstart.load(tmp_path / "model.gguf", heads=heads)
    expected = headstart.load(full).generate(list(b"def f("), 16, heads=3)
    found = model.generate(list(b"def f("), 16, heads=3)
    assert found.tokens == expected.tokens and found.stats.passes == expected.stats.passes
    convert(tmp_path / "model.gguf", tmp_path / "merged", heads=heads, tokenizer="bytes")
    for file in (MODEL_FILE, HEADS_FILE, "config.json"):
        assert (tmp_path / "merged" / file).read_bytes() == (full / file).read_bytes(), file


def test_heads_with_a_draft_vocabulary_on_a_gguf_file(tmp_path: Path) -> None:
    """The file is written without the heads, and read with them."""
    pytest.importorskip("gguf", reason="reads GGUF files; install headstart[gguf]")
    full, _, heads = write(with_draft_vocabulary(LLAMA, "medusa"), tmp_path)
    convert(full, tmp_path / "model.gguf", "gguf")
    model = headstart.load(tmp_path / "model.gguf", heads=heads)
    expected = headstart.load(full).generate(list(b"def f("), 16, heads=3)
    found = model.generate(list(b"def f("), 16, heads=3)
    assert found.tokens == expected.tokens and found.stats.passes == expected.stats.passes
