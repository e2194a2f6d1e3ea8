"""Sizes from a file are bounded before anything is made of them, weights are finite, and files are regular."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headstart.errors import UsageError
from headstart.formats.huggingface import save_model
from headstart.formats.meta import MetaRelease, load_meta_release, save_meta_release
from headstart.formats.registry import load_config, load_model
from headstart.formats.tensor_names import HEADS_FILE
from headstart.model.config import ModelConfig
from headstart.model.shape import RopeScaling
from headstart.model.transformer import Transformer

SIZES = ModelConfig(vocab_size=16, dim=8, layers=3, attention_heads=2, context=16, heads=2)
HUGE = {
    "layers": 10**9,
    "heads": 10**9,
    "context": 10**12,
    "vocab_size": 10**15,
    "dim": 10**15,
    "attention_heads": 10**15,
    "kv_heads": 10**15,
    "head_dim": 10**12,
    "hidden_dim": 10**18,
    "window": 10**12,
    "norm_eps": 10**400,
    "rope_theta": float("inf"),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_model(Transformer(SIZES), tmp_path / "model")
    return tmp_path / "model"


def edit(file: Path, change: dict[str, Any]) -> None:
    content = json.loads(file.read_text())
    target = content["headstart"]["model"] if "headstart" in content else content
    target.update(change)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("name", HUGE)
def test_a_size_that_no_model_has_is_refused_by_name(model: Path, name: str) -> None:
    with pytest.raises(UsageError, match=rf"^model\.{name} is .*at most"):
        replace(SIZES, **{name: HUGE[name]})
    edit(model / "config.json", {name: HUGE[name]})
    with pytest.raises(UsageError, match=rf"config\.json: .*{name} is .*at most"):
        load_config(model)


@pytest.mark.parametrize("theta", [0, -1, 1e-300, 0.5, float("nan")])
def test_a_base_below_1_is_refused_in_every_place(model: Path, theta: float) -> None:
    with pytest.raises(UsageError, match=r"rope_theta is .* at least 1"):
        replace(SIZES, rope_theta=theta)
    content = json.loads((model / "config.json").read_text())
    del content["headstart"]
    content["rope_parameters"]["rope_theta"] = 10000.0  # this one goes before the one outside
    (model / "config.json").write_text(json.dumps(content | {"rope_theta": theta}))
    with pytest.raises(UsageError, match=r"config\.json: rope_theta"):
        load_config(model)


def test_lists_and_scalings_are_bounded_too() -> None:
    with pytest.raises(UsageError, match="nope_layers has"):
        replace(SIZES, nope_layers=tuple(range(20_000)))
    with pytest.raises(UsageError, match=r"offsets is 1000000000000"):
        replace(SIZES, offsets=(1, 10**12))
    with pytest.raises(UsageError, match=r"rope_scaling\.factor is 1e\+300"):
        RopeScaling("linear", 1e300)
    with pytest.raises(UsageError, match=r"rope_scaling\.original_context is 1000000000000; it must be at most"):
        RopeScaling("yarn", 2.0, 10**12)
    for eps in (0.0, -1e-5, float("nan")):
        with pytest.raises(UsageError, match=r"model\.norm_eps is .*greater than 0"):
            replace(SIZES, norm_eps=eps)
    with pytest.raises(UsageError, match=r"rope_scaling\.factor is 0\.0; it must be greater than 0"):
        RopeScaling("linear", 0.0)


def test_format_true_is_no_format(model: Path) -> None:
    content = json.loads((model / "config.json").read_text())
    content["headstart"]["format"] = True
    (model / "config.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match='"headstart" must be'):
        load_config(model)


@pytest.mark.parametrize("change", [{"n_layers": 10**9}, {"n_future_tokens": 10**9}, {"rope_theta": 10**400}])
def test_sizes_of_metas_release_are_bounded(tmp_path: Path, change: dict[str, Any]) -> None:
    save_meta_release(Transformer(SIZES), tmp_path)
    edit(tmp_path / "params.json", change)
    with pytest.raises(UsageError, match=r"params\.json: "):
        MetaRelease().read_config(tmp_path)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(1).expand(10**6, 10**6), torch.zeros(()), torch.zeros(4, 4).to_sparse()]
)
def test_tensors_that_a_pickle_does_not_hold_in_full_are_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    save_meta_release(Transformer(SIZES), tmp_path)
    weights = torch.load(tmp_path / "consolidated.pth", weights_only=True)
    torch.save({**weights, "tok_embeddings.weight": tensor}, tmp_path / "consolidated.pth")
    with pytest.raises(UsageError, match=r"consolidated\.pth: tok_embeddings\.weight is no vector or matrix"):
        MetaRelease().read_config(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("file", ["model.safetensors", HEADS_FILE])
def test_a_weight_that_is_no_finite_number_is_refused_by_name(model: Path, file: str, value: float) -> None:
    tensors = load_file(model / file)
    name = next(name for name in tensors if name.endswith("gate_proj.weight"))
    tensors[name][1, 1] = value
    save_file(tensors, model / file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=f"{name}: holds NaN or infinite"):
        load_model(model)


def test_metas_release_with_a_weight_that_is_no_number_is_refused(tmp_path: Path) -> None:
    save_meta_release(Transformer(SIZES), tmp_path)
    weights = torch.load(tmp_path / "consolidated.pth", weights_only=True)
    weights["norm.weight"][3] = float("nan")
    torch.save(weights, tmp_path / "consolidated.pth")
    with pytest.raises(UsageError, match=r"model\.norm\.weight: holds NaN"):
        load_meta_release(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "model.safetensors.index.json"])
def test_a_pipe_among_the_files_of_a_model_is_refused_at_once(model: Path, file: str) -> None:
    (model / "model.safetensors").unlink()
    os.mkfifo(model / file)
    with pytest.raises(UsageError, match="not a regular file"):
        load_model(model)


@pytest.mark.parametrize("name", ["\ud800", "x" * 5000, "a\0b"])
def test_an_index_that_names_no_possible_file_is_refused(model: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UsageError, match=r"index\.json: names '"):
        load_model(model)
