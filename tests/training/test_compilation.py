"""Runs that are compiled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headstart.errors import UsageError
from headstart.training import new_model
from headstart.training.config import load_config
from headstart.training.new_model import blocks_compiled, pays
from headstart.training.processes import Processes

CONFIGS = Path(__file__).parents[2] / "configs"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HERE = Processes(CPU)


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Stands for torch.compile: what was compiled."""
    asked: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda function: asked.append(function) or function)
    return asked


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: object) -> object:
        raise RuntimeError("\n  no working C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", fail)


def test_a_long_run_is_compiled_and_a_short_one_is_not(tiny, compiling) -> None:
    short = tiny()
    assert not blocks_compiled(short, HERE) and not compiling
    # 16 rows of 24 tokens a step, of 100 thousand FLOPs each.
    long = replace(short, steps=int(1e14 / short.tokens_per_step / short.model.flops_per_token(short.length)) + 1)
    assert blocks_compiled(long, HERE) and len(compiling) == 1
    assert not pays(replace(long, steps=long.steps - 1), CPU)
    assert not pays(long, CUDA) and not pays(replace(long, steps=10**9), torch.device("meta"))


def test_a_setting_is_obeyed(tiny, compiling) -> None:
    assert blocks_compiled(tiny(compile=True), HERE)
    assert not blocks_compiled(tiny(compile=False, steps=10**9), HERE)


def test_where_torch_cannot_a_long_run_goes_without_and_says_so(tiny, no_compiler, capsys) -> None:
    assert not blocks_compiled(tiny(steps=10**9), HERE)
    assert "cannot compile here (no working C++ compiler): training without" in capsys.readouterr().err


def test_where_torch_cannot_and_it_was_asked_for_it_is_an_error(tiny, no_compiler) -> None:
    with pytest.raises(
        UsageError, match=r"compile is true, but torch cannot compile here \(no working C\+\+ compiler\)"
    ):
        blocks_compiled(tiny(compile=True), HERE)


def test_where_another_process_cannot_none_does(tiny, compiling, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Processes, "all", lambda self, good: False)
    assert not blocks_compiled(tiny(steps=10**9), HERE)
    assert "another process cannot" in capsys.readouterr().err


@pytest.mark.slow
def test_torch_can_compile_where_the_tests_run() -> None:
    assert new_model.compile_problem(CPU) == ""


@pytest.mark.parametrize(
    ("name", "on_a_cpu", "on_a_gpu"),
    [("smoke", False, False), ("bytes-8-heads", True, False), ("bytes-30m-8-heads", True, True),
     ("paper-stories-30m-2-heads", True, True), ("paper-7b-4-heads", True, True)],
)  # fmt: skip
def test_recipes_are_compiled_where_they_are_long(name: str, on_a_cpu: bool, on_a_gpu: bool) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", ["--model.vocab-size", "256"] if "smoke" not in name else [])
    assert config.compile is None
    assert (pays(config, CPU), pays(config, CUDA)) == (on_a_cpu, on_a_gpu)
