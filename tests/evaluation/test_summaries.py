"""Summaries: ROUGE of the package itself, documents that are cut, the best checkpoint, and what is refused."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from headstart import cli
from headstart.data.prepare.pipeline import Preparation, prepare
from headstart.data.tokenizers import ByteTokenizer
from headstart.errors import UsageError
from headstart.evaluation import summaries
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.training.checkpoints import all_steps, load_weights
from headstart.training.config import BatchConfig, CheckpointConfig, DataConfig, RunConfig, ValidationConfig
from headstart.training.loop import train
from headstart.training.trackers import WatchConfig

scoring = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is not installed")
CONFIG = ModelConfig(dim=16, layers=3, attention_heads=2, context=48, heads=2)
ROWS = [
    {"document": "the cat sat on the mat all day", "summary": "a cat sat"},
    {"document": "a dog " * 30, "summary": "many dogs ran"},
]
REFERENCES = [row["summary"] for row in ROWS]


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def keep(folder: Path, name: str, summaries: list[str]) -> None:
    """Write summaries as an interrupted run keeps them."""
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / name, *({"document": i, "summary": text} for i, text in enumerate(summaries)))


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["headstart", "evaluate", *map(str, arguments)])
    cli.main()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("summaries") / "model"
    save_model(Transformer(CONFIG), path, ByteTokenizer())
    return path


def test_scores_are_those_of_the_package(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = ["the cat sat down", "dogs ran home"]
    keep(tmp_path / "out" / "xsum", "test.jsonl", written)
    arguments = ("--tasks", "xsum", "--summaries.source", write(tmp_path / "xsum.jsonl", *ROWS), "--json")
    arguments += ("--summaries.new-tokens", 8, "--out", tmp_path / "out")
    evaluate(monkeypatch, directory, *arguments)
    found = json.loads(capsys.readouterr().out)["summaries"]["xsum"]
    assert found["documents"] == 2 and found["cut_documents"] == 1
    assert found["rouge1"]["f1"]["value"] == pytest.approx((4 / 7 + 4 / 6) / 2)
    assert found["rouge2"]["f1"]["value"] == pytest.approx((2 / 5 + 2 / 4) / 2)
    scorer = scoring.RougeScorer(["rougeL"])
    each = [scorer.score(reference, text)["rougeL"] for reference, text in zip(REFERENCES, written)]
    assert found["rougeL"]["precision"] == pytest.approx(sum(score.precision for score in each) / 2)
    assert "61.9%" in (tmp_path / "out" / "results.md").read_text()


def test_summaries_are_written_once_and_long_documents_lose_their_end(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write(tmp_path / "xsum.jsonl", *ROWS), tmp_path / "out"
    arguments = ("--tasks", "xsum", "--summaries.source", file, "--summaries.new-tokens", 8, "--out", out)
    evaluate(monkeypatch, directory, *arguments)
    kept = [json.loads(line) for line in (out / "xsum" / "test.jsonl").read_text().splitlines()]
    assert {line["document"] for line in kept} == {0, 1} and "1 documents lost their end" in capsys.readouterr().out
    # A document that is as short as the longer one was cut to has the same summary.
    room = CONFIG.context - 8 - len("\n\nSummary:")
    cut = write(tmp_path / "cut.jsonl", ROWS[0], ROWS[1] | {"document": ROWS[1]["document"][:room]})
    evaluate(monkeypatch, directory, *arguments, "--summaries.source", cut, "--out", tmp_path / "cut")
    again = [json.loads(line) for line in (tmp_path / "cut" / "xsum" / "test.jsonl").read_text().splitlines()]
    assert sorted(again, key=lambda line: line["document"]) == sorted(kept, key=lambda line: line["document"])
    assert "lost their end" not in capsys.readouterr().out


def test_the_checkpoint_with_the_best_validation_score_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    for i in range(8):
        (tmp_path / "text" / f"{i}.txt").write_text(f"the cat {i} sat on the mat all day\n" * 12)
    prepare([str(tmp_path / "text")], tmp_path / "data", ByteTokenizer(), Preparation(validation_fraction=0.2))
    run = RunConfig(
        steps=6, run_dir=tmp_path / "run", device="cpu", dtype="float32", model=CONFIG,
        data=DataConfig(path=tmp_path / "data"), batch=BatchConfig(rows=2), validation=ValidationConfig(every=0),
        checkpoints=CheckpointConfig(every=2, keep_last=3), watch=WatchConfig(sample_tokens=0),
    )  # fmt: skip
    train(run)
    folder, file = tmp_path / "out" / "xsum", write(tmp_path / "xsum.jsonl", *ROWS)
    for step, written in {2: ["no", "none"], 4: REFERENCES, 6: ["a cat", "dogs"]}.items():
        keep(folder, f"validation-{step}.jsonl", written)
    arguments = ("--tasks", "xsum", "--summaries.source", file, "--summaries.validation", file, "--summaries.choose")
    evaluate(monkeypatch, run.run_dir, *arguments, "--summaries.new-tokens", 8, "--out", tmp_path / "out", "--json")
    found = json.loads(capsys.readouterr().out)["summaries"]["xsum"]
    assert found["step"] == 4 and found["validation"]["4"] == 1.0 > found["validation"]["6"] > found["validation"]["2"]
    expected = Transformer(CONFIG)
    load_weights(all_steps(run.run_dir / "checkpoints")[4], expected)
    taken, last = load_model(folder / "model"), load_model(run.run_dir / "model")
    name = "trunk.embedding.weight"
    assert torch.equal(taken.state_dict()[name].bfloat16(), expected.state_dict()[name].bfloat16())
    assert not torch.equal(taken.state_dict()[name], last.state_dict()[name])


def test_what_it_refuses(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(words: str, *arguments: object) -> None:
        with pytest.raises(SystemExit) as end:
            evaluate(monkeypatch, directory, *arguments)
        assert end.value.code == 2
        assert re.search(words, error := capsys.readouterr().err), error
        assert error.strip().count("\n") == 0

    file = write(tmp_path / "samsum.jsonl", {"dialogue": "a: hi", "summary": "they greet"}, {"dialogue": "b: hi"})
    usual = ("--tasks", "samsum", "--summaries.source", file, "--out", tmp_path / "out", "--summaries.new-tokens", 8)
    refused('line 2: has no text "summary" as its reference', *usual)
    empty = write(tmp_path / "empty.jsonl")
    refused("holds no document of samsum; name a file", *usual, "--summaries.source", empty)
    write(file, {"dialogue": "a: hi", "summary": "they greet"})
    refused("samsum keeps what the model writes; name a folder", *usual[:4])
    refused("--summaries.new-tokens is 0", *usual, "--summaries.new-tokens", 0)
    refused("leaves no room for a document next to 40 new", *usual, "--summaries.new-tokens", 40)
    refused("--summaries.prompt must hold {document} once", *usual, "--summaries.prompt", "Summary:")
    refused("holds no checkpoints; name the folder of a run", *usual, "--summaries.choose", "--out", tmp_path / "new")
    refused("--summaries.source is for one set", *usual, "--tasks", "samsum", "xsum")
    asked: list[tuple[object, ...]] = []

    def load_rows(*name: object) -> None:
        asked.append(name)
        raise UsageError("hf:made-up: cannot be opened")

    monkeypatch.setattr(summaries, "load_rows", load_rows)
    words = "made-up: cannot be opened; or give the documents as a file: --summaries.source cnn-dailymail.jsonl"
    refused(words, "--tasks", "cnn-dailymail", *usual[4:])
    assert asked == [("hf:abisee/cnn_dailymail", "test", "3.0.0")]
