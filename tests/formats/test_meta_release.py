"""Meta's format against a statement of it of our own: a forward pass with complex rotary positions, by Meta's names."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import headstart
from headstart.commands.inspect import format_inspection, inspect
from headstart.errors import UsageError
from headstart.formats.meta import is_meta_release, load_meta_release, save_meta_release
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from tests.models import random_model

TINY = ModelConfig(vocab_size=53, dim=32, layers=5, attention_heads=4, kv_heads=2, heads=3, rope_theta=500.0)
IDS = torch.randint(0, 53, (2, 12), generator=torch.Generator().manual_seed(1))


def forward(tensors: dict[str, Tensor], params: dict[str, float], ids: Tensor) -> Tensor:
    """(B, T) -> (B, T, n, V): the trunk is all of `layers` but the last, which is head 1; each head reads the trunk."""
    H, K, n = params["n_heads"], params.get("n_kv_heads", params["n_heads"]), params["n_future_tokens"]
    E = params["dim"] // H
    T = ids.shape[1]
    angles = torch.outer(torch.arange(T), params["rope_theta"] ** (-torch.arange(0, E, 2) / E))
    turns = torch.polar(torch.ones_like(angles), angles)[None, :, None]  # (1, T, 1, E/2)

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * tensors[name]

    def turn(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(-2)

    def block(x: Tensor, name: str) -> Tensor:
        y = norm(x, f"{name}.attention_norm.weight")
        q, k, v = (
            (y @ tensors[f"{name}.attention.{w}.weight"].T).unflatten(-1, (heads, E))
            for w, heads in (("wq", H), ("wk", K), ("wv", K))
        )
        q, k, v = turn(q), turn(k).repeat_interleave(H // K, 2), v.repeat_interleave(H // K, 2)
        scores = torch.einsum("bthe,bshe->bhts", q, k) / E**0.5
        weights = scores.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf")).softmax(-1)
        x = x + torch.einsum("bhts,bshe->bthe", weights, v).flatten(2) @ tensors[f"{name}.attention.wo.weight"].T
        y = norm(x, f"{name}.ffn_norm.weight")
        gate, up = (y @ tensors[f"{name}.feed_forward.{w}.weight"].T for w in ("w1", "w3"))
        return x + (F.silu(gate) * up) @ tensors[f"{name}.feed_forward.w2.weight"].T

    x = F.embedding(ids, tensors["tok_embeddings.weight"])
    for layer in range(params["n_layers"] - n):
        x = block(x, f"layers.{layer}")
    heads = [f"layers.{params['n_layers'] - n}", *(f"extra_heads.{j}" for j in range(n - 1))]
    return torch.stack([norm(block(x, head), "norm.weight") @ tensors["output.weight"].T for head in heads], 2)


def release(directory: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A checkpoint as Meta's card describes it, its tensors made up here."""
    params = dict(dim=32, n_layers=5, n_heads=4, n_kv_heads=2, vocab_size=-1, multiple_of=32, norm_eps=1e-5)
    params |= dict(n_future_tokens=3, rope_theta=500.0)
    shapes = {"tok_embeddings": (53, 32), "norm": (32,), "output": (53, 32)}
    for name in ["layers.0", "layers.1", "layers.2", "extra_heads.0", "extra_heads.1"]:
        shapes |= {f"{name}.attention.{w}": (rows, 32) for w, rows in (("wq", 32), ("wk", 16), ("wv", 16), ("wo", 32))}
        shapes |= {f"{name}.feed_forward.w1": (96, 32), f"{name}.feed_forward.w3": (96, 32)}
        shapes |= {f"{name}.feed_forward.w2": (32, 96), f"{name}.attention_norm": (32,), f"{name}.ffn_norm": (32,)}
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    directory.mkdir()
    torch.save(tensors | {"rope.freqs": torch.ones(4)}, directory / "consolidated.pth")
    (directory / "params.json").write_text(json.dumps(params))
    return tensors, params


def assert_close(mine: Tensor, theirs: Tensor) -> None:
    assert mine.shape == theirs.shape
    assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()


@torch.no_grad()
def test_a_release_is_read(tmp_path: Path) -> None:
    tensors, params = release(tmp_path / "release")
    assert is_meta_release(tmp_path / "release")
    model = load_meta_release(tmp_path / "release")
    assert (model.config.heads, model.config.trunk_layers, model.config.vocab_size) == (3, 2, 53)
    assert_close(model(IDS, heads=3), forward(tensors, params, IDS))
    assert load_meta_release(tmp_path / "release", torch.bfloat16).trunk.embedding.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_headstart_opens_a_release(tmp_path: Path) -> None:
    tensors, params = release(tmp_path / "release")
    model = headstart.load(tmp_path / "release", dtype="float32")
    assert_close(model.logits(IDS), forward(tensors, params, IDS))
    out = [model.generate([3, 4, 5], max_new_tokens=20, heads=heads).tokens for heads in (1, 3)]
    assert out[0] == out[1] and len(out[0]) == 20
    shown = inspect(tmp_path / "release")
    assert shown["dtype"] == "float32" and shown["heads"] == 3 and "head 3" in format_inspection(shown)


@torch.no_grad()
def test_shares_of_model_parallel_processes_are_joined(tmp_path: Path) -> None:
    tensors, params = release(tmp_path / "release")
    for columns_of_embedding in (True, False):
        for rank in range(2):
            shares = {}
            for name, tensor in tensors.items():
                columns = name.endswith(("wo.weight", "w2.weight")) or (name.startswith("tok") and columns_of_embedding)
                share = tensor if tensor.ndim == 1 else tensor.tensor_split(2, 1 if columns else 0)[rank]
                shares[name] = share.clone()
            torch.save(shares, tmp_path / f"release/consolidated.{rank:02}.pth")
        (tmp_path / "release/consolidated.pth").unlink(missing_ok=True)
        assert_close(load_meta_release(tmp_path / "release")(IDS, heads=3), forward(tensors, params, IDS))


WRITTEN = {
    "four heads": replace(TINY, heads=4, extra_layers=1, norm_eps=1e-3),
    "one head, tied": replace(TINY, heads=1, tied=True, kv_heads=None),
    "narrow": replace(TINY, hidden_dim=40),
    "wide": replace(TINY, hidden_dim=103),
}


@pytest.mark.parametrize("name", WRITTEN)
@torch.no_grad()
def test_what_is_written_is_the_model(name: str, tmp_path: Path) -> None:
    model = random_model(WRITTEN[name])
    save_meta_release(model, tmp_path)
    params = json.loads((tmp_path / "params.json").read_text())
    tensors = torch.load(tmp_path / "consolidated.pth", weights_only=True)
    assert_close(forward(tensors, params, IDS), model(IDS, heads=model.config.heads))
    # Meta's code computes the hidden width.
    hidden = int(params.get("ffn_dim_multiplier", 1) * int(2 * 4 * params["dim"] / 3))
    hidden = params["multiple_of"] * -(-hidden // params["multiple_of"])
    assert hidden == model.config.hidden
    again = load_meta_release(tmp_path)
    assert torch.equal(again(IDS, heads=model.config.heads), model(IDS, heads=model.config.heads))
    sizes = sum(tensor.numel() for tensor in {t.data_ptr(): t for t in tensors.values()}.values())
    assert (tmp_path / "consolidated.pth").stat().st_size < 4 * sizes + 50_000  # each tensor once


def test_what_the_format_cannot_express_is_refused(tmp_path: Path) -> None:
    for change in (
        {"wiring": "causal"},
        {"head_kind": "linear"},
        {"head_kind": "medusa"},
        {"attention_bias": True},
        {"head_dim": 16},
        {"layers": 1, "heads": 1, "head_kind": "linear"},
    ):
        with pytest.raises(UsageError, match="cannot express"):
            save_meta_release(Transformer(replace(TINY, **change)), tmp_path)
    assert not any(tmp_path.iterdir())


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("harm",)


def test_damaged_and_foreign_files_get_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tensors, params = release(tmp_path / "release")
    file, settings = tmp_path / "release/consolidated.pth", tmp_path / "release/params.json"

    def refused(words: str) -> None:
        with pytest.raises(UsageError, match=words) as caught:
            load_meta_release(tmp_path / "release")
        assert "\n" not in str(caught.value) and "release" in str(caught.value)

    torch.save({**tensors, "x": Harmful()}, file)
    refused("more than tensors")
    assert not (tmp_path / "harm").exists()
    torch.save({name: t for name, t in tensors.items() if "extra_heads.1" not in name}, file)
    refused("lacks extra_heads.1")
    torch.save({**tensors, "extra_heads.2.ffn_norm.weight": torch.ones(32)}, file)
    refused("holds extra_heads.2")
    torch.save({**tensors, "layers.0.ffn_norm.weight": torch.ones(31)}, file)
    refused(r"shape \[31\]")
    file.write_bytes(file.read_bytes()[:1000])
    refused("damaged")
    torch.save(tensors, file)
    settings.write_text(json.dumps({**params, "n_layers": 2}))
    refused("no layer")
    settings.write_text(json.dumps({**params, "dim": "32"}))
    refused("dim")
