"""Every file in configs/ loads, and the small one runs."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import headstart
from headstart.commands.train import TrainSettings
from headstart.data.prepare.pipeline import Preparation, prepare
from headstart.data.tokenizers import load_tokenizer
from headstart.formats.config_json import config_json
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_model
from headstart.model.config import ModelConfig
from headstart.model.presets import PRESETS
from headstart.model.transformer import Transformer
from headstart.objective.head_weights import HeadWeights
from headstart.training.config import DataConfig, RunConfig, load_config, save_config
from headstart.training.loop import train
from tests.models import random_model

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shapes of the trained models that files start from, where they say, without weights."""
    folder = tmp_path_factory.mktemp("trained")
    for name, path, heads in (
        ("paper-language-7b-2-heads", "paper-language-7b-2-heads", 2),
        ("paper-7b-4-heads", "paper-7b-4-heads", 4),
        ("paper-7b-4-heads", "paper-7b-1-head", 1),
    ):
        model = folder / "runs" / path / "model"
        model.mkdir(parents=True)
        shape = load_config(path_of(name), ["--model.heads", str(heads)]).model
        (model / "config.json").write_text(json.dumps(config_json(shape, "bfloat16", 2)))
    return folder


@pytest.fixture(autouse=True)
def where_runs_are(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)


def train_commands(path: Path) -> list[list[str]]:
    """The settings behind `headstart train configs/NAME.yaml` in the lines at the top of the file, of each command."""
    start = f"#   headstart train configs/{path.name}"
    lines = [line for line in path.read_text().splitlines() if line.startswith(start)]
    return [shlex.split(line.removeprefix(start), comments=True) for line in lines]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_loads_and_loads_back(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config
    assert config.run_dir == Path("runs") / path.stem
    assert train_commands(path)  # at its top
    for part in config.data.prepared:
        assert re.search(f"#   headstart prepare .* --out {part.path}\n", path.read_text())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_commands_at_its_top_fit_it(path: Path) -> None:
    for arguments in train_commands(path):
        settings = TrainSettings.parse([str(path), *arguments])
        if settings.dry_run.dry_run:
            assert settings.dry_run.estimate(settings.run, "run")["peak_bytes"] > 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_model_has_the_parameters_that_are_told(path: Path) -> None:
    model = load_config(path).model
    with torch.device("meta"):
        built = Transformer(model)
    assert sum(parameter.numel() for parameter in built.parameters()) == model.parameters()["total"]


def test_there_are_the_ones_that_are_written_about() -> None:
    assert {"smoke", "bytes-8-heads", "causal-4-heads", "paper-7b-4-heads"} <= {path.stem for path in CONFIGS}


def path_of(name: str) -> Path:
    return next(path for path in CONFIGS if path.stem == name)


def by_name(name: str) -> RunConfig:
    return load_config(path_of(name))


M = 2**20
SUMMARIES, CODE_CONTESTS = "paper-summaries-7b", "paper-code-contests-7b"
SIZES = {
    "0.6B": "--model.dim 1280 --model.layers 27 --model.attention-heads 20",
    "1.3B": "--model.dim 2048 --model.layers 24 --model.attention-heads 16",
    "3B": "--model.dim 2560 --model.layers 36 --model.attention-heads 20",
    "100M": "--model.dim 768 --model.layers 14 --model.attention-heads 12",
}
# Table S13: file and settings, size; then batch in tokens, steps, tokens, warm-up, peak rate, context, decay ratio.
TABLE_S13 = [
    ("paper-0.3b-4-heads", "", "0.3B", 8 * M, 10850, 91.0e9, 1000, 3e-4, 4096, 0.03),
    ("paper-0.3b-4-heads", SIZES["0.6B"], "0.6B", 8 * M, 10850, 91.0e9, 1000, 3e-4, 4096, 0.03),
    ("paper-0.3b-4-heads", SIZES["1.3B"], "1.3B", 8 * M, 10850, 91.0e9, 1000, 3e-4, 4096, 0.03),
    ("paper-0.3b-4-heads", SIZES["3B"], "3B", 8 * M, 10850, 91.0e9, 1000, 3e-4, 4096, 0.03),
    ("paper-13b-4-heads", "", "13B", 8 * M, 25000, 209.7e9, 1000, 3e-4, 4096, 0.03),
    ("paper-7b-4-heads", "", "6.7B", 8 * M, 25000, 209.7e9, 2000, 3e-4, 4096, 0.03),
    ("paper-7b-4-heads", "--batch.accumulate 896 --steps 68570", "6.7B", 7 * M, 68570, 503.3e9, 2000, 3e-4, 4096, 0.03),
    (
        "paper-7b-4-heads", "--batch.accumulate 896 --steps 136240", "6.7B", 7 * M, 136240, 1000.0e9, 2000, 3e-4, 4096,
        0.03,
    ),
    ("paper-bytes-7b-8-heads", "", "6.7B", 12 * M, 25000, 314.6e9, 2000, 3e-4, 8192, 0.03),
    ("paper-language-7b-2-heads", "", "6.7B", 8 * M, 25000, 209.7e9, 2000, 3e-4, 4096, 0.1),
    ("paper-language-7b-2-heads", "--steps 60000", "6.7B", 8 * M, 60000, 503.3e9, 2000, 3e-4, 4096, 0.1),
    ("paper-stories-30m-2-heads", "", "30M", M // 4, 100_000, 26.2e9, 2000, 1e-4, 2048, 0.03),
    ("paper-stories-books-30m-2-heads", "", "30M", M // 2, 50_000, 26.2e9, 2000, 1e-4, 2048, 0.03),
    ("paper-arithmetic-30m-4-heads", "", "30M", M // 4, 100_000, 26.2e9, 2000, 1e-4, 1024, 0.03),
    (
        "paper-arithmetic-30m-4-heads", f"{SIZES['100M']} --model.context 2048 --batch.accumulate 2", "100M", M // 4,
        100_000, 26.2e9, 2000, 1e-4, 2048, 0.03,
    ),
    (SUMMARIES, "", "6.7B", M // 8, 2760, 0.36e9, 100, 3e-5, 4096, 0.03),
    (SUMMARIES, "--steps 76680", "6.7B", M // 8, 76680, 10.05e9, 100, 3e-5, 4096, 0.03),
    (SUMMARIES, "--steps 7140", "6.7B", M // 8, 7140, 0.936e9, 100, 3e-5, 4096, 0.03),
    (SUMMARIES, "--steps 3330", "6.7B", M // 8, 3330, 0.436e9, 100, 3e-5, 4096, 0.03),
    (SUMMARIES, "--steps 360", "6.7B", M // 8, 360, 0.047e9, 100, 3e-5, 4096, 0.03),
    (SUMMARIES, "--steps 3450", "6.7B", M // 8, 3450, 0.452e9, 100, 3e-5, 4096, 0.03),
    (SUMMARIES, "--steps 60", "6.7B", M // 8, 60, 0.008e9, 100, 3e-5, 4096, 0.03),
    (SUMMARIES, "--steps 23640", "6.7B", M // 8, 23640, 3.1e9, 100, 3e-5, 4096, 0.03),
    (SUMMARIES, "--steps 2550", "6.7B", M // 8, 2550, 0.334e9, 100, 3e-5, 4096, 0.03),
    (CODE_CONTESTS, "", "6.7B", M // 4, 13000, 3.41e9, 400, 5e-5, 4096, 0.004),
]  # fmt: skip


@pytest.mark.parametrize(
    "row", TABLE_S13, ids=lambda row: f"{row[0]} {row[2]} {row[4]}" if isinstance(row, tuple) else None
)
def test_the_papers_are_table_s13(row: tuple) -> None:
    name, settings, size, batch, steps, tokens, warmup, lr, context, ratio = row
    assert shlex.split(settings) in train_commands(path_of(name))
    config = load_config(path_of(name), shlex.split(settings))
    optimizer, model, shape = config.optimizer, config.model, PRESETS[size]
    assert (config.tokens_per_step, config.steps, config.length) == (batch, steps, context)
    assert config.steps * config.tokens_per_step == pytest.approx(tokens, rel=0.03 if tokens < 1e9 else 2e-3)
    assert (optimizer.warmup_steps, optimizer.lr, optimizer.final_lr_ratio) == (warmup, lr, ratio)
    assert (optimizer.kind, optimizer.betas, optimizer.weight_decay) == ("adamw", (0.9, 0.95), 0.1)
    assert optimizer.clip == (0.1 if lr == 5e-5 else 1.0)
    assert (model.dim, model.layers, model.attention_heads) == (shape.dim, shape.layers, shape.attention_heads)
    counts = model.parameters()
    named = "non_embedding" if size in ("30M", "100M") else "total"
    vocabulary = 2 * (32000 - model.vocab_size) * model.dim if named == "total" else 0  # names count 32,000 entries
    assert counts[named] + vocabulary == pytest.approx(float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]], rel=0.06)
    assert model.wiring == "parallel" and config.head_weights == HeadWeights()
    if model.head_kind == "transformer":
        assert model.trunk_layers == model.layers - model.heads
    else:
        assert (model.head_kind, model.vocab_size) == ("replicated", 256)  # bytes


FINETUNED = [(SUMMARIES, row[1]) for row in TABLE_S13 if row[0] == SUMMARIES]
FINETUNED += [(CODE_CONTESTS, ""), (CODE_CONTESTS, "--model.heads 1 --run-dir runs/paper-code-contests-7b-4-to-1")]
MODULES = Path(__file__).parent.parent / "headstart" / "model"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small trained model with 4 heads, and data for it."""
    folder, tokenizer = tmp_path_factory.mktemp("small"), load_tokenizer("bytes")
    shape = ModelConfig(dim=16, layers=6, attention_heads=2, context=4096, heads=4)
    save_model(random_model(shape, scale=0.05), folder / "model", tokenizer)
    prepare([str(MODULES / "bounds.py")], folder / "data", tokenizer, Preparation(validation_fraction=0))
    return folder / "model", folder / "data"


@pytest.mark.parametrize(("name", "settings"), FINETUNED)
def test_a_row_that_finetunes_runs_on_a_small_model(
    name: str, settings: str, small: tuple[Path, Path], tmp_path: Path
) -> None:
    assert shlex.split(settings) in train_commands(path_of(name))
    model, data = small
    arguments = [*shlex.split(settings), "--init-from", str(model), "--data.path", str(data)]
    config = TrainSettings.parse([str(path_of(name)), *arguments]).run
    watch = replace(config.watch, sample_tokens=0)
    config = replace(config, steps=1, run_dir=tmp_path / "run", device="cpu", dtype="float32", watch=watch)
    train(replace(config, batch=replace(config.batch, rows=1, accumulate=2, length=48)))
    old, new = load_model(model), load_model(config.run_dir / "model")
    assert new.config.heads == (1 if "heads" in settings else 4) and old.config.heads == 4
    for key, value in new.state_dict().items():  # a step of the warm-up moves a weight by less than bfloat16 rounds
        torch.testing.assert_close(value, old.state_dict()[key], rtol=0.01, atol=1e-6, check_dtype=False)


def test_the_presets_that_files_name_in_comments_exist() -> None:
    named: set[str] = set()
    for path in CONFIGS:
        for names in re.findall(r"presets?(?: below)? (?:to )?((?:[\d.]+[MB](?:, | and )?)+)", path.read_text()):
            named |= set(re.findall(r"[\d.]+[MB]", names))
    assert {"0.6B", "1B"} <= named <= PRESETS.keys()


TRAINED = ["smoke", "methods-4-heads", "bytes-8-heads", "causal-4-heads"]
TRAINED += ["medusa-4-heads", "stern-4-heads", "sequential-4-heads"]


@pytest.mark.parametrize("name", TRAINED)
def test_it_trains(name: str, tmp_path: Path) -> None:
    config = by_name(name)
    source = DataConfig(
        sources=(str(Path(__file__).parent.parent / "headstart" / "model"),),
        attention_within_documents=config.data.attention_within_documents,
    )
    config = replace(
        config,
        steps=2,
        run_dir=tmp_path / "run",
        device="cpu",
        data=source,
        batch=replace(config.batch, rows=2, length=32),
        validation=replace(config.validation, rows=2),
        watch=replace(config.watch, sample_tokens=4),
    )
    train(config)
    first = json.loads((config.run_dir / "metrics.jsonl").read_text().splitlines()[0])
    losses = {key: loss for key, loss in first.items() if key.startswith("loss/") and loss is not None}
    auxiliary = {"loss/token_order", "loss/registers"} if name.startswith("methods") else set()
    assert len(losses) == (1 if config.head_weights.sampled else config.model.heads) + len(auxiliary)
    assert auxiliary <= losses.keys()
    assert all(4.5 < loss < 6.5 for loss in losses.values())
    model = headstart.load(config.run_dir / "model")
    prompt = list(b"import os\n")
    plain, fast = (model.generate(prompt, max_new_tokens=12, heads=heads) for heads in (1, config.model.drafting_heads))
    assert plain.tokens == fast.tokens
