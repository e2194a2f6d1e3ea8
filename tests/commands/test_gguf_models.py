"""Commands on a GGUF file where they take a model directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import headstart
from headstart.cli import run_command
from headstart.commands.self_distillation import fingerprint
from headstart.data.shards import TokenShards
from headstart.data.tokenizers import ByteTokenizer
from headstart.errors import UsageError
from headstart.formats.registry import load_model
from headstart.model.config import ModelConfig
from headstart.serving.server import make_service
from headstart.serving.settings import ServeSettings
from headstart.training.adapt.run import digests
from tests.models import random_model

pytest.importorskip("gguf", reason="gguf is not installed (headstart[gguf])")

CONFIG = ModelConfig(vocab_size=256, dim=32, layers=3, attention_heads=2, hidden_dim=64, context=128)
TEXT = "".join(f"the cat number {i % 10} sat on mat {i * i % 7}, and the dog looked on.\n" for i in range(300))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from headstart.formats.gguf import save_gguf

    path = tmp_path_factory.mktemp("gguf") / "cats.gguf"
    save_gguf(random_model(CONFIG), path, ByteTokenizer())
    return path


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    run_command([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_inspect_shows_the_types_of_tensors(file, capsys):
    found = json.loads(printed(capsys, "inspect", file, "--json"))
    assert found["architecture"] == "llama" and found["files"] == {"cats.gguf": file.stat().st_size}
    assert found["tensor_types"].keys() == {"F32"} and found["tensor_types"]["F32"]["tensors"] == 30
    assert found["tokenizer"] == {"name": "bytes", "vocab_size": 256, "end_id": 255} and not found["chat_template"]
    text = printed(capsys, "inspect", file)
    assert "GGUF of the architecture llama, with no chat template" in text and "stored as" in text


def test_generate_evaluate_and_distill_data(file, tmp_path, capsys):
    text = printed(capsys, "generate", file, "--prompt", "the cat", "--max-new-tokens", "5", "--json")
    assert json.loads(text)["tokens"] == headstart.load(file).generate("the cat", 5).tokens
    (tmp_path / "cats.txt").write_text(TEXT[:500])
    found = json.loads(printed(capsys, "evaluate", file, "--tasks", "heads", "--text", tmp_path / "cats.txt", "--json"))
    assert found["heads_of_model"] == 1 and found["heads"]["documents"] == 1
    with pytest.raises(UsageError, match=r"cats\.gguf: --record puts a file into a model directory"):
        printed(capsys, "evaluate", file, "--tasks", "heads", "--text", tmp_path / "cats.txt", "--record")
    options = ("--prompts", tmp_path / "cats.txt", "--max-new-tokens", "4")
    printed(capsys, "distill-data", file, "--out", tmp_path / "out.jsonl", *options)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(TEXT[:500].splitlines())


def test_adapt_trains_heads_on_a_file_and_convert_makes_a_directory(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("headstart.training.metrics.peak_flops", lambda *_: (1e12, "assumed"))
    (tmp_path / "cats.txt").write_text(TEXT)
    adapt = ("adapt", file, "--data", tmp_path / "cats.txt", "--run-dir", tmp_path / "run", "--length", "32")
    printed(capsys, *adapt, "--heads", "2", "--steps", "1", "--rows", "2")
    printed(capsys, *adapt, "--heads", "2", "--steps", "2", "--rows", "2")  # the run is resumed
    tokens = torch.tensor([list(b"the cat sat")])
    with torch.no_grad():
        plain, again = load_model(file)(tokens), load_model(file, heads=tmp_path / "run" / "heads")
        assert again.config.heads == 2 and torch.equal(again(tokens, heads=1)[:, :, 0], plain)
    assert TokenShards.open(tmp_path / "run" / "data", "train").manifest["tokenizer"] == "bytes"
    printed(capsys, "convert", file, tmp_path / "directory")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "directory")(tokens), plain)
    assert headstart.load(tmp_path / "directory").tokenizer.end_ids == {255}
    printed(capsys, "prepare", tmp_path / "cats.txt", "--out", tmp_path / "data", "--tokenizer", file)
    assert (tmp_path / "data" / "manifest.json").is_file()


def test_a_file_is_told_from_a_changed_one(file, tmp_path):
    other = tmp_path / "cats.gguf"
    other.write_bytes(file.read_bytes())
    assert digests(other) == digests(file) and fingerprint(other) == fingerprint(file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    other.write_bytes(content)
    assert digests(other) != digests(file) and fingerprint(other) != fingerprint(file)


def test_what_needs_a_directory_is_refused_in_one_line(file, tmp_path, capsys):
    with pytest.raises(UsageError, match=r"cats\.gguf: has one head, so there are no drafts to tune"):
        printed(capsys, "tune", file)
    with pytest.raises(UsageError, match=r"cats\.gguf: is a file; push the directory that headstart convert makes"):
        printed(capsys, "push", file, "--to", tmp_path / "out")
    (tmp_path / "text.gguf").write_text("text")
    with pytest.raises(UsageError, match="holds something else"):
        printed(capsys, "convert", file, tmp_path / "text.gguf", "--to", "gguf")


def test_the_server_names_a_file_without_its_suffix(file):
    pytest.importorskip("fastapi")
    service = make_service(file, ServeSettings(slots=1))
    service.stop()
    service.worker.stop()
    assert service.name == "cats"
