"""The examples run, and what they train learns."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest

import headstart

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["own_loop", "with_trainer"])
def test_an_example_trains(name: str, tmp_path, capsys) -> None:
    if name == "with_trainer":
        pytest.importorskip("accelerate")
        pytest.importorskip("transformers")
    loss = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](tmp_path / "out", steps=20)
    assert loss < 0.85 * math.log(256)
    assert headstart.load(tmp_path / "out").config.heads == 4
    assert set(EXAMPLES.glob("*.py")) == {EXAMPLES / "own_loop.py", EXAMPLES / "with_trainer.py"}
