from __future__ import annotations

import json

import pytest
import torch

from headstart.commands.inspect import format_inspection, head_tree, inspect
from headstart.data.tokenizers import ByteTokenizer
from headstart.errors import UsageError
from headstart.formats.huggingface import save_model
from headstart.model.config import ModelConfig
from headstart.model.presets import PRESETS
from headstart.model.transformer import Transformer


def save(path, tokenizer=None, **changes):
    model = Transformer(ModelConfig(**{"dim": 32, "layers": 5, "attention_heads": 2, "heads": 3, **changes}))
    save_model(model, path, tokenizer, dtype=torch.bfloat16)
    return model


def test_a_model_directory(tmp_path):
    model = save(tmp_path / "model", ByteTokenizer(), wiring="causal")
    (tmp_path / "model" / "acceptance.json").write_text(json.dumps({"tokens_per_pass": 2.5, "heads": {"2": [0.75]}}))
    found = inspect(tmp_path / "model")
    assert found["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert found["bytes"] == sum(f.stat().st_size for f in (tmp_path / "model").rglob("*") if f.is_file())
    assert found["files"]["heads/heads.safetensors"] > 0
    assert (found["dtype"], found["heads"], found["wiring"], found["context"]) == ("bfloat16", 3, "causal", 512)
    assert found["tokenizer"] == {"name": "bytes", "vocab_size": 256, "end_id": 255}
    assert found["acceptance"]["tokens_per_pass"] == 2.5
    text = format_inspection(found)
    assert found["kv_bytes_per_token"] == {"bfloat16": 2 * 5 * 32 * 2, "float32": 2 * 5 * 32 * 4}
    for part in (
        "causal",
        "bfloat16",
        f"{found['parameters']['total']:,}",
        "2.500",
        "0.750",
        "head 3: token t+3",
        "1.2 KiB a token",
    ):
        assert part in text
    json.dumps(found)


def test_without_tokenizer_and_acceptance(tmp_path):
    save(tmp_path / "model", head_kind="linear", wiring="anticausal")
    found = inspect(tmp_path / "model")
    assert found["tokenizer"] is None and "acceptance" not in found and not found["plain_decoder"]
    assert "only headstart reads" in format_inspection(found)


def test_the_tree_of_heads():
    tree = head_tree(ModelConfig(layers=4, heads=2))
    assert tree == "trunk (2 blocks)\n├─ head 1: token t+1, transformer block\n└─ head 2: token t+2, transformer block"
    anticausal = head_tree(ModelConfig(layers=3, heads=2, wiring="anticausal"))
    assert anticausal.splitlines()[1:] == [
        "└─ head 2: token t+2, transformer block",
        "   └─ head 1: token t+1, transformer block",
    ]
    linear = head_tree(ModelConfig(layers=2, heads=2, head_kind="linear"))
    assert linear.splitlines()[1:] == [
        "├─ head 1: token t+1, its parent's latent as it is",
        "└─ head 2: token t+2, linear map",
    ]


@pytest.mark.parametrize(
    ("kind", "shared", "made_of"),
    [
        ("medusa", True, "residual layer behind the final norm"),
        ("medusa", False, "residual layer behind the final norm, own unembedding"),
        ("stern", True, "output of a shared feed-forward layer behind the final norm"),
        ("sequential", True, "block, shared, that also reads token t+1"),
        ("sequential", False, "block that also reads token t+1"),
        (
            *("eagle3", True),
            "block that reads input of layer 0, input of layer 1, the trunk's output and token t+1; own output matrix",
        ),
    ],
)
def test_the_trees_of_heads_beside_a_plain_one(kind, shared, made_of):
    wiring = "causal" if kind in ("sequential", "eagle3") else "parallel"
    tree = head_tree(ModelConfig(layers=2, heads=2, head_kind=kind, wiring=wiring, shared=shared)).splitlines()
    assert tree[1].endswith("─ head 1: token t+1, its parent's latent as it is")
    assert tree[2].endswith(f"└─ head 2: token t+2, {made_of}")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_equal_totals(name):
    found = inspect(name)
    totals = {counts["total"] for counts in found["parameters_by_heads"].values()}
    assert found["totals_equal"] and len(totals) == 1 and len(found["parameters_by_heads"]) >= 2
    assert f"{totals.pop():,}" in format_inspection(found)


def test_neither_directory_nor_size():
    with pytest.raises(UsageError, match=r"6\.7B") as error:
        inspect("nowhere")
    assert "\n" not in str(error.value)
