"""Vocabularies learnt from the sources: deterministic, learnt once, read alike by transformers."""

import json
import re

import pytest

from headstart.data.prepare import bpe
from headstart.data.prepare.bpe import NewBpe
from headstart.data.prepare.pipeline import Preparation, prepare
from headstart.data.shards import TokenShards
from headstart.data.tokenizers import load_tokenizer
from headstart.errors import UsageError


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text(f"the cat number {i} sat on the mat, naïve 日本語\n" * 3, encoding="utf-8")
    return folder


def test_a_vocabulary_is_learnt_and_used(corpus, tmp_path):
    first = prepare([str(corpus)], tmp_path / "a", NewBpe(300))
    second = prepare([str(corpus)], tmp_path / "b", NewBpe(300))
    assert first == second and first["tokenizer"] == "bpe-300" and first["vocab_size"] == 300
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a/tokenizer" / name).read_bytes() == (tmp_path / "b/tokenizer" / name).read_bytes()
    tokenizer = load_tokenizer(tmp_path / "a" / "tokenizer")
    assert tokenizer.end_id == first["end_id"]
    shards = TokenShards.open(tmp_path / "a", "train")
    text = tokenizer.decode(shards.document(0).tolist())
    assert text == (corpus / "00.txt").read_text(encoding="utf-8")
    assert len(shards.document(0)) < len(text) / 2
    assert shards.document(0)[-1] == tokenizer.end_id
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "a", "b"}


def test_transformers_reads_it_alike(corpus, tmp_path):
    transformers = pytest.importorskip("transformers")
    prepare([str(corpus)], tmp_path / "out", NewBpe(300))
    ours = load_tokenizer(tmp_path / "out" / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert theirs.eos_token == "<|endoftext|>" and theirs.eos_token_id == ours.end_id
    for text in ("the cat", "  naïve\n\n日本語 🎉", "never seen <|endoftext|> before"):
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text)


def test_it_is_learnt_once(corpus, tmp_path, monkeypatch):
    import headstart.data.prepare.pipeline as preparation

    real = preparation.Encoder.encode
    monkeypatch.setattr(preparation.Encoder, "encode", lambda *args: 1 / 0)
    lines = []
    with pytest.raises(ZeroDivisionError):
        prepare([str(corpus)], tmp_path / "out", NewBpe(300), report=lines.append)
    monkeypatch.setattr(preparation.Encoder, "encode", real)
    monkeypatch.setattr(bpe, "train", lambda *args: 1 / 0)
    prepare([str(corpus)], tmp_path / "out", NewBpe(300), report=lines.append)
    assert "the vocabulary is learnt already" in lines
    with pytest.raises(ZeroDivisionError):  # another size is not there yet
        prepare([str(corpus)], tmp_path / "out", NewBpe(301))


def test_the_sample_is_bounded_and_spread(tmp_path, monkeypatch):
    from headstart.data.prepare.units import Selection, plan

    (tmp_path / "a.jsonl").write_text('{"text": "aaaaaaaaaa"}\n' * 100)
    (tmp_path / "b.jsonl").write_text('{"text": "bbbbbbbbbb"}\n' * 100)
    units = plan([str(tmp_path)], Selection(), tmp_path / "out")
    monkeypatch.setattr(bpe, "SAMPLE_BYTES", 100)
    assert list(bpe.sample(units, Selection())) == ["a" * 10] * 5 + ["b" * 10] * 5


def test_sizes_that_cannot_be(corpus, tmp_path):
    with pytest.raises(UsageError, match="ask for at least 257"):
        NewBpe(256)
    assert prepare([str(corpus)], tmp_path / "out", NewBpe(257))["vocab_size"] == 257
    lines = []
    manifest = prepare([str(corpus)], tmp_path / "out", NewBpe(5000), report=lines.append)
    assert manifest["vocab_size"] < 5000
    assert f"the text gives a vocabulary of {manifest['vocab_size']:,} tokens and no more" in lines


def test_text_that_spells_the_end_token_stays_text(corpus, tmp_path):
    """A corpus that a vocabulary is learnt from has no special tokens; with other tokenizers it may, and is counted."""
    text = "before <|endoftext|> behind"
    (corpus / "00.txt").write_text(text)
    prepare([str(corpus)], tmp_path / "own", NewBpe(300))
    shards = TokenShards.open(tmp_path / "own", "train")
    tokenizer = shards.tokenizer()
    ids = shards.document(0).tolist()
    assert tokenizer.end_id not in ids[:-1] and tokenizer.decode(ids) == text
    foreign = tmp_path / "foreign"
    tokenizer.save(foreign)
    config = json.loads((foreign / "tokenizer_config.json").read_text())
    del config["headstart_tokenizer"]
    (foreign / "tokenizer_config.json").write_text(json.dumps(config))
    said: list[str] = []
    prepare([str(corpus)], tmp_path / "as ids", load_tokenizer(foreign), report=said.append)
    assert tokenizer.end_id in TokenShards.open(tmp_path / "as ids", "train").document(0).tolist()[:-1]
    assert any(line.startswith("1 documents spell the end token") for line in said)
    prepare(
        [str(corpus)],
        tmp_path / "as text",
        load_tokenizer(foreign),
        Preparation(literal=True),
        report=lambda line: said.clear(),
    )
    assert TokenShards.open(tmp_path / "as text", "train").document(0).tolist() == ids


def test_long_words_are_learnt_from_in_pieces():
    text = "a " + "L" * 1000 + " b" + " " * 700 + "acgt" * 300 + "\n"
    pieces = list(bpe._cut([text, "short"]))
    assert "".join(pieces[:-1]) == text and pieces[-1] == "short"
    assert max(len(word) for piece in pieces for word in re.findall(r"\S+|\s+", piece)) == bpe.LONGEST_WORD
    assert list(bpe._cut(["x" * 256 + " y", ""])) == ["x" * 256 + " y", ""]
