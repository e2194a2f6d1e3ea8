"""A run resumes on the data and the tokenizer that it was trained on, or says that they are others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from headstart.data.mixture import MixturePart
from headstart.data.prepare.pipeline import Preparation, prepare
from headstart.data.shards import TokenShards
from headstart.data.tokenizers import load_tokenizer
from headstart.errors import UsageError
from headstart.training.checkpoint_state import read_state
from headstart.training.checkpoints import all_steps
from headstart.training.config import BatchConfig, DataConfig, ValidationConfig, load_config
from headstart.training.loop import train


def prepared(folder: Path, text: str, seed: int = 0) -> Path:
    """Prepare 12 documents of one size; of "a" and "g" the splits have equal sizes too."""
    source = folder.with_name(f"{folder.name}-text")
    source.mkdir(exist_ok=True)
    for i in range(12):
        (source / f"{i:02d}.txt").write_text(f"{i:02d} " + text * 300)
    prepare([str(source)], folder, load_tokenizer("bytes"), Preparation(validation_fraction=0.2, seed=seed))
    return folder


@pytest.fixture
def run(tiny, tmp_path):
    """A run of two steps on folders of text, to be resumed."""

    def make(data: DataConfig):
        config = tiny(steps=2, data=data, validation=ValidationConfig(every=0))
        train(config)
        return replace(config, steps=4)

    return make


def test_other_text_is_refused_unless_it_is_allowed(run, tmp_path, capsys) -> None:
    data = prepared(tmp_path / "data", "a")
    config = run(DataConfig(path=data))
    sizes = {file.name: file.stat().st_size for file in data.iterdir() if file.suffix == ".bin"}
    prepared(data, "g")
    assert sizes == {file.name: file.stat().st_size for file in data.iterdir() if file.suffix == ".bin"}
    with pytest.raises(UsageError, match=r"run: was trained on other data: .*/data has other tokens than ") as raised:
        train(config)
    assert "continue on this data with --data.allow-changed" in str(raised.value) and "\n" not in str(raised.value)
    assert list(all_steps(config.run_dir / "checkpoints")) == [2]
    capsys.readouterr()
    train(replace(config, data=replace(config.data, allow_changed=True)))
    said = capsys.readouterr().err
    assert f"continuing on other data, as --data.allow-changed says: {data} has other tokens than at step 2" in said
    assert "changed since the last start: data" not in said
    position = read_state(config.run_dir / "checkpoints" / "step-00000004").position
    assert position.sources == [TokenShards.open(data, "train").digests()]
    assert position.data == {"epoch": 1, "row": 8}  # from the start of an epoch: 4 rows a step
    assert not load_config(config.run_dir / "config.yaml").data.allow_changed  # it was for that start
    train(replace(config, steps=5))


def test_less_text_is_allowed_too(run, tmp_path) -> None:
    data = prepared(tmp_path / "data", "a")
    config = run(DataConfig(path=data))
    config = replace(config, batch=BatchConfig(rows=16))
    train(replace(config, steps=8))
    (tmp_path / "one.txt").write_text("c" * 3000)
    prepare([str(tmp_path / "one.txt")], data, load_tokenizer("bytes"), Preparation(validation_fraction=0.0))
    train(replace(config, steps=9, data=replace(config.data, allow_changed=True)))


def test_the_same_text_prepared_again_is_the_same(run, tmp_path, capsys) -> None:
    data = prepared(tmp_path / "data", "a")
    config = run(DataConfig(path=data))
    shutil.rmtree(data)
    prepared(data, "a")
    capsys.readouterr()
    train(config)
    assert "data" not in capsys.readouterr().err.replace(str(data), "")


def test_another_tokenizer_is_refused(run, tmp_path) -> None:
    data = prepared(tmp_path / "data", "a")
    config = run(DataConfig(path=data))
    file = data / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(UsageError, match=r"/data has another tokenizer than at step 2; put the old data back"):
        train(config)


def test_every_source_of_a_mixture_counts(run, tmp_path) -> None:
    parts = [prepared(tmp_path / name, name) for name in "xyz"]
    config = run(DataConfig(mixture=tuple(MixturePart(part) for part in parts)))
    for part in parts[1:]:
        prepared(part, "w", seed=1)
    with pytest.raises(UsageError, match=r"other data: .*/y has other tokens, .*/z has other tokens than at step 2"):
        train(config)
    train(replace(config, data=replace(config.data, allow_changed=True)))


def test_a_checkpoint_that_does_not_record_its_data_continues_and_says_so(run, tmp_path, capsys) -> None:
    config = run(DataConfig(path=prepared(tmp_path / "data", "a")))
    file = config.run_dir / "checkpoints" / "step-00000002" / "state.json"
    state = json.loads(file.read_text())
    del state["digest"], state["position"]["sources"]
    file.write_text(json.dumps({**state, "format": 1}))
    capsys.readouterr()
    train(config)
    assert "warning: the checkpoint does not record which data it was trained on" in capsys.readouterr().err
    assert read_state(config.run_dir / "checkpoints" / "step-00000004").position.sources
