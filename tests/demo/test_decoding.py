from __future__ import annotations

import json
from pathlib import Path

import pytest

from headstart.demo.decoding import repeated
from headstart.demo.run import run_demo
from headstart.errors import UsageError


def test_repeated_grams_are_counted_within_an_output() -> None:
    assert repeated([list(range(20))]) == 0
    assert repeated([[1, 2] * 8], size=2) == pytest.approx(13 / 15)  # 15 pairs, 2 of them new
    assert repeated([list(range(9)), list(range(9))]) == 0


def test_the_demo_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """On this test's own files instead of the standard library, with ten steps."""
    from headstart.demo import run as demo_run

    (tmp_path / "code").mkdir()
    for i in range(6):
        (tmp_path / "code" / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n\n\n" * 30)
    config_of = demo_run.demo_config

    def small(out: Path, steps: int, seed: int):
        from dataclasses import replace

        config = config_of(out, min(steps, 10), seed)
        data = replace(config.data, sources=(str(tmp_path / "code"),), validation_fraction=0.4)
        return replace(config, data=data, validation=replace(config.validation, rows=4))

    monkeypatch.setattr(demo_run, "demo_config", small)
    monkeypatch.setattr(demo_run, "PROMPTS", 2)
    monkeypatch.setattr(demo_run, "NEW_BYTES", 24)
    out = tmp_path / "demo"
    for _ in range(2):  # the second time replaces the first
        result = run_demo(out, minutes=0.01)
        assert all(row["identical"] for row in [*result["decoding"], *result["sampled"]])
        assert [row["heads"] for row in result["decoding"]] == [1, 2, 4, 8]
        assert json.loads((out / "results.json").read_text())["decoding"] == result["decoding"]
        assert "</html>" in (out / "report.html").read_text()
        assert (out / "model" / "model.safetensors").exists()
    assert "earlier demo, which is replaced" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.txt"):
        run_demo(tmp_path / "mine", minutes=0.01)
    assert (tmp_path / "mine" / "thesis.txt").exists()
