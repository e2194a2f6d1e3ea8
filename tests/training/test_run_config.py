from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from headstart.data.tokenizers import ByteTokenizer
from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.objective.head_weights import HeadWeights
from headstart.training.config import (
    BatchConfig,
    DataConfig,
    RunConfig,
    differences,
    load_config,
    save_config,
)
from headstart.training.optimizer import OptimizerConfig


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def test_yaml_fills_the_settings(write) -> None:
    config = load_config(
        write(
            "steps: 7\nrun_dir: somewhere\nmodel: {dim: 64, heads: 3, wiring: causal}\n"
            "optimizer: {lr: 3e-4, betas: [0.8, 0.9], clip: .inf}\nhead_weights:\n  initial: [1, 0.5, 0]\n"
            "data:\n  sources: [a, b]\nbatch:\n"
        )
    )
    assert (config.steps, config.run_dir) == (7, Path("somewhere"))
    assert config.model == ModelConfig(dim=64, heads=3, wiring="causal")
    assert config.optimizer == OptimizerConfig(lr=3e-4, betas=(0.8, 0.9), clip=math.inf)
    assert config.head_weights == HeadWeights(initial=(1.0, 0.5, 0.0))
    assert config.data.sources == ("a", "b") and config.batch == BatchConfig()


def test_the_command_line_lies_over_the_yaml(write) -> None:
    path = write("steps: 7\nmodel: {dim: 64, layers: 3}\noptimizer: {lr: 0.1}\n")
    config = load_config(
        path,
        ["--steps", "9", "--run-dir", "x/y", "--model.dim", "96", "--optimizer.lr", "3e-4", "--model.heads=2",
         "--head-weights.initial", "1", "0.5", "--data.sources", "a", "b", "--compile", "True", "--batch.length", "16"],
    )  # fmt: skip
    assert (config.steps, config.run_dir, config.compile) == (9, Path("x/y"), True)
    assert (config.model.dim, config.model.layers, config.model.heads) == (96, 3, 2)
    assert config.optimizer.lr == 3e-4 and config.head_weights.initial == (1.0, 0.5)
    assert config.data.sources == ("a", "b") and config.length == 16


def test_a_preset_with_changes(write) -> None:
    model = load_config(write("steps: 1\nmodel: {preset: 100M, heads: 4, vocab_size: 32000}")).model
    assert (model.dim, model.layers, model.heads, model.vocab_size) == (768, 14, 4, 32000)
    with pytest.raises(UsageError, match=r"run.yaml: no size is called '100X'; there are 1M, 3M"):
        load_config(write("steps: 1\nmodel: {preset: 100X}"))


def test_the_vocabulary_follows_the_tokenizer_unless_given(write, shards) -> None:
    assert load_config(write("steps: 1\nmodel: {preset: 100M}")).model.vocab_size == ByteTokenizer.vocab_size
    assert load_config(write("steps: 1\nmodel: {vocab_size: 300}")).model.vocab_size == 300
    assert load_config(write("steps: 1"), ["--model.vocab_size", "301"]).model.vocab_size == 301
    assert load_config(write(f"steps: 1\ndata: {{path: {shards}}}\nmodel: {{preset: 1M}}")).model.vocab_size == 256
    with pytest.raises(UsageError, match=r"nowhere"):
        load_config(write("steps: 1\ndata: {tokenizer: nowhere}"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stpes: 7", r"run.yaml: there is no setting stpes; did you mean steps\?"),
        ("steps: 7\nmodel: {dims: 7}", r"run.yaml: there is no setting model.dims; did you mean model.dim\?"),
        ("steps: 7\nbatch: {qqq: 7}", "no setting batch.qqq; the settings here are rows, accumulate, length"),
        ("steps: 7\nbatch: {presets: 7}", "no setting batch.presets; the settings here are"),
        ("1: 7", "there is no setting 1;"),
        ("run_dir: x", "run.yaml: steps is missing; add a line `steps: ...`"),
        ("steps: many", "run.yaml: steps is 'many'; it must be a whole number"),
        ("steps: 7.5", "steps is 7.5; it must be a whole number"),
        ("steps: true", "steps is True; it must be a whole number"),
        ("steps: null", "steps is None; it must be a whole number"),
        ("steps: 7\ncompile: 1", "compile is 1; it must be true or false"),
        ("steps: 7\nseed: -1", "seed is -1; it must be at least 0"),
        ("steps: 0", "run.yaml: steps is 0; it must be at least 1"),
        ("steps: 7\noptimizer: {lr: fast}", "optimizer.lr is 'fast'; it must be a number"),
        ("steps: 7\noptimizer: {betas: [0.9]}", r"optimizer.betas is \[0.9\]; it must be a list of 2"),
        ("steps: 7\noptimizer: {betas: [0.9, x]}", r"optimizer.betas\[1\] is 'x'; it must be a number"),
        ("steps: 7\noptimizer: {kind: sgd}", "optimizer.kind is 'sgd'; it must be one of adamw, muon"),
        ("steps: 7\ndata: {sources: text}", "data.sources is 'text'; it must be a list"),
        ("steps: 7\nrun_dir: [a]", r"run_dir is \['a'\]; it must be text"),
        ("steps: 7\nmodel: 100M", "model is '100M'; it must hold settings"),
        ("steps: 7\nmodel: {dim: 30, attention_heads: 4}", "run.yaml: model.dim 30 is not divisible"),
        ("steps: 7\nmodel: {heads: 6}", "run.yaml: model.heads 6 transformer heads leave no layer"),
        ("steps: 7\nmodel: {heads: 2}\nhead_weights: {initial: [1]}", "head_weights.initial has 1 weights for 2 heads"),
        ("steps: 7\nbatch: {length: 4096}", "batch.length 4096 is above model.context 512"),
        ("steps: 7\nbatch: {rows: 0}", "batch.rows is 0; it must be at least 1"),
        ("steps: 7\ndata: {validation_fraction: 1}", "data.validation_fraction is 1.0"),
        ("steps: [7", "run.yaml:1: not YAML"),
        ("- steps", "run.yaml: holds no settings"),
        ("", "run.yaml: holds no settings"),
    ],
)
def test_wrong_settings_get_one_line(write, text, message) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        load_config(write(text))
    assert "\n" not in str(raised.value)


def test_a_missing_file_and_a_folder(tmp_path) -> None:
    for path in (tmp_path / "no.yaml", tmp_path):
        with pytest.raises(UsageError, match=r"cannot be read"):
            load_config(path)


def test_wrong_flags_end_with_status_2(write, capsys) -> None:
    path = write("steps: 7")
    for flags in (["--modle.dim", "3"], ["--model.dim", "x"], ["stray"]):
        with pytest.raises(SystemExit) as stopped:
            load_config(path, flags)
        assert stopped.value.code == 2
    with pytest.raises(UsageError, match=r"model.dim 33"):
        load_config(path, ["--model.dim", "33"])
    with pytest.raises(SystemExit) as stopped:
        load_config(path, ["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr()
    assert "Peak learning rate" in printed.out and "modle" in printed.out + printed.err


def test_saved_settings_load_back_equal(tmp_path, write) -> None:
    configs = [
        RunConfig(steps=3),
        RunConfig(
            steps=3,
            run_dir=Path("a b/ü"),
            threads=2,
            model=ModelConfig(heads=2, kv_heads=2, norm_eps=1e-6, tied=True),
            data=DataConfig(path=Path("yes"), tokenizer="1e3", sources=("null", "a: b")),
            optimizer=OptimizerConfig(kind="muon", lr=1.7e-5, clip=math.inf, betas=(0.1, 1 / 3)),
            head_weights=HeadWeights(initial=(1, 2), final=(0.5, 0.25)),
        ),
    ]
    for config in configs:
        save_config(config, tmp_path / "out.yaml")
        assert load_config(tmp_path / "out.yaml") == config


def test_differences_are_named() -> None:
    a = RunConfig(steps=3)
    b = replace(a, steps=4, model=replace(a.model, dim=64))
    assert differences(a, b) == {"steps": (3, 4), "model.dim": (256, 64)}


@pytest.mark.parametrize("text", [".inf", "inf", ".Inf", "+.inf", "Infinity"])
def test_infinity_is_written_as_in_yaml_or_python(tmp_path, text) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"steps: 2\noptimizer: {{clip: {text}}}\n")
    assert load_config(path).optimizer.clip == math.inf
    path.write_text("steps: 2\n")
    assert load_config(path, ["--optimizer.clip", text]).optimizer.clip == math.inf
    assert load_config(path, [f"--optimizer.clip={text}", "--optimizer.muon-lr", "2e-3"]).optimizer.muon_lr == 2e-3


@pytest.mark.parametrize("text", [".nan", "nan", "-.inf", "0"])
def test_no_other_such_number_is_a_norm(tmp_path, text) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 2\n")
    with pytest.raises(UsageError, match=r"optimizer.clip is "):
        load_config(path, [f"--optimizer.clip={text}"])
