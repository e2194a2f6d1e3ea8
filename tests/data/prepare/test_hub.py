"""Datasets of the datasets library, from folders: what lies on the hub is read by the same calls."""

import json

import pytest

from headstart.data.prepare import hub
from headstart.data.prepare.pipeline import Preparation, prepare
from headstart.data.prepare.units import Selection, hold_conversations
from headstart.data.shards import TokenShards
from headstart.data.tokenizers import ByteTokenizer
from headstart.errors import UsageError

datasets = pytest.importorskip("datasets")
ROWS = [{"text": f"row {i}", "n": i, "meta": {"note": f"note {i}"}} for i in range(50)]


@pytest.fixture
def saved(tmp_path):
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "disk")
    datasets.DatasetDict({"train": rows, "test": rows.select(range(7))}).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    for i in range(2):
        lines = [json.dumps(row) + "\n" for row in ROWS[i * 25 : i * 25 + 25]]
        (tmp_path / "files" / f"train-{i}.jsonl").write_text("".join(lines))
    hub.load_rows.cache_clear()
    return tmp_path


def documents(folder, split="train"):
    shards = TokenShards.open(folder, split)
    return [ByteTokenizer().decode(shards.document(i).tolist()) for i in range(len(shards.documents))]


@pytest.mark.parametrize("name", ["disk", "splits", "files"])
def test_datasets_give_their_rows(saved, monkeypatch, name):
    monkeypatch.setattr(hub, "ROWS", 20)
    calls = []
    prepare(
        [f"hf:{saved / name}"],
        saved / "out",
        ByteTokenizer(),
        Preparation(validation_fraction=0.2),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert sorted(documents(saved / "out") + documents(saved / "out", "validation")) == sorted(
        row["text"] for row in ROWS
    )
    assert calls[-1] == (50, None)
    names = json.loads((saved / "out" / "validation.names.json").read_text())
    expected = "files/train:0:" if name == "files" else f"{name}/train:"
    assert names[0].startswith(expected) and len(set(names)) == len(names)


def test_splits_and_fields(saved):
    prepare(
        [f"hf:{saved / 'splits'}"], saved / "a", ByteTokenizer(), Preparation(selection=Selection("meta.note", "test"))
    )
    assert sorted(documents(saved / "a") + documents(saved / "a", "validation")) == [f"note {i}" for i in range(7)]


@pytest.mark.parametrize(
    ("source", "selection", "expected"),
    [
        ("disk", Selection("body"), 'no field "body".*: text, n, meta'),
        ("disk", Selection("n"), 'row 0: field "n" holds int'),
        ("files", Selection("body"), 'no field "body"'),
        ("files", Selection(split="test"), "cannot be opened .*test"),
        ("files", Selection(hf_config="x"), "cannot be opened .*'x' not found"),
        ("splits", Selection(split="dev"), "has no split 'dev'.*: train, test"),
    ],
)
def test_what_is_not_there_is_told(saved, source, selection, expected):
    with pytest.raises(UsageError, match=expected) as raised:
        prepare([f"hf:{saved / source}"], saved / "out", ByteTokenizer(), Preparation(selection=selection))
    assert f"hf:{saved / source}" in str(raised.value) and "\n" not in str(raised.value)


def test_a_hub_that_cannot_be_reached_is_told(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'some/thing' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UsageError, match=r"hf:some/thing: cannot be opened .*reach") as raised:
        prepare(["hf:some/thing"], tmp_path / "out", ByteTokenizer())
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_stream_that_breaks_is_told(tmp_path, monkeypatch):
    def rows():
        yield ROWS[0]
        raise OSError("connection lost")

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream)
    with pytest.raises(UsageError, match=r"hf:some/other: stopped at row 0:1 .*connection lost"):
        prepare(["hf:some/other"], tmp_path / "out", ByteTokenizer())


def test_datasets_of_conversations_are_found(saved, monkeypatch):
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    rows = datasets.Dataset.from_list([{"messages": said, "n": 1}])
    rows.save_to_disk(saved / "messages")
    (saved / "list").mkdir()
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    (saved / "list" / "train.json").write_text(json.dumps([{"conversations": turns}] * 2))
    assert hub.load_rows(f"hf:{saved / 'list'}", "train", None).column_names is None
    for name in ("messages", "list"):
        assert hold_conversations([f"hf:{saved / 'disk'}", f"hf:{saved / name}"])
    assert not hold_conversations([f"hf:{saved / name}" for name in ("disk", "splits", "files")])
    rows.add_column("text", ["hi"]).save_to_disk(saved / "both")
    assert not hold_conversations([f"hf:{saved / 'both'}"])

    def broken():
        raise OSError("connection lost\nand more")
        yield

    stream = datasets.IterableDataset.from_generator(broken)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream)
    with pytest.raises(UsageError, match=r"hf:some/chats: has no first row .*connection lost") as raised:
        hold_conversations(["hf:some/chats"])
    assert "\n" not in str(raised.value)
