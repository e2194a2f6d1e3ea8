"""Loading: from the hub too, into memory once, converted on the way."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from live_tensors import LiveTensors
from safetensors.torch import load_file

import headstart
from headstart.commands.inspect import inspect
from headstart.data.tokenizers import ByteTokenizer
from headstart.decoding.kernels import pack
from headstart.decoding.kernels.torch_backend import PlainLinear, TorchBackend
from headstart.errors import UsageError
from headstart.formats import hub, safetensors_files
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

CONFIG = ModelConfig(vocab_size=256, dim=64, layers=8, attention_heads=4, heads=2, context=64)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_model(Transformer(CONFIG), tmp_path / "model", ByteTokenizer())
    return tmp_path / "model"


def test_a_name_of_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, list[str]]] = []

    def snapshot(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(saved)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    hub.fetch.cache_clear()
    model = headstart.load("someone/model")
    assert len(model.generate("def f", max_new_tokens=3).tokens) <= 3
    assert inspect("someone/model")["heads"] == 2
    assert load_model("someone/model").config == CONFIG
    (name, patterns), *again = asked
    assert name == "someone/model" and not again  # asked once
    assert "config.json" in patterns and not [x for x in patterns if x.endswith((".bin", ".py", ".pt"))]
    # What lies here goes first.
    (tmp_path / "someone").mkdir()
    saved.rename(tmp_path / "someone/model")
    hub.fetch.cache_clear()
    assert load_model("someone/model").config == CONFIG and len(asked) == 1

    def offline(repository: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UsageError) as caught:
        headstart.load("someone/else")
    assert "\n" not in str(caught.value)
    for word in ("someone/else", "no such directory", "no network", "config.json"):
        assert word in str(caught.value)
    hub.fetch.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_in_memory_once(saved: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_files, "PIECE_BYTES", 2**14)
    # oneDNN's own tensors cannot be counted; copies can.
    monkeypatch.setattr(TorchBackend, "linear", lambda self, weight, bias: PlainLinear(weight.clone(), bias))
    with LiveTensors() as live:
        model = load_model(saved, dtype=dtype)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        assert size <= live.now and live.peak <= 1.2 * size
        live.peak = live.now
        pack.pack(model, compiled=False)
        assert live.peak <= 1.4 * size  # a block's maps twice, of eight


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_conversion_piece_by_piece(saved: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_files, "PIECE_BYTES", 400)
    whole = load_file(saved / "model.safetensors")
    model = load_model(saved, dtype=dtype)
    assert torch.equal(model.trunk.embedding.weight, whole["model.embed_tokens.weight"].to(dtype))
    k = whole["model.layers.3.self_attn.k_proj.weight"].to(dtype)
    assert torch.equal(model.trunk.blocks[3].attention.qkv.weight[64:128], k)


def test_a_file_that_shrinks_while_it_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = safetensors_files.TensorFiles([saved / "model.safetensors"])
    name = "model.norm.weight"
    monkeypatch.setattr(Path, "open", lambda *_, **__: io.BytesIO(b""))
    with pytest.raises(UsageError, match=r"cut short"):
        tensors.read_into(name, torch.empty(64))


def test_text_for_a_model_without_tokenizer(saved: Path) -> None:
    for file in saved.glob("tokenizer*"):
        file.unlink()
    model: Any = headstart.load(saved)
    assert len(model.generate([1, 2, 3], max_new_tokens=2).tokens) == 2
    with pytest.raises(UsageError, match=r"this model has no tokenizer; give prompts as lists of token ids"):
        model.generate("text")


def test_a_directory_or_repository_of_gguf_files_stands_for_the_only_one(
    saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "README.md").touch()
    assert hub.local_path(folder) == folder
    (folder / "m-Q4_0.gguf").touch()
    assert hub.local_path(folder) == folder / "m-Q4_0.gguf"
    for number in (1, 2):
        (folder / f"m-Q8_0-0000{number}-of-00002.gguf").touch()
    wrong = r"files: holds 2 GGUF files, m-Q4_0.gguf, m-Q8_0-00001-of-00002.gguf; name one, as .*files/NAME$"
    with pytest.raises(UsageError, match=wrong):
        hub.local_path(folder)
    (saved / "m.gguf").touch()
    assert hub.local_path(saved) == saved  # which has weights of its own

    fetched: list[str] = []

    def snapshot(repository: str, allow_patterns: list[str]) -> str:
        fetched[:] = allow_patterns
        return str(folder)

    listed = [file.name for file in folder.iterdir()]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repository: [*listed, "other/x.gguf"])
    hub.fetch.cache_clear()
    assert hub.local_path("someone/m:q4_0") == folder / "m-Q4_0.gguf" and fetched == ["m-Q4_0.gguf"]
    assert hub.local_path("someone/m:Q8") == folder / "m-Q8_0-00001-of-00002.gguf"
    assert fetched == ["m-Q8_0-*-of-00002.gguf"]
    for name, wrong in (
        ("someone/m", "name one, as someone/m:PART"),
        ("someone/m:Q5", "someone/m:Q5: is in the name of no"),
    ):
        with pytest.raises(UsageError, match=wrong) as caught:
            hub.local_path(name)
        assert "\n" not in str(caught.value)
    listed = ["only.gguf", "config.json"]
    hub.fetch.cache_clear()
    assert hub.local_path("someone/m") == folder / "only.gguf" and fetched == ["only.gguf"]
    hub.fetch.cache_clear()
