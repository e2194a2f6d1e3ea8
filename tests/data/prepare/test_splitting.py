"""Copies: equal documents share a split, near duplicates are counted, and both can be left out."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from headstart.data.prepare.duplicates import keys_of, near_copies
from headstart.data.prepare.pipeline import Preparation, prepare
from headstart.data.prepare.units import Selection
from headstart.data.shards import TokenShards
from headstart.data.tokenizers import ByteTokenizer
from headstart.errors import UsageError


def words(seed: int, count: int = 120) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices("abcdefgh", k=5)) for _ in range(count)]


def write(folder: Path, documents: list[str]) -> Path:
    folder.mkdir()
    for index, text in enumerate(documents):
        (folder / f"{index:03d}.txt").write_text(text, encoding="utf-8")
    return folder


def texts_of(folder: Path, split: str) -> list[str]:
    try:
        shards = TokenShards.open(folder, split)
    except UsageError:
        return []
    return [ByteTokenizer().decode(shards.document(i).tolist()) for i in range(len(shards.documents))]


def test_equal_documents_share_a_side_and_are_counted(tmp_path):
    documents = [" ".join(words(seed)) for seed in range(20)]
    said: list[str] = []
    corpus = write(tmp_path / "corpus", documents + documents[:15])
    settings = Preparation(validation_fraction=0.4)
    manifest = prepare([str(corpus)], tmp_path / "out", ByteTokenizer(), settings, report=said.append)
    train, validation = texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "validation")
    assert not set(train) & set(validation) and sorted(train + validation) == sorted(documents + documents[:15])
    assert len(set(validation)) < len(validation)  # a copy on this side too: the test would see one that crossed
    assert manifest["duplicates"] == {"exact": 15, "near": 0, "near_held_out": 0, "left_out": 0}
    assert said[-1] == "15 exact and 0 near duplicates (--deduplicate leaves them out)"
    names = json.loads((tmp_path / "out" / "validation.names.json").read_text())
    assert [(tmp_path / name).read_text() for name in names] == validation
    whole = prepare([str(corpus)], tmp_path / "once", ByteTokenizer(), replace(settings, deduplicate=True))
    assert texts_of(tmp_path / "once", "train") == list(dict.fromkeys(train))
    assert texts_of(tmp_path / "once", "validation") == list(dict.fromkeys(validation))
    assert whole["duplicates"]["left_out"] == 15 and whole["deduplicated"]


def test_near_duplicates_are_counted_and_left_out_on_the_side_of_training(tmp_path):
    def changed(seed: int) -> list[str]:
        text = words(seed, 400)
        text[200] = "other"
        return text

    documents = [" ".join(words(seed, 400)) for seed in range(12)] + [" ".join(changed(seed)) for seed in range(6)]
    corpus = write(tmp_path / "corpus", documents)
    arguments = ([str(corpus)], tmp_path / "out", ByteTokenizer())
    counts = prepare(*arguments, Preparation(validation_fraction=0.4))["duplicates"]
    held_out = set(texts_of(tmp_path / "out", "validation"))
    crossing = [i for i in range(6) if (documents[i] in held_out) != (documents[12 + i] in held_out)]
    assert counts == {"exact": 0, "near": 6, "near_held_out": len(crossing), "left_out": 0} and crossing
    counts = prepare(*arguments, Preparation(validation_fraction=0.4, deduplicate=True))["duplicates"]
    kept = texts_of(tmp_path / "out", "train") + texts_of(tmp_path / "out", "validation")
    assert counts["left_out"] == 6 and len(kept) == 12
    assert all((documents[i] in held_out) == (documents[i] in kept) for i in crossing)  # training loses its half


def test_copies_of_held_out_sources_are_left_out_of_training(tmp_path):
    documents = [" ".join(words(seed)) for seed in range(6)]
    corpus, held_out = write(tmp_path / "corpus", documents), write(tmp_path / "held out", documents[4:])
    settings = Preparation(validation_fraction=0, validation_sources=(str(held_out),))
    said: list[str] = []
    prepare([str(corpus)], tmp_path / "out", ByteTokenizer(), settings, report=said.append)
    assert texts_of(tmp_path / "out", "train") == documents[:4]
    assert texts_of(tmp_path / "out", "validation") == documents[4:]
    assert "2 documents for training equal one for validation and are left out" in said
    with pytest.raises(UsageError, match="every document for training equals one for validation"):
        prepare([f"{corpus}/00[45].txt"], tmp_path / "none", ByteTokenizer(), settings)


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_small_corpora_of_copies_have_them_on_one_side(tmp_path, fraction):
    write(tmp_path / "same", ["one text"] * 3)
    prepare([str(tmp_path / "same")], tmp_path / "a", ByteTokenizer(), Preparation(validation_fraction=fraction))
    assert texts_of(tmp_path / "a", "train") == ["one text"] * 3 and not texts_of(tmp_path / "a", "validation")
    write(tmp_path / "two", ["one text", "another", "one text"])
    prepare([str(tmp_path / "two")], tmp_path / "b", ByteTokenizer(), Preparation(validation_fraction=fraction))
    sides = [texts_of(tmp_path / "b", split) for split in ("train", "validation")]
    assert sorted(sides) == [["another"], ["one text", "one text"]]


def test_documents_of_one_conversation_or_problem_are_no_copies(tmp_path):
    problem = " ".join(words(1, 300))
    programs = {"language": [3, 3, 3], "solution": ["print(1)", "print(2)", "print(1)"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"description": problem, "solutions": programs}) + "\n")
    manifest = prepare(
        [str(tmp_path / "rows.jsonl")],
        tmp_path / "out",
        ByteTokenizer(),
        Preparation(selection=Selection(rewards=True)),
    )
    assert manifest["duplicates"] == {"exact": 1, "near": 0, "near_held_out": 0, "left_out": 0}


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.004, 28, 30), (0.5, 0, 3)])
def test_keys_find_pairs_that_share_nearly_all_and_no_others(share, least, most):
    """Make 30 pairs: unrelated, with one word in 250 changed, and with half of the words changed."""
    found = 0
    for seed in range(30):
        one, other = words(seed, 500), words(1000 + seed, 500)
        if share:
            other = [new if i % round(1 / share) == 0 else old for i, (old, new) in enumerate(zip(one, other))]
        keys = np.stack([keys_of(" ".join(each).encode()) for each in (one, other)])
        found += bool(near_copies(keys)[1])
    assert least <= found <= most


def test_keys_do_not_depend_on_blocks(monkeypatch):
    content = " ".join(words(5, 3000)).encode()
    whole = keys_of(content)
    monkeypatch.setattr("headstart.data.prepare.duplicates.BLOCK", 1000)
    assert np.array_equal(keys_of(content), whole) and whole.all()
    assert not keys_of(b"short").any() and not keys_of(b"x" * 10_000).any()  # compared for equality alone
