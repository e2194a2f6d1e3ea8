"""`headstart push`: what goes out, and that a card tells what was measured and nothing else."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart.cli import main
from headstart.commands.convert import convert
from headstart.commands.push import PushSettings, hub_id, push
from headstart.data.tokenizers import ByteTokenizer
from headstart.decoding.policy.calibration import EDGES, AcceptanceTable, PassCosts, Tuning, write_tuning
from headstart.errors import UsageError
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

TINY = ModelConfig(vocab_size=256, dim=32, layers=4, attention_heads=2, context=48, heads=3, hidden_dim=40)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_model(Transformer(TINY), tmp_path / "model", ByteTokenizer())
    return tmp_path / "model"


class Hub:
    """A recorder of the calls of HfApi."""

    def __init__(self, trouble: Exception | None = None) -> None:
        self.asked: list[Any] = []
        self.trouble = trouble

    def create_repo(self, name: str, **how: Any) -> None:
        if self.trouble is not None:
            raise self.trouble
        self.asked.append((name, how))

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        folder = Path(folder_path)
        self.asked.append(
            (repo_id, {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()})
        )


def test_a_folder_with_a_card(model: Path, tmp_path: Path) -> None:
    (model / "notes.txt").write_text("private")
    found = push(PushSettings(model, str(tmp_path / "out"), licence="mit", base_model="owner/base"))
    assert found["left"] == ["notes.txt"] and not (tmp_path / "out/notes.txt").exists()
    card = (tmp_path / "out/README.md").read_text()
    front = card.split("---")[1]
    assert "license: mit" in front and "base_model: owner/base" in front
    assert "Nothing was measured yet" in card and "predicts 3 tokens at once" in card
    mine, theirs = load_model(model).state_dict(), load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    push(PushSettings(tmp_path / "out", str(tmp_path / "again")))  # a card of ours is written anew
    again = (tmp_path / "again/README.md").read_text()
    assert "license:" not in again and "None was given" in again and "# again" in again
    push(PushSettings(model, str(tmp_path / "out"), licence="mit"))


def test_the_card_tells_what_was_measured(model: Path, tmp_path: Path) -> None:
    ways = {"free-running, greedy": {"tokens_per_pass": 2.25, "acceptance": [0.75, 0.5], "repeated_8_grams": 0.625}}
    (model / "acceptance.json").write_text(json.dumps(ways))
    table = AcceptanceTable((0.8, 0.5), tuple((0.5,) * (len(EDGES) + 1) for _ in range(2)))
    costs = PassCosts((1, 4), (2.0, 4.0), ((2.0, 2.5, 2.75), (4.0, 16.0, 32.0)))
    tuning = Tuning(table, table, costs)
    write_tuning(model, load_model(model), tuning, {})
    scores = {"bits_per_byte": [1.5, 2.5, 3.0], "top1": [0.7, 0.5, 0.4], "documents": 7, "text": ["/home/me/held-out"]}
    (tmp_path / "results.json").write_text(json.dumps({"heads": scores}))
    push(PushSettings(model, str(tmp_path / "out"), evaluation=tmp_path))
    card = (tmp_path / "out/README.md").read_text()
    assert "| free-running, greedy | 2.25 | 75% | 50% | 62% |" in card
    # 1 + 0.8 + 0.8 x 0.5 = 2.2 tokens, for 2.75 instead of 2.00 ms; with four sequences at once heads do not pay.
    assert tuning.expected_speedup(1, 3) == pytest.approx(1.6) and "| 2.00 | 1.60 with 3 |" in card
    assert "| 4.00 | 1.00 with 1 |" in card
    assert "| 2 | 2.500 | 50.0% |" in card and "7 documents (held-out)" in card and "/home/me" not in card
    assert asdict(tuning)["costs"]["slots"] == (1, 4)
    (model / "acceptance.json").write_text(json.dumps({"x": 3}))
    with pytest.raises(UsageError, match="something unknown"):
        push(PushSettings(model, str(tmp_path / "out")))


def test_lossless_is_said_of_what_is(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (headstart[hf])")
    from headstart.formats.hf_code_export import save_hf_code

    (tmp_path / "code").mkdir()
    save_hf_code(load_model(model), tmp_path / "code")
    push(PushSettings(tmp_path / "code", str(tmp_path / "out")))
    card = (tmp_path / "out/README.md").read_text()
    assert (tmp_path / "out/custom_generate/generate.py").is_file() and "trust_remote_code=True" in card
    claims = [line for line in card.splitlines() if "lossless" in line]
    assert len(claims) == 1 and claims[0].startswith("In Headstart") and "`lossy-...` are not" in claims[0]
    with_code = next(line for line in card.splitlines() if line.startswith("With its code"))
    assert "up to the rounding" in with_code
    convert(model, tmp_path / "meta", "meta")
    with pytest.raises(UsageError):
        push(PushSettings(tmp_path / "nowhere", str(tmp_path / "other")))


def test_a_card_of_someone_else_is_kept(model: Path, tmp_path: Path) -> None:
    (model / "README.md").write_text("# Mine\n")
    assert push(PushSettings(model, str(tmp_path / "out")))["card"] == "kept as it is"
    assert (tmp_path / "out/README.md").read_text() == "# Mine\n"
    with pytest.raises(UsageError, match="--licence"):
        push(PushSettings(model, str(tmp_path / "out"), licence="mit"))
    push(PushSettings(model, str(tmp_path / "out"), licence="mit", new_card=True))
    assert "license: mit" in (tmp_path / "out/README.md").read_text()
    assert (model / "README.md").read_text() == "# Mine\n"


def test_the_hub(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    hub = Hub()
    found = push(PushSettings(model, "owner/name", private=True), api=hub)
    assert found["to"] == "https://huggingface.co/owner/name"
    assert hub.asked[0] == ("owner/name", {"private": True, "exist_ok": True})
    name, content = hub.asked[1]
    assert name == "owner/name" and content["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert content["README.md"].startswith(b"---") and set(content) == set(found["files"])
    with pytest.raises(UsageError, match="hub refused it \\(no network\\)") as caught:
        push(PushSettings(model, "hf:owner/name"), api=Hub(OSError("no network\nmuch more")))
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="hub refused it"):
        push(PushSettings(model, "hf:owner/name"), api=Hub(RuntimeError("a network's own kind of error")))


def test_what_is_a_folder_and_what_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    folders = ("out", "runs/new", "./owner/name", "/owner/name", "a/b/c", "~/x", "../x", "runs")
    assert [hub_id(to) for to in folders] == [None] * len(folders)
    assert hub_id("owner/name-1.0") == "owner/name-1.0" and hub_id("hf:runs/new") == "runs/new"
    with pytest.raises(UsageError, match="OWNER/NAME"):
        hub_id("hf:name")


def test_nothing_else_is_replaced(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("much")
    for target, words in (
        ("notes", "something else"),
        ("model", "where the model lies"),
        (".", "where the model lies"),
    ):
        with pytest.raises(UsageError, match=words):
            push(PushSettings(model, str(tmp_path / target)))
    assert (tmp_path / "notes/todo.txt").read_text() == "much"
    before, sys.argv = sys.argv, ["headstart", "push", str(model), "--to", str(tmp_path / "out"), "--licence", "mit"]
    try:
        main()
    finally:
        sys.argv = before
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")
