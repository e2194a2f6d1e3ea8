"""`headstart convert`: each way out, read back; what is refused; and that nothing wrong is kept."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import headstart
from headstart.cli import main
from headstart.commands.convert import convert
from headstart.data.tokenizers import ByteTokenizer, Tokenizer
from headstart.errors import UsageError
from headstart.formats.huggingface import save_model
from headstart.formats.meta import MetaRelease
from headstart.formats.registry import FORMATS, load_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from tests.models import random_model

TINY = ModelConfig(vocab_size=256, dim=32, layers=4, attention_heads=2, context=48, heads=2, hidden_dim=40)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(random_model(TINY), tmp_path / "model", ByteTokenizer())
    return tmp_path / "model"


def same_weights(a: Transformer, b: Transformer) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_out_to_metas_format_and_back(saved: Path, tmp_path: Path) -> None:
    found = convert(saved, tmp_path / "meta", "meta")
    assert found["checks"][0]["differences"] == [0.0, 0.0] and found["checks"][0]["passed"]
    assert {line.split(":")[0] for line in found["left_out"]} == {"context of 48 tokens", "tokenizer"}
    convert(tmp_path / "meta", tmp_path / "back", tokenizer="bytes")
    again = load_model(tmp_path / "back")
    assert same_weights(load_model(saved), again) and again.config.heads == 2
    mine, theirs = (headstart.load(path).generate("def ", max_new_tokens=8) for path in (saved, tmp_path / "back"))
    assert mine.text == theirs.text
    convert(tmp_path / "back", tmp_path / "meta", "meta", dtype="bfloat16")  # an earlier result is replaced
    assert load_model(tmp_path / "back").trunk.embedding.weight.dtype == torch.float32
    assert torch.load(tmp_path / "meta/consolidated.pth")["norm.weight"].dtype == torch.bfloat16


def test_where_a_text_ends_is_kept(tmp_path: Path) -> None:
    config = replace(TINY, heads=2, head_kind="medusa", layers=2)
    chained = replace(TINY, heads=2, head_kind="sequential", wiring="causal")
    generation = {"eos_token_id": [255, 10], "bos_token_id": 3, "temperature": 0.5}
    for name, shape in (("medusa", config), ("sequential", chained)):
        save_model(random_model(shape), tmp_path / name, ByteTokenizer())
        (tmp_path / name / "generation_config.json").write_text(json.dumps(generation))
        file = tmp_path / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"bos_token_id": 3, "eos_token_id": [255, 10]}))
    save_model(random_model(TINY), tmp_path / "plain", ByteTokenizer())
    (tmp_path / "plain" / "generation_config.json").write_text(json.dumps(generation))

    targets = [("medusa", "headstart", ""), ("medusa", "hf-code", ""), ("medusa", "medusa", "base")]
    for source, to, folder in [*targets, ("sequential", "mimo", ""), ("plain", "meta", "")]:
        out = tmp_path / f"as-{to}"
        convert(tmp_path / source, out, to)
        assert json.loads((out / folder / "generation_config.json").read_text()) == generation, to
        if to != "meta":
            written = json.loads((out / folder / "config.json").read_text())
            assert (written["bos_token_id"], written["eos_token_id"]) == (3, [255, 10]), to
        # And back.
        convert(out, tmp_path / f"back-{to}", tokenizer="bytes")
        assert json.loads((tmp_path / f"back-{to}" / "generation_config.json").read_text()) == generation, to
        assert headstart.load(tmp_path / f"back-{to}").tokenizer.end_ids == {255, 10}
    # A source that names no ends takes those of the tokenizer that is given.
    save_model(random_model(TINY), tmp_path / "bare")
    convert(tmp_path / "bare", tmp_path / "named", tokenizer="bytes")
    assert json.loads((tmp_path / "named" / "generation_config.json").read_text())["eos_token_id"] == 255


def test_another_dtype(saved: Path, tmp_path: Path) -> None:
    found = convert(saved, tmp_path / "half", dtype="bfloat16")
    assert found["left_out"] == ["weights: rounded from float32 to bfloat16"]
    assert same_weights(load_model(tmp_path / "half"), load_model(saved, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_gguf_is_read_by_others(dtype: str | None, saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed (headstart[gguf])")
    pytest.importorskip("transformers", reason="transformers is not installed (headstart[hf])")
    found = convert(saved, tmp_path / "model.gguf", "gguf", dtype)
    by = {check["by"]: check for check in found["checks"]}
    assert by["gguf"]["found"].startswith("all ") and len(by["transformers"]["differences"]) == 1
    assert "head 2: left out" in found["left_out"]
    convert(saved, tmp_path / "model.gguf", "gguf", dtype)


def test_code_for_transformers(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (headstart[hf])")
    found = convert(saved, tmp_path / "out", "hf-code")
    assert [check["by"] for check in found["checks"]] == ["headstart", *["transformers with the code"] * 2]
    assert "the same greedy text with all heads" in found["checks"][2]["found"] and not found["left_out"]
    with pytest.raises(UsageError, match="linear heads"):
        save_model(random_model(replace(TINY, head_kind="linear", wiring="anticausal")), tmp_path / "odd")
        convert(tmp_path / "odd", tmp_path / "out", "hf-code")
    assert load_model(tmp_path / "out").config == TINY


def test_heads_for_engines_and_back(tmp_path: Path) -> None:
    sequential = replace(TINY, head_kind="sequential", wiring="causal", heads=3, shared=False)
    for to, config in (("medusa", replace(TINY, head_kind="medusa")), ("mimo", sequential)):
        save_model(random_model(config), tmp_path / to, ByteTokenizer())
        found = convert(tmp_path / to, tmp_path / f"{to}-out", to)
        assert all(check["passed"] for check in found["checks"]) and found["checks"][0]["differences"] == [0.0, 0.0]
        convert(tmp_path / f"{to}-out", tmp_path / f"{to}-back")
        again = headstart.load(tmp_path / f"{to}-back")
        assert again.config.heads == 2
        plain = headstart.load(tmp_path / to).generate("def ", max_new_tokens=8)
        assert again.generate("def ", max_new_tokens=8).tokens == plain.tokens
        with pytest.raises(UsageError, match="alone"):
            convert(tmp_path / to, tmp_path / "other", "mimo" if to == "medusa" else "medusa")
    assert len(found["checks"]) == 2 and any(line.startswith("head 3") for line in found["left_out"])


def test_what_is_not_the_same_is_not_kept(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(MetaRelease):
        def write(self, model: Transformer, path: Path, tokenizer: Tokenizer | None) -> list[str]:
            with torch.no_grad():
                changed = Transformer(model.config)
                changed.load_state_dict(model.state_dict())
                changed.heads[1].mlp.down.weight.mul_(1.1)
            return super().write(changed, path, tokenizer)

    monkeypatch.setitem(FORMATS, "meta", Wrong())
    with pytest.raises(UsageError, match="logits differ"):
        convert(saved, tmp_path / "meta", "meta")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_nothing_else_is_replaced(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("much")
    (tmp_path / "letter").write_text("dear")
    cases = [
        (tmp_path / "notes", "headstart", "holds something else"),
        (tmp_path / "notes", "meta", "holds something else"),
        (tmp_path / "notes", "gguf", "is a directory"),
        (tmp_path / "letter", "gguf", "holds something else"),
        (tmp_path / "letter", "headstart", "is a file"),
        (saved, "headstart", "where the source lies"),
        (tmp_path, "headstart", "where the source lies"),
        (saved, "meta", "where the source lies"),
        (tmp_path / "new", "onnx", "no such format"),
    ]
    for target, to, words in cases:
        with pytest.raises(UsageError, match=words) as caught:
            convert(saved, target, to)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="dtype"):
        convert(saved, tmp_path / "new", dtype="int8")
    save_model(random_model(replace(TINY, wiring="causal")), tmp_path / "causal")
    with pytest.raises(UsageError, match="causal wiring"):
        convert(tmp_path / "causal", tmp_path / "new", "meta")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "notes", "letter", "causal"}
    assert (tmp_path / "notes/todo.txt").read_text() == "much" and (tmp_path / "letter").read_text() == "dear"


def test_the_command(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["headstart", "convert", str(saved), str(tmp_path / "out"), "--to", "meta"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"meta: {tmp_path / 'out'}" and "read back by headstart" in lines[-2]
    assert "head 1 0, head 2 0" in lines[-2]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--json"])
    main()
    assert json.loads(capsys.readouterr().out)["format"] == "meta"
    monkeypatch.setattr(sys, "argv", ["headstart", "convert", str(saved), str(saved)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
