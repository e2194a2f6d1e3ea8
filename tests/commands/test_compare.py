"""The page of `headstart compare`: whole, safe to open, and silent about what cannot be compared."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from headstart import cli
from headstart.errors import UsageError
from headstart.reports.compare import compare, format_comparison


def run(folder: Path, *, heads: int = 2, steps: int = 30, lr: float = 0.1, extra: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"optimizer: {{lr: {lr}}}\nmodel: {{heads: {heads}}}\n")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            line = {"step": step, "tokens": step * 100, "lr": lr, "grad_norm": 1.0 + 1 / step, "clipped": step < 9,
                    "tokens_per_second": 50.0, **{f"loss/head{k}": 3 / step + k for k in range(1, heads + 1)},
                    **(extra or {})}  # fmt: skip
            file.write(json.dumps(line) + "\n")
            if step % 10 == 0:
                bits = {f"validation/bits_per_byte/head{k}": 2.0 + k / step for k in range(1, heads + 1)}
                sample = {"text": "<b>wrote</b>", "tokens_per_pass": 1.5, "acceptance": []}
                file.write(json.dumps({"step": step, "tokens": step * 100, **bits, "sample": sample}) + "\n")
    return folder


def titles(page: Path) -> list[str]:
    return re.findall(r"<figure><h3>(.*?)</h3>", page.read_text())


COURSE = ["Learning rate", "Gradient norm, before clipping", "Clipped steps", "Speed"]


def test_runs_with_as_many_heads(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    odd = run(tmp_path / "a$x$<i>", extra={"expected_tokens_per_pass": 1.4})
    page = tmp_path / "deep" / "page.html"
    result = compare([odd, run(tmp_path / "b", lr=0.2)], page)
    assert titles(page) == [
        "Loss of head 1 over tokens", "Loss of head 1 over time", "Validation, head 1", "Expected tokens per pass",
        "Loss of head 2 over tokens", "Loss of head 2 over time", *COURSE,
    ]  # fmt: skip
    text = page.read_text()
    assert "<td>optimizer.lr</td><td>0.1</td><td>0.2</td>" in text and "model.heads</td>" not in text
    assert (
        "a$x$&lt;i&gt;" in text and "&lt;b&gt;wrote&lt;/b&gt;" in text and "<b>wrote" not in text and "$<i>" not in text
    )
    assert "<script" not in text and "#0101" not in text
    assert set(re.findall(r"https?://[^\"' <]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert result["settings"] == {"optimizer.lr": {"a$x$<i>": 0.1, "b": 0.2}}
    assert result["compared_heads"] == [1, 2] and result["runs"][1]["clip_rate"] == pytest.approx(8 / 30)


def test_runs_with_different_heads_and_a_single_run(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    two, four = run(tmp_path / "two"), run(tmp_path / "four", heads=4)
    page = tmp_path / "page.html"
    compare([two, four], page)
    assert titles(page)[:3] == ["Loss of head 1 over tokens", "Loss of head 1 over time", "Validation, head 1"]
    assert not any("head 2" in title for title in titles(page))
    assert "different numbers of heads (two 2, four 4): only head 1" in page.read_text()
    compare([four], page)
    assert titles(page)[:3] == ["Loss of each head over tokens", "Loss of each head over time", "Validation, each head"]
    assert "head 4</span>" in page.read_text() and "Settings that differ" not in page.read_text()


def test_nothing_but_nulls(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    nulls = {"loss/head1": None, "loss/head2": None, "grad_norm": None, "tokens_per_second": None, "skipped": 1}
    broken = run(tmp_path / "broken", steps=1, extra=nulls)
    result = compare([broken, run(tmp_path / "sound")], tmp_path / "page.html")
    assert "broken: skipped at step 1 (loss" in (tmp_path / "page.html").read_text()
    assert result["runs"][0]["loss/head1"] is None and result["compared_heads"] == [1]
    compare([broken], tmp_path / "page.html")
    assert "Speed" not in titles(tmp_path / "page.html")


def test_more_runs_than_colours_take_other_lines(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    compare([run(tmp_path / f"r{i}", steps=3) for i in range(8)], tmp_path / "page.html")
    assert "3px dashed var(--series2)" in (tmp_path / "page.html").read_text()


def test_other_tokenizers_are_told(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    a, b = run(tmp_path / "a"), run(tmp_path / "b")
    (b / "config.yaml").write_text("model: {vocab_size: 300}\n")
    compare([a, b], tmp_path / "page.html")
    assert "tokenizers differ: compare bits per byte" in (tmp_path / "page.html").read_text()


def test_the_command(tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    runs = [str(run(tmp_path / name, lr=lr)) for name, lr in (("a", 0.1), ("b", 0.2))]
    monkeypatch.setattr(sys, "argv", ["headstart", "compare", *runs])
    cli.main()
    said = capsys.readouterr()
    assert Path("runs/comparison.html").exists() and "page: runs/comparison.html" in said.err
    lines = said.out.splitlines()
    assert lines[0].split() == ["a", "b"] and lines[-1].split() == ["optimizer.lr", "0.1", "0.2"]
    assert any(re.fullmatch(r"steps whose gradient was clipped +26.7% +26.7%", line) for line in lines)


def test_json_needs_neither_page_nor_matplotlib(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = str(run(tmp_path / "a"))
    monkeypatch.setattr(sys, "argv", ["headstart", "compare", path, "--json"])
    cli.main()
    assert json.loads(capsys.readouterr().out)["runs"][0]["steps"] == 30
    assert not (tmp_path / "runs").exists()
    with pytest.raises(
        UsageError, match=r"a comparison needs matplotlib, which is not installed: pip install 'headstart\[report\]'"
    ):
        compare([Path(path)], tmp_path / "page.html")


def test_what_no_run_has_is_no_row(tmp_path) -> None:
    text = format_comparison(compare([run(tmp_path / "a")], None))
    assert "model FLOPs" not in text and "expected" not in text and "loss of head 1" in text


def test_no_run_at_all() -> None:
    with pytest.raises(UsageError, match="compare needs run folders"):
        compare([], None)
