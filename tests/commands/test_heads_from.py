"""The commands take heads that lie in a directory of their own, and keep what they measure next to the heads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import headstart
from headstart.cli import run_command
from headstart.commands.doctor_checks import Sizes, diagnose
from headstart.commands.evaluate import ACCEPTANCE_FILE
from headstart.commands.inspect import format_inspection, inspect
from headstart.commands.push import PushSettings, push
from headstart.data.tokenizers import ByteTokenizer
from headstart.decoding.policy.calibration import TUNING_FILE
from headstart.errors import UsageError
from headstart.evaluation.settings import PROMPTS_FILE
from headstart.formats.heads import HEADS_CONFIG, StoredHeads, next_token_model, save_heads
from headstart.formats.huggingface import save_model
from headstart.formats.tensor_names import HEADS_FILE, MODEL_FILE
from headstart.model.config import ModelConfig
from tests.models import random_model

CONFIG = ModelConfig(
    dim=32, layers=3, attention_heads=2, hidden_dim=64, context=64, heads=3, head_kind="medusa", vocab_size=256
)


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A base with prompts, and heads for it."""
    torch.set_num_threads(1)
    model = random_model(CONFIG)
    save_model(next_token_model(model), tmp_path / "base", ByteTokenizer())
    prompts = [json.dumps({"prompt": f"def f{i}(x):"}) + "\n" for i in range(3)]
    (tmp_path / "base" / PROMPTS_FILE).write_text("".join(prompts))
    save_heads(model, tmp_path / "heads", "base")
    return tmp_path / "base", tmp_path / "heads"


def run(*arguments: object) -> None:
    run_command([str(argument) for argument in arguments])


def test_measurements_lie_next_to_the_heads(places: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base, heads = places
    small = ("--prompt-tokens", 8, "--new-tokens", 16, "--threads", 1)
    run("tune", base, "--heads-from", heads, *small, "--batches", 1, "--seconds", 0.01)
    run("evaluate", base, "--heads-from", heads, *small, "--tasks", "acceptance", "--record")
    assert not (base / TUNING_FILE).exists() and not (base / ACCEPTANCE_FILE).exists()
    policy = headstart.load(base, heads=heads).engine(exact=False).policy
    assert policy is not None and policy.calibration.current.costs.slots == (1,)
    found = inspect(base, heads)
    assert found["heads"] == 3 and len(found["acceptance"]["free-running, greedy"]["acceptance"]) == 2
    assert {f"heads/{TUNING_FILE}", f"heads/{HEADS_FILE}", MODEL_FILE} <= set(found["files"])
    assert format_inspection(found).startswith(f"{base}, with the heads of {heads}\n")
    assert "acceptance" not in inspect(base)


def test_the_output_does_not_depend_on_the_heads(
    places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, heads = places
    generate = ("generate", base, "--prompt", "def f(", "--max-new-tokens", 12, "--json", "--threads", 1)
    written = []
    for more in ((), ("--heads-from", heads, "--heads", 3)):
        run(*generate, *more)
        written.append(json.loads(capsys.readouterr().out))
    assert written[0]["tokens"] == written[1]["tokens"]
    assert len(written[1]["stats"]["acceptance"]) == 2
    answers = []
    for number, more in enumerate([(), ("--heads-from", heads)]):
        out = tmp_path / f"{number}.jsonl"
        prompts = ("--prompts", base / PROMPTS_FILE, "--out", out, "--max-new-tokens", 8, "--threads", 1)
        run("distill-data", base, *prompts, *more)
        answers.append(out.read_text())
    assert answers[0] == answers[1]


def test_the_server_attaches_them(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    server = pytest.importorskip("headstart.serving.server", reason="install headstart[serve]")
    loaded, original = [], server.api.load

    def load(*arguments: Any) -> None:
        loaded.append(original(*arguments))
        raise UsageError("loaded")

    monkeypatch.setattr(server.api, "load", load)
    with pytest.raises(UsageError, match="loaded"):
        run("serve", places[0], "--heads-from", places[1], "--port", 0)
    assert loaded[0].config.heads == 3


def test_doctor_compares_all_values_of_the_base(places: tuple[Path, Path]) -> None:
    base, heads = places
    decoder = ModelConfig(dim=32, layers=2, attention_heads=2)
    sizes = Sizes(product=64, stream_mebibytes=1, decoder=decoder, passes=2)

    def finding() -> dict[str, Any]:
        findings = diagnose(base, heads, sizes=sizes)["findings"]
        return next(found for found in findings if found["name"] == "base of the heads")

    found = finding()
    identity = StoredHeads.read(heads).identity
    assert found["status"] == "ok" and found["values"] == {"copy": "same", "sha256": identity.sha256}
    tensors = load_file(base / MODEL_FILE)
    tensors["model.layers.1.mlp.up_proj.weight"][63, 31] += 1e-3
    save_file(tensors, base / MODEL_FILE, {"format": "pt"})
    found = finding()
    assert found["status"] == "fail" and "model.layers.1.mlp.up_proj.weight" in found["sentence"]


def test_heads_are_pushed_with_a_card(places: tuple[Path, Path], tmp_path: Path) -> None:
    base, heads = places
    (heads / "notes.txt").write_text("private")
    settings = PushSettings(str(heads), str(tmp_path / "out"), licence="mit", base_model="owner/base")
    found = push(settings)
    assert found["left"] == ["notes.txt"]
    assert {HEADS_CONFIG, HEADS_FILE, "heads/identity.safetensors", "README.md"} == set(found["files"])
    card = (tmp_path / "out/README.md").read_text()
    front = card.split("---")[1]
    assert all(line in front for line in ("license: mit", "base_model: owner/base", "base_model_relation: adapter"))
    assert 'headstart.load("owner/base", heads="out")' in card and "--heads-from out" in card
    assert StoredHeads.read(heads).identity.sha256 in card
    assert StoredHeads.read(tmp_path / "out").base == "owner/base" and StoredHeads.read(heads).base == "base"
    assert headstart.load(base, heads=tmp_path / "out").config.heads == 3
    push(settings)  # replaces an earlier result
    push(replace(settings, base_model=None, licence=None))
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model:" not in card and "None was given" in card and 'load("base"' in card
    (heads / HEADS_FILE).unlink()
    with pytest.raises(UsageError, match=r"heads\.safetensors: is missing"):
        push(settings)
