"""Shards: what prepare writes, what opens, and what must not."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from headstart.data.batches import evaluation_batches
from headstart.data.manifest import manifest_text
from headstart.data.prepare import write
from headstart.data.prepare.pipeline import Preparation, prepare
from headstart.data.shards import SplitTokens, TokenShards, verify
from headstart.data.tokenizers import ByteTokenizer, load_tokenizer
from headstart.errors import UsageError


def write_corpus(root, count=40):
    root.mkdir()
    for index in range(count):
        (root / f"{index:03d}.txt").write_text(f"document {index} ÿ " + "x" * index, encoding="utf-8")
    return root


def documents_of(shards):
    tokenizer = ByteTokenizer()
    for i in range(len(shards.documents)):
        tokens = shards.document(i)
        assert tokens[-1] == tokenizer.end_id and tokenizer.end_id not in tokens[:-1]
    return [tokenizer.decode(shards.document(i).tolist()) for i in range(len(shards.documents))]


@pytest.fixture
def prepared(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    prepare([str(corpus)], tmp_path / "out", ByteTokenizer(), Preparation(validation_fraction=0.2))
    return tmp_path / "out"


def test_every_document_lands_in_exactly_one_split(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    calls = []
    manifest = prepare(
        [str(corpus)],
        tmp_path / "out",
        ByteTokenizer(),
        Preparation(validation_fraction=0.2),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    train, validation = (TokenShards.open(tmp_path / "out", split) for split in ("train", "validation"))
    documents = [path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())]
    assert sorted(documents_of(train) + documents_of(validation)) == sorted(documents)
    assert 2 <= len(validation.documents) <= 16
    names = json.loads((tmp_path / "out" / "validation.names.json").read_text())
    assert [(corpus.parent / name).read_text(encoding="utf-8") for name in names] == documents_of(validation)

    for shards in (train, validation):
        summary = manifest["splits"][shards.split]
        size = sum(len(text.encode()) for text in documents_of(shards))
        assert summary["bytes"] == size and summary["tokens"] == len(shards.tokens) == size + len(shards.documents)
        assert shards.bytes_per_token == size / len(shards.tokens)
        shards.verify()
    total = sum(len(text.encode()) for text in documents)
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert isinstance(load_tokenizer(tmp_path / "out" / "tokenizer"), ByteTokenizer)


def test_the_split_of_a_document_depends_on_seed_and_content_alone(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")

    def held_out(name, *sources, seed=0):
        prepare(list(sources), tmp_path / name, ByteTokenizer(), Preparation(validation_fraction=0.3, seed=seed))
        return set(json.loads((tmp_path / name / "validation.names.json").read_text()))

    every = held_out("a", str(corpus))
    assert every == held_out("b", f"{corpus}/*[5-9].txt", f"{corpus}/*[0-4].txt")
    odd = {name for name in every if int(name[-5]) % 2}
    assert odd == held_out("c", f"{corpus}/*[13579].txt")
    assert every != held_out("d", str(corpus), seed=1)
    first = (tmp_path / "a" / "train-00000.bin").read_bytes()
    held_out("a", str(corpus))  # over the older folder
    assert (tmp_path / "a" / "train-00000.bin").read_bytes() == first


def test_verify_covers_every_file(prepared):
    """Any bit that flips, and any file that goes, is named."""
    assert verify(prepared) == []
    for file in sorted(path for path in prepared.rglob("*") if path.is_file()):
        content = file.read_bytes()
        for at in range(0, len(content), max(1, len(content) // 8)):
            file.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
            try:
                found = verify(prepared)
            except UsageError as error:  # a manifest that cannot be read
                found = [str(error)]
            assert found and str(file) in found[0], (file, at)
        file.unlink()
        with suppress(UsageError):
            assert str(file) in verify(prepared)[0]
        file.write_bytes(content)
    written = (prepared / "manifest.json").read_text()
    for other in (written[:-1], written + "\n", written.replace(": ", ":")):  # the same content
        (prepared / "manifest.json").write_text(other)
        assert "manifest.json: its content is not what prepare wrote" in verify(prepared)[0]
    manifest = json.loads(written)
    for change in (
        {"end_id": 32},
        {"sha256": None},
        {"splits": {**manifest["splits"], "train": manifest["splits"]["validation"]}},
    ):
        (prepared / "manifest.json").write_text(manifest_text({**manifest, **change}))
        assert "manifest.json: its content is not what prepare wrote" in verify(prepared)[0]


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
@pytest.mark.parametrize("count", [2, 5])
def test_small_corpora_have_both_splits(tmp_path, fraction, count):
    corpus = write_corpus(tmp_path / "corpus", count)
    prepare([str(corpus)], tmp_path / "out", ByteTokenizer(), Preparation(validation_fraction=fraction))
    train, validation = (TokenShards.open(tmp_path / "out", split) for split in ("train", "validation"))
    few = validation if fraction < 0.5 else train
    assert len(few.documents) == 1
    documents = [path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())]
    assert sorted(documents_of(train) + documents_of(validation)) == documents
    for shards in (train, validation):
        shards.verify()
    names = json.loads((tmp_path / "out" / "validation.names.json").read_text())
    assert [(corpus.parent / name).read_text(encoding="utf-8") for name in names] == documents_of(validation)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(f"{split}{end}" for split in ("train", "validation") for end in ("-00000.bin", ".documents.npy")),
        "validation.names.json",
        "tokenizer",
        "manifest.json",
    }


@pytest.mark.parametrize("fraction", [0.0, 0.999999])
def test_one_document_is_for_training(tmp_path, fraction):
    corpus = write_corpus(tmp_path / "corpus", 1)
    prepare([str(corpus)], tmp_path / "out", ByteTokenizer(), Preparation(validation_fraction=fraction))
    assert len(TokenShards.open(tmp_path / "out", "train").documents) == 1
    with pytest.raises(UsageError, match="validation split is empty"):
        TokenShards.open(tmp_path / "out", "validation")


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")],
)
def test_the_dtype_holds_the_vocabulary(tmp_path, vocab_size, dtype):
    class Shifted(ByteTokenizer):
        def encode(self, text):
            return [vocab_size - 256 + token for token in super().encode(text)]

        def save(self, directory):
            directory.mkdir(exist_ok=True)

    tokenizer = Shifted()
    tokenizer.vocab_size, tokenizer.end_id = vocab_size, vocab_size - 1
    corpus = write_corpus(tmp_path / "corpus", 3)
    manifest = prepare([str(corpus)], tmp_path / "out", tokenizer, Preparation(validation_fraction=0))
    shards = TokenShards.open(tmp_path / "out", "train")
    assert manifest["dtype"] == dtype == shards.tokens.dtype.name
    assert isinstance(shards.tokens.base, np.memmap)
    expected = tokenizer.encode((corpus / "001.txt").read_text(encoding="utf-8"))
    assert shards.document(1).tolist() == [*expected, vocab_size - 1]


def cut(folder):
    os.truncate(folder / "train-00000.bin", (folder / "train-00000.bin").stat().st_size - 1)


def edit(change):
    def do(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return do


DAMAGES = {
    "truncated": (cut, "where the manifest says"),
    "no bin": (lambda folder: (folder / "train-00000.bin").unlink(), "train-00000.bin: missing"),
    "no starts": (lambda folder: (folder / "train.documents.npy").unlink(), "missing or damaged"),
    "cut starts": (lambda folder: os.truncate(folder / "train.documents.npy", 100), "missing or damaged"),
    "wrong starts": (lambda folder: np.save(folder / "train.documents.npy", np.arange(3)), "does not fit"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "holds no manifest.json"),
    "cut manifest": (lambda folder: os.truncate(folder / "manifest.json", 50), "not JSON"),
    "foreign manifest": (edit(lambda manifest: manifest.pop("format")), "not a manifest"),
    "later version": (edit(lambda manifest: manifest.update(version=99)), "has version 99"),
    "no dtype": (edit(lambda manifest: manifest.pop("dtype")), "damaged"),
    "no shards": (edit(lambda manifest: manifest["splits"]["train"].pop("shards")), "no usable 'shards'"),
    "too few shards": (edit(lambda manifest: manifest["splits"]["train"].update(shards=[])), "no usable shards"),
    "a shard elsewhere": (
        edit(lambda manifest: manifest["splits"]["train"]["starts"].update(file="../x")),
        "no usable shards",
    ),
    "no split": (edit(lambda manifest: manifest["splits"].pop("train")), 'no split "train"'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_do_not_open(prepared, damage):
    spoil, expected = DAMAGES[damage]
    TokenShards.open(prepared, "train")
    spoil(prepared)
    with pytest.raises(UsageError, match=expected) as raised:
        TokenShards.open(prepared, "train")
    assert str(prepared) in str(raised.value) and "\n" not in str(raised.value)


def test_missing_folders_splits_and_documents(prepared, tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        TokenShards.open(tmp_path / "missing", "train")
    with pytest.raises(UsageError, match='no split "test"'):
        TokenShards.open(prepared, "test")
    shards = TokenShards.open(prepared, "train")
    for index in (-1, len(shards.documents)):
        with pytest.raises(UsageError, match=f"document {index}"):
            shards.document(index)


def spoil(file):
    with file.open("r+b") as content:
        content.seek(5)
        byte = content.read(1)
        content.seek(5)
        content.write(bytes([byte[0] ^ 1]))


def test_verify_names_the_damaged_files(prepared):
    assert verify(prepared) == []
    spoil(prepared / "train-00000.bin")
    with pytest.raises(UsageError, match=r"train-00000\.bin: its content is not what prepare wrote"):
        TokenShards.open(prepared, "train").verify()
    TokenShards.open(prepared, "validation").verify()
    np.save(prepared / "validation.documents.npy", np.load(prepared / "validation.documents.npy") * 2)
    (prepared / "validation-00000.bin").unlink()
    assert [line.split(":")[0].split("/")[-1] for line in verify(prepared)] == [
        "train-00000.bin",
        "validation-00000.bin",
        "validation.documents.npy",
    ]


@pytest.fixture
def split(tmp_path, monkeypatch):
    """Shards of 100 tokens, and the same corpus in one shard."""
    corpus = write_corpus(tmp_path / "corpus")
    whole = prepare([str(corpus)], tmp_path / "whole", ByteTokenizer(), Preparation(validation_fraction=0.2))
    monkeypatch.setattr(write, "SHARD_BYTES", 100)
    manifest = prepare([str(corpus)], tmp_path / "split", ByteTokenizer(), Preparation(validation_fraction=0.2))
    for name, content in manifest["splits"].items():
        assert [shard["tokens"] for shard in content["shards"][:-1]] == [100] * (len(content["shards"]) - 1)
        assert {**content, "shards": None} == {**whole["splits"][name], "shards": None}
    return tmp_path / "split", tmp_path / "whole"


def test_several_shards_are_one_sequence(split):
    several, one = (TokenShards.open(folder, "train") for folder in split)
    assert isinstance(several.tokens, SplitTokens) and isinstance(one.tokens, np.ndarray)
    assert len(several.tokens) == len(one.tokens) > 500 and several.tokens.dtype == one.tokens.dtype
    several.verify()
    for begin in (0, 1, 99, 100, 101, 250, len(one.tokens) - 1, len(one.tokens)):
        for width in (0, 1, 99, 100, 101, 230, 10**6):
            piece = several.tokens[begin : begin + width]
            assert piece.dtype == one.tokens.dtype and piece.tolist() == one.tokens[begin : begin + width].tolist()
    assert several.tokens[-5:].tolist() == one.tokens[-5:].tolist()
    assert documents_of(several) == documents_of(one)
    with pytest.raises(ValueError, match="step"):
        several.tokens[::2]


def test_rows_cross_from_one_shard_to_the_next(split):
    several, one = (
        list(evaluation_batches(TokenShards.open(folder, "train"), rows=3, length=64, heads=4, limit_rows=None))
        for folder in split
    )
    assert len(several) == len(one) > 3
    for ours, theirs in zip(several, one):
        assert ours.tokens.equal(theirs.tokens) and ours.targets.equal(theirs.targets)
        assert ours.documents.equal(theirs.documents)


def test_a_missing_shard_is_named(split):
    (split[0] / "train-00002.bin").rename(split[0] / "elsewhere")
    with pytest.raises(UsageError, match=r"train-00002\.bin: missing"):
        TokenShards.open(split[0], "train")
    (split[0] / "elsewhere").rename(split[0] / "train-00002.bin")
    spoil(split[0] / "train-00003.bin")
    with pytest.raises(UsageError, match=r"train-00003\.bin: its content"):
        TokenShards.open(split[0], "train").verify()


def test_a_folder_of_version_1_still_opens(tmp_path):
    text = b"one\xfftwo and three\xff"
    (tmp_path / "train.bin").write_bytes(text)
    (tmp_path / "validation.bin").write_bytes(b"")
    np.save(tmp_path / "train.documents.npy", np.array([0, 4]))
    np.save(tmp_path / "validation.documents.npy", np.array([], dtype=np.int64))
    empty = {"tokens": 0, "documents": 0, "bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    manifest = {
        **{"format": "headstart-shards", "version": 1, "tokenizer": "bytes", "vocab_size": 256, "end_id": 255},
        **{"dtype": "uint8", "sources": ["x"], "seed": 0, "validation_fraction": 0.0},
        "splits": {
            "train": {"tokens": 18, "documents": 2, "bytes": 16, "sha256": hashlib.sha256(text).hexdigest()},
            "validation": empty,
        },
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    shards = TokenShards.open(tmp_path, "train")
    shards.verify()
    assert verify(tmp_path) == []
    assert documents_of(shards) == ["one", "two and three"]
    with pytest.raises(UsageError, match="validation split is empty"):
        TokenShards.open(tmp_path, "validation")
    spoil(tmp_path / "train.bin")
    with pytest.raises(UsageError, match=r"train\.bin: its content"):
        shards.verify()


class Killed(BaseException):
    pass


class FailingTokenizer(ByteTokenizer):
    def encode(self, text):
        if "document 7" in text:
            raise Killed
        return super().encode(text)


def test_a_prepare_that_dies_leaves_nothing(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    with pytest.raises(Killed):
        prepare([str(corpus)], tmp_path / "out", FailingTokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_prepare_that_dies_leaves_the_older_one(prepared, tmp_path):
    before = (prepared / "manifest.json").read_bytes()
    with pytest.raises(Killed):
        prepare([str(tmp_path / "corpus")], prepared, FailingTokenizer())
    assert (prepared / "manifest.json").read_bytes() == before
    TokenShards.open(prepared, "train").verify()


def test_foreign_folders_are_not_replaced(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", 3)
    for target in (corpus, corpus / "001.txt"):
        with pytest.raises(UsageError, match="a new folder"):
            prepare([str(corpus)], target, ByteTokenizer())
    assert len(list(corpus.iterdir())) == 3
    (tmp_path / "empty").mkdir()
    prepare([str(corpus)], tmp_path / "empty", ByteTokenizer())


def test_output_below_the_source_is_not_read_again(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", 3)
    first = prepare([str(corpus)], corpus / "shards", ByteTokenizer())
    assert prepare([str(corpus)], corpus / "shards", ByteTokenizer()) == first


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_impossible_fractions_are_refused(tmp_path, fraction):
    with pytest.raises(UsageError, match="validation_fraction"):
        prepare(["python-stdlib"], tmp_path / "out", ByteTokenizer(), Preparation(validation_fraction=fraction))


def test_a_source_of_bytes_that_are_not_text_is_refused(tmp_path):
    (tmp_path / "noise").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(UsageError, match="not UTF-8 text"):
        prepare([str(tmp_path / "noise")], tmp_path / "out", ByteTokenizer())
    assert not (tmp_path / "out").exists()


def test_real_text_round_trips(tmp_path):
    file = Path(__file__).parents[2] / "../shared/data/tinyshakespeare/input.txt"
    if not file.is_file():
        pytest.skip("no shared data next to the checkout")
    prepare([str(file)], tmp_path / "out", ByteTokenizer())
    assert documents_of(TokenShards.open(tmp_path / "out", "train")) == [file.read_bytes().decode()]


@pytest.mark.parametrize("start", [10**17, -1])
def test_a_start_in_the_middle_that_lies_nowhere_is_refused(prepared, start):
    file = prepared / "train.documents.npy"
    starts = np.load(file)
    starts[3] = start
    np.save(file, starts)
    shards = TokenShards.open(prepared, "train")
    for index in (2, 3):
        with pytest.raises(UsageError, match=f"train.documents.npy: damaged at document {index}; copy it again"):
            shards.document(index)
    assert len(shards.document(1))
