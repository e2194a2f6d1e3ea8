"""Runs on a mixture: its settings, its lines, its validation, and its resumption."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headstart.data.mixture import MixturePart
from headstart.data.prepare.pipeline import Preparation, prepare
from headstart.data.shards import TokenShards
from headstart.data.tokenizers import load_tokenizer
from headstart.errors import UsageError
from headstart.training import checkpoints
from headstart.training.config import DataConfig, RunConfig, ValidationConfig, load_config, save_config
from headstart.training.loop import train
from headstart.training.new_model import build_model
from headstart.training.optimizer import build_optimizers
from headstart.training.processes import Processes
from headstart.training.step import Learner
from headstart.training.validation import validate

ALONE = Processes(torch.device("cpu"))


@pytest.fixture(scope="module")
def books(tmp_path_factory) -> Path:
    """A second source: 10 documents, of other text and fewer tokens."""
    folder = tmp_path_factory.mktemp("books")
    for i in range(10):
        (folder / f"{i}.txt").write_text(f"Überlange Bücher {i} öffnen sich. " * 12)
    prepare([str(folder)], folder / "books", load_tokenizer("bytes"), Preparation(validation_fraction=0.3))
    return folder / "books"


@pytest.fixture
def mixed(tiny, shards, books):
    """`tiny` on 3 rows of the first source to 1 of the second."""

    def make(name: str = "run", parts=None, **changes) -> RunConfig:
        parts = parts or (MixturePart(shards, 3), MixturePart(books))
        return tiny(name, **{"data": DataConfig(mixture=tuple(parts)), **changes})

    return make


@pytest.fixture
def yaml(tmp_path):
    def write(text: str) -> Path:
        (tmp_path / "run.yaml").write_text("steps: 1\n" + text)
        return tmp_path / "run.yaml"

    return write


def test_a_mixture_is_read_and_written_back_equal(yaml, tmp_path) -> None:
    text = "model: {vocab_size: 256}\ndata:\n  mixture:\n    - {path: data/a b, weight: 9}\n    - {path: data/ü}\n"
    config = load_config(yaml(text))
    assert config.data.mixture == (MixturePart(Path("data/a b"), 9.0), MixturePart(Path("data/ü"), 1.0))
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    third = replace(config, data=DataConfig(mixture=(MixturePart(Path("a"), 1 / 3),)))
    save_config(third, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == third


def test_the_command_line_leaves_a_mixture_alone(yaml, shards, books, capsys) -> None:
    path = yaml(f"data: {{mixture: [{{path: {shards}, weight: 9}}, {{path: {books}}}]}}")
    config = load_config(path, ["--steps", "7", "--data.attention-within-documents"])
    assert config.steps == 7 and config.data.attention_within_documents
    assert config.data.mixture == (MixturePart(shards, 9), MixturePart(books, 1))
    assert config.model.vocab_size == 256  # of the tokenizer that they share
    for flags in (["--help"], ["--data.mixture", "x"]):
        with pytest.raises(SystemExit):
            load_config(path, flags)
    printed = capsys.readouterr().out
    assert "--data.path" in printed and "--data.mixture" not in printed and "subcommands" not in printed
    path = yaml("model: {rope_scaling: {kind: linear, factor: 4}}")
    assert load_config(path, ["--model.rope-scaling.factor", "8"]).model.rope_scaling.factor == 8
    path = yaml(f"data: {{mixture: [{{path: {shards}, weight: 9}}, {{path: {books}}}]}}")
    with pytest.raises(UsageError, match=r"data.path else and data.mixture are both given; leave one of them out"):
        load_config(path, ["--data.path", "else"])


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("[]", "run.yaml: data.mixture is empty; name folders that headstart prepare wrote"),
        ("data/a", "run.yaml: data.mixture is 'data/a'; it must be a list"),
        ("[data/a]", r"run.yaml: data.mixture\[0\] is 'data/a'; it must hold settings"),
        ("[{weight: 1}]", r"run.yaml: data.mixture\[0\].path is missing"),
        ("[{path: a}, {path: b, wieght: 2}]", r"no setting data.mixture\[1\].wieght; did you mean .*weight\?"),
        (
            "[{path: a}, {path: data/b, weight: 0}]",
            r"run.yaml: data.mixture: data/b has weight 0.0; it must be a finite",
        ),
        ("[{path: data/b, weight: -1}]", "data/b has weight -1.0"),
        ("[{path: data/b, weight: .nan}]", "data/b has weight nan"),
        ("[{path: data/b, weight: .inf}]", "data/b has weight inf"),
        ("[{path: data/b, weight: heavy}]", r"data.mixture\[0\].weight is 'heavy'; it must be a number"),
        ("[{path: data/a}]\n  path: data/b", "data.path data/b and data.mixture are both given"),
        ("[{path: no/such}]", "no/such: no such folder"),
    ],
)
def test_wrong_mixtures_get_one_line(yaml, mixture, message) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        load_config(yaml(f"data:\n  mixture: {mixture}\n"))
    assert "\n" not in str(raised.value)


def test_a_mixture_trains_and_says_what_it_reads(mixed, metrics, shards, books, capsys) -> None:
    config = mixed()
    train(config)
    lines = metrics(config.run_dir)
    names = {f"{what}/head{k}" for what in ("loss", "bits_per_byte", "top1") for k in (1, 2)}
    expected = {f"validation/{part}{name}" for part in ("", "data/", "books/") for name in names}
    assert lines[-1].keys() == {"step", "tokens"} | expected
    said = capsys.readouterr().err
    assert f"{config.steps} steps of 96 tokens: 2 sources mixed" in said
    for name, path, share, weight in (("data", shards, "75.0%", 0.75), ("books", books, "25.0%", 0.25)):
        epoch = (len(TokenShards.open(path, "train").tokens) - 2) // 24 * 24
        times = 6 * 96 * weight / epoch
        assert f"  {name} ({path}): weight {weight * 4:g} ({share}), {times:.2f} epochs of {epoch:,} tokens" in said


def test_validation_of_a_mixture_is_the_mean_of_its_parts_by_weight(mixed, metrics, shards, books) -> None:
    config = mixed(steps=2, validation=ValidationConfig(every=1, rows=8))
    train(config)
    last = metrics(config.run_dir)[-1]
    model, _ = build_model(config, ALONE)
    checkpoints.restore_newest(
        config.run_dir / "checkpoints", model, build_optimizers(model, config.optimizer, ALONE.device), ALONE
    )
    opened = [TokenShards.open(path, "validation") for path in (shards, books)]
    alone = [validate(model, part, config, ALONE) for part in opened]
    for name, record in zip(("data", "books"), alone):
        for key, value in record.items():
            assert last[key.replace("validation/", f"validation/{name}/")] == value
    for k in (1, 2):
        for what in ("loss", "top1"):
            a, b = (record[f"validation/{what}/head{k}"] for record in alone)
            assert last[f"validation/{what}/head{k}"] == pytest.approx(0.75 * a + 0.25 * b)
        size = 0.75 * opened[0].bytes_per_token + 0.25 * opened[1].bytes_per_token
        nats = last[f"validation/loss/head{k}"]
        assert last[f"validation/bits_per_byte/head{k}"] == pytest.approx(nats / math.log(2) / size)
    assert alone[0]["validation/loss/head1"] != alone[1]["validation/loss/head1"]


def test_a_part_without_validation_documents_is_left_out_of_validation(
    mixed, metrics, shards, tmp_path, capsys
) -> None:
    (tmp_path / "long.txt").write_text("one long document " * 50)
    prepare([str(tmp_path / "long.txt")], tmp_path / "one", load_tokenizer("bytes"))
    config = mixed(steps=2, parts=(MixturePart(shards), MixturePart(tmp_path / "one", 5)))
    train(config)
    said = capsys.readouterr().err
    assert f"{tmp_path / 'one'}: has no validation documents, so it is left out of validation" in said
    assert "nothing is validated" not in said
    last = metrics(config.run_dir)[-1]
    assert last["validation/loss/head1"] == last["validation/data/loss/head1"]
    assert not any(key.startswith("validation/one/") for key in last)


def test_a_mixture_of_one_part_is_the_folder_alone(mixed, tiny, metrics, shards) -> None:
    train(tiny("alone"))
    train(mixed("mixture", parts=[MixturePart(shards, 0.3)]))
    alone, mixture = (metrics(tiny(name).run_dir) for name in ("alone", "mixture"))
    assert alone == mixture


def test_a_mixture_that_died_goes_on_exactly(mixed, metrics, books, monkeypatch) -> None:
    class Killed(BaseException):
        pass

    original, seen = Learner.update, []

    def until(stop: int):
        def step(self, batches, *rest):
            if len(seen) == stop:
                raise Killed
            seen.append(torch.cat([batch.tokens for batch in batches]))
            return original(self, batches, *rest)

        return step

    monkeypatch.setattr(Learner, "update", until(-1))
    train(mixed("whole"))
    whole, seen[:] = list(seen), []
    text = TokenShards.open(books, "train").tokens[:].tobytes()
    of_books = [bytes(row.tolist()) in text for row in torch.cat(whole)]
    assert of_books.count(True) == len(of_books) / 4 == 6
    monkeypatch.setattr(Learner, "update", until(3))
    with pytest.raises(Killed):
        train(mixed("broken"))
    del seen[2:]  # step 3 ran after the checkpoint of step 2, so it runs again
    monkeypatch.setattr(Learner, "update", until(-1))
    train(mixed("broken"))
    assert len(whole) == len(seen) == 6 and all(torch.equal(a, b) for a, b in zip(whole, seen))
    assert metrics(mixed("whole").run_dir) == metrics(mixed("broken").run_dir)


def test_another_mixture_does_not_go_on(mixed, shards, books) -> None:
    config = mixed(steps=2)
    train(config)
    for parts in (
        [MixturePart(shards, 2), MixturePart(books)],
        [MixturePart(books), MixturePart(shards, 3)],
        [MixturePart(shards, 3)],
    ):
        with pytest.raises(UsageError) as raised:
            train(mixed(steps=4, parts=parts))
        before = f"({shards}: 3.0, {books}: 1.0)"
        assert str(raised.value).startswith(
            f"{config.run_dir}: holds a run with data.mixture {before}, not ({parts[0]}"
        )
        assert str(raised.value).endswith("; give another --run-dir") and "\n" not in str(raised.value)
    with pytest.raises(UsageError, match=r"holds a run with data.path None, not"):
        train(replace(config, steps=4, data=DataConfig(path=shards)))


def test_a_part_shorter_than_a_row_is_named(mixed, shards, tmp_path) -> None:
    (tmp_path / "short.txt").write_text("short")
    prepare([str(tmp_path / "short.txt")], tmp_path / "short", load_tokenizer("bytes"))
    with pytest.raises(UsageError) as raised:
        train(mixed(parts=(MixturePart(shards), MixturePart(tmp_path / "short"))))
    assert str(raised.value).startswith(f"{tmp_path / 'short'}: its train split has 6 tokens and one row needs 26")
