"""Medusa's and MiMo's layouts against statements of our own: what vLLM, TGI and SGLang compute, by their names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from headstart.data.tokenizers import ByteTokenizer
from headstart.errors import UsageError
from headstart.formats.hf_code_export import written_code
from headstart.formats.medusa import Medusa, load_medusa, save_medusa
from headstart.formats.mimo import Mimo, drafts_as_engines_compute, load_mimo, save_mimo
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from tests.models import random_model

TINY = ModelConfig(vocab_size=256, dim=32, layers=4, attention_heads=4, kv_heads=2, context=64, heads=3)
MEDUSA = replace(TINY, head_kind="medusa")
MIMO = replace(TINY, head_kind="sequential", wiring="causal", heads=2)
IDS = torch.randint(0, 256, (2, 10), generator=torch.Generator().manual_seed(1))


def lively(config: ModelConfig) -> Transformer:
    """Return a model of random weights that MiMo's layout can hold: it has no bias behind a head's output."""
    model = random_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if config.head_kind == "sequential" and name.endswith("out.bias"):
                parameter.zero_()
    return model


def assert_close(mine: Tensor, theirs: Tensor) -> None:
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize(
    "change",
    [{}, {"shared": False}, {"tied": True, "heads": 2}, {"shared": False, "family": "qwen3", "qk_norm": "head"}],
)
@torch.no_grad()
def test_medusa(change: dict[str, object], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (headstart[hf])")
    model = lively(replace(MEDUSA, **change))
    n, shared = model.config.heads, model.config.shared
    save_medusa(model, tmp_path, ByteTokenizer())
    assert Medusa().detect(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    x, expected = base.model(IDS).last_hidden_state, model(IDS, heads=n)
    assert_close(base(IDS).logits, expected[:, :, 0])

    config = json.loads((tmp_path / "vllm/config.json").read_text())
    assert config["num_heads"] == n - 1 and config["medusa_fc_bias"] and config["original_lm_head"] == shared
    vllm = load_file(tmp_path / "vllm/model.safetensors")
    tgi = load_file(tmp_path / "tgi/medusa_lm_head.safetensors")
    assert "architectures" not in json.loads((tmp_path / "tgi/config.json").read_text())
    for i in range(n - 1):
        y = x + F.silu(F.linear(x, vllm.pop(f"blocks.{i}.layers.0.weight"), vllm.pop(f"blocks.{i}.layers.0.bias")))
        head = vllm["lm_heads.0.weight"] if shared else vllm.pop(f"lm_heads.{i}.weight")
        assert_close(F.linear(y, head), expected[:, :, i + 1])
        y = x + F.silu(F.linear(x, tgi.pop(f"{i}.0.linear.weight"), tgi.pop(f"{i}.0.linear.bias")))
        head = base.lm_head.weight if shared else tgi.pop(f"{i}.1.weight")
        assert_close(F.linear(y, head), expected[:, :, i + 1])
    assert not tgi and vllm.keys() <= {"lm_heads.0.weight"}
    for place in ("vllm", "tgi"):
        again = load_medusa(tmp_path, heads_of=place)
        assert again.config == model.config
        assert torch.equal(again(IDS, heads=n), expected)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_medusa_with_a_draft_vocabulary(tied: bool, tmp_path: Path) -> None:
    model = lively(replace(MEDUSA, draft_vocab=9, tied=tied))
    d2t = torch.tensor([0, 3, 7, 32, 97, 101, 116, 200, 255])
    model.unembedding.d2t.copy_(d2t)
    left = save_medusa(model, tmp_path, ByteTokenizer())
    assert any("draft vocabulary: not in tgi/" in line for line in left)
    assert json.loads((tmp_path / "vllm/config.json").read_text())["truncated_vocab_size"] == 9
    vllm = load_file(tmp_path / "vllm/model.safetensors")
    assert torch.equal(vllm["token_map"], d2t) and vllm["lm_heads.0.weight"].shape == (9, 32)
    # vLLM: -inf for all tokens, then the logits of the rows of lm_heads.0 where token_map says.
    expected = model(IDS, heads=3)
    rotary = model.rotary(torch.arange(IDS.shape[1]), torch.float32)
    x = model.unembedding.norm(model.trunk(IDS, rotary, length=IDS.shape[1])[0])
    for i in range(2):
        y = x + F.silu(F.linear(x, vllm[f"blocks.{i}.layers.0.weight"], vllm[f"blocks.{i}.layers.0.bias"]))
        logits = torch.full((*IDS.shape, 256), float("-inf"))
        logits[..., vllm["token_map"]] = F.linear(y, vllm["lm_heads.0.weight"])
        assert torch.equal(logits.isfinite(), expected[:, :, i + 1].isfinite())
        assert_close(logits[..., d2t], expected[:, :, i + 1][..., d2t])
    for place in ("vllm", "tgi"):
        again = load_medusa(tmp_path, heads_of=place)
        assert again.config == model.config and torch.equal(again(IDS, heads=3), expected)
    with pytest.raises(UsageError, match="only with the model's unembedding"):
        save_medusa(lively(replace(MEDUSA, draft_vocab=9, shared=False)), tmp_path / "own")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "token_map"}, "lacks token_map"),
        (lambda t: t | {"token_map": t["token_map"][:-1]}, "does not list 9 token ids"),
        (lambda t: t | {"token_map": t["token_map"] + 1}, "holds token 256"),
        (lambda t: t | {"token_map": t["token_map"].flip(0)}, "do not ascend"),
        (
            lambda t: t | {"lm_heads.0.weight": t["lm_heads.0.weight"].flip(0)},
            "unembedding of its heads, is not that of",
        ),
    ],
)
def test_a_draft_vocabulary_that_does_not_fit_is_refused(change, message: str, tmp_path: Path) -> None:
    model = lively(replace(MEDUSA, draft_vocab=9))
    model.unembedding.d2t.copy_(torch.tensor([0, 3, 7, 32, 97, 101, 116, 200, 255]))
    save_medusa(model, tmp_path)
    file = tmp_path / "vllm/model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(UsageError, match=message):
        load_medusa(tmp_path)
    settings = json.loads((tmp_path / "vllm/config.json").read_text())
    (tmp_path / "vllm/config.json").write_text(json.dumps(settings | {"truncated_vocab_size": 257}))
    with pytest.raises(UsageError, match="truncated_vocab_size must be"):
        load_medusa(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"shared": False, "heads": 4, "attention_bias": True},
        {"tied": True, "qkv_bias": True},
        {"norm_output": True, "heads": 4},
    ],
)
@torch.no_grad()
def test_mimo(change: dict[str, object], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (headstart[hf])")
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

    model = lively(replace(MIMO, **change))
    left = save_mimo(model, tmp_path, ByteTokenizer())
    assert Mimo().detect(tmp_path) and any("heads 3..4" in line for line in left) == ("shared" in change)
    settings = json.loads((tmp_path / "config.json").read_text())
    wanted = {key: value for key, value in settings.items() if key not in ("auto_map", "model_type", "architectures")}
    config = transformers.Qwen2Config(**wanted, attn_implementation="eager")
    tensors = load_file(tmp_path / "model.safetensors")
    module = {name[len("model.mtp_layers.0.") :]: tensors.pop(name) for name in list(tensors) if ".mtp_layers." in name}
    trunk = transformers.Qwen2ForCausalLM(config)
    trunk.load_state_dict(tensors)
    expected = model(IDS, heads=2)
    assert_close(trunk(IDS).logits, expected[:, :, 0])

    code = written_code(tmp_path, "modeling_mimo.py")
    named, info = code.MiMoForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and named.config.num_nextn_predict_layers == 1, info
    assert_close(named(IDS).logits, expected[:, :, 0])

    # The module, for the token after next: the hidden state before the final norm, and the next token's embedding.
    kept: list[Tensor] = []
    trunk.model.norm.register_forward_hook(lambda norm, inputs, output: kept.append(inputs[0]))
    trunk(IDS)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], module[f"{name}.weight"], config.rms_norm_eps)

    block = Qwen2DecoderLayer(config, 0)
    block.load_state_dict(
        {name: t for name, t in module.items() if name.startswith(("self_attn", "mlp", "input_l", "post"))}
    )
    hidden, next_tokens = kept[0][:, :-1], trunk.model.embed_tokens(IDS[:, 1:])
    T = hidden.shape[1]
    rotary = trunk.model.rotary_emb(hidden, torch.arange(T)[None])
    mask = torch.full((T, T), float("-inf")).triu(1)[None, None]
    for zeroed, theirs in ((False, expected[:, :-1, 1]), (True, drafts_as_engines_compute(model, IDS))):
        embedded = next_tokens.clone()
        if zeroed:
            embedded[:, 0] = 0
        joined = torch.cat([norm(hidden, "hidden_layernorm"), norm(embedded, "token_layernorm")], -1)
        y = block(joined @ module["input_proj.weight"].T, attention_mask=mask, position_embeddings=rotary)
        y = y[0] if isinstance(y, tuple) else y
        assert_close(trunk.lm_head(norm(y, "final_layernorm")), theirs)
        if not zeroed and model.config.norm_output:
            # vLLM runs the module again: on its normed output, at the next position, over the keys of the first run.
            assert torch.equal(module["final_layernorm.weight"], model.heads[1].norm.weight)
            output, rows = norm(norm(y, "final_layernorm")[:, 4:5], "hidden_layernorm"), joined[:, :5]
            embedded = norm(trunk.model.embed_tokens(IDS[:, 6:7]), "token_layernorm")
            rows = torch.cat([rows, torch.cat([output, embedded], -1)], 1) @ module["input_proj.weight"].T
            tables = tuple(table[:, :6] for table in rotary)
            y = block(rows, attention_mask=mask[..., :6, :6], position_embeddings=tables)
            y = (y[0] if isinstance(y, tuple) else y)[:, -1:]
            assert_close(trunk.lm_head(norm(y, "final_layernorm")), model(IDS, heads=3)[:, 4:5, 2])
    again = load_mimo(tmp_path)
    assert again.config.heads == 2 and torch.equal(again(IDS, heads=2).nan_to_num(), expected.nan_to_num())


def test_mimo_leaves_a_draft_vocabulary_out(tmp_path: Path) -> None:
    model = lively(replace(MIMO, draft_vocab=9))
    model.unembedding.d2t.copy_(torch.tensor([0, 3, 7, 32, 97, 101, 116, 200, 255]))
    (tmp_path / "mimo").mkdir()
    left = save_mimo(model, tmp_path / "mimo")
    assert any(line.startswith("draft vocabulary of 9 tokens: left out") for line in left)
    again = load_mimo(tmp_path / "mimo")
    assert again.config.draft_vocab is None and again.config.heads == 2
    with torch.no_grad():
        mine, theirs = model(IDS, heads=2)[:, :-1, 1], again(IDS, heads=2)[:, :-1, 1]
    assert_close(mine[mine.isfinite()], theirs[mine.isfinite()])
    assert theirs.isfinite().all()
    checks = Mimo().check(model, tmp_path / "mimo", None)
    assert checks[0].passed and "proposes the same token at" in checks[1].found
    with torch.no_grad():
        model.heads[1].join.weight.mul_(2)
    with pytest.raises(UsageError, match="logits differ"):
        Mimo().check(model, tmp_path / "mimo", None)


def test_what_the_layouts_cannot_express_is_refused(tmp_path: Path) -> None:
    for config in (TINY, replace(MEDUSA, heads=1), MIMO):
        with pytest.raises(UsageError, match="medusa heads alone"):
            save_medusa(Transformer(config), tmp_path)
    for config in (TINY, MEDUSA, replace(MIMO, heads=1)):
        with pytest.raises(UsageError, match="sequential heads alone"):
            save_mimo(Transformer(config), tmp_path)
    with pytest.raises(UsageError, match="head_dim 16"):
        save_mimo(Transformer(replace(MIMO, head_dim=16)), tmp_path)
    model = lively(replace(MIMO, attention_bias=True))
    torch.nn.init.ones_(model.trunk.blocks[1].attention.out.bias)
    with pytest.raises(UsageError, match="biases on the output"):
        save_mimo(model, tmp_path)
    assert not any(tmp_path.iterdir())


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    (tmp_path / "medusa").mkdir()
    save_medusa(lively(MEDUSA), tmp_path / "medusa")
    file = tmp_path / "medusa/vllm/model.safetensors"
    tensors = load_file(file)
    save_file({name: t for name, t in tensors.items() if name != "blocks.1.layers.0.bias"}, file)
    with pytest.raises(UsageError, match=r"lacks blocks\.1"):
        load_medusa(tmp_path / "medusa")
    save_file(tensors | {"lm_heads.0.weight": tensors["lm_heads.0.weight"] + 1}, file)
    with pytest.raises(UsageError, match="of its heads, is not that of"):
        load_medusa(tmp_path / "medusa")
