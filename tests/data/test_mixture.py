"""Turns against the exact shares at every row; what may be mixed, and under which names."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.data.mixture import MixturePart, Turns, open_sources
from headstart.data.prepare.pipeline import Preparation, prepare
from headstart.data.tokenizers import ByteTokenizer
from headstart.errors import UsageError

WEIGHTS = st.lists(
    st.integers(1, 60) | st.floats(1e-3, 1e3) | st.sampled_from([0.1, 0.7, 1e-6]), min_size=1, max_size=7
)


@settings(deadline=None)  # the machine may be busy
@given(weights=WEIGHTS, count=st.integers(1, 300))
def test_every_part_has_its_share_to_less_than_one_row_at_every_row(weights, count):
    exact = [Fraction(repr(float(weight))) for weight in weights]
    given_rows = [0] * len(weights)
    turns = Turns(weights)
    for row, part in enumerate(turns.take(given_rows, count), start=1):
        given_rows[part] += 1
        assert all(abs(rows - row * share / sum(exact)) < 1 for rows, share in zip(given_rows, exact))
        assert turns.fits(given_rows)


def test_many_small_parts_beside_large_ones_keep_to_their_shares():
    # Taking the part with the largest deficit would leave one of these 1.2 rows from its share.
    weights = [30, 30] + [1] * 40
    turns, rows = Turns(weights), [0] * 42
    for row, part in enumerate(turns.take(rows, 1000), start=1):
        rows[part] += 1
        assert all(abs(got - row * weight / 100) < 1 for got, weight in zip(rows, weights))


def test_turns_come_evenly_and_follow_from_the_counts_alone():
    assert Turns([9, 1]).take([0, 0], 20) == ([0] * 9 + [1]) * 2
    assert Turns([0.9, 0.1]).take([0, 0], 1000) == Turns([9, 1]).take([0, 0], 1000) == Turns([18, 2]).take([0, 0], 1000)
    assert Turns([1, 1, 1]).take([0, 0, 0], 6) == [0, 1, 2, 0, 1, 2]
    turns, weights = Turns([0.7, 0.2, 0.1]), 3
    whole = turns.take([0] * weights, 200)
    for cut in range(200):
        assert turns.take([whole[:cut].count(part) for part in range(weights)], 200 - cut) == whole[cut:]
    # As quick far out as at the start, and as exact.
    far = [7 * 10**17, 2 * 10**17, 10**17]
    assert turns.take(far, 200) == whole


def test_counts_that_the_weights_cannot_give_do_not_fit():
    turns = Turns([9, 1])
    for given_rows in ([0, 0], [5, 0], [9, 1], [900, 100]):
        assert turns.fits(given_rows)
    for given_rows in ([10, 0], [0, 2], [50, 50], [900, 102], [-1, 0], [9], [9, 1, 0]):
        assert not turns.fits(given_rows), given_rows


@pytest.mark.parametrize("weight", [0, -1, -0.0, math.nan, math.inf, -math.inf])
def test_a_weight_that_is_none_is_refused_by_name(weight):
    with pytest.raises(
        UsageError, match=r"data.mixture: data/a has weight .*; it must be a finite number above 0"
    ) as e:
        MixturePart(Path("data/a"), weight)
    assert "\n" not in str(e.value)


@pytest.fixture
def folder(tmp_path):
    def make(name: str, documents: int = 3, tokenizer=None, **options) -> Path:
        folder = tmp_path / "files" / name
        folder.mkdir(parents=True)
        for i in range(documents):
            (folder / f"{i}.txt").write_text(f"{name} {i} " * 20)
        prepare(
            [str(folder)],
            tmp_path / name,
            tokenizer or ByteTokenizer(),
            Preparation(**{"validation_fraction": 0.3, **options}),
        )
        return tmp_path / name

    return make


def opened(*paths):
    return open_sources([MixturePart(path) for path in paths])


def refusal(*paths) -> str:
    with pytest.raises(UsageError) as error:
        opened(*paths)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_sources_bear_the_names_of_their_folders(folder, tmp_path):
    a, b = folder("stories"), folder("books", validation_fraction=0)
    first, second = open_sources([MixturePart(a, 9), MixturePart(b)])
    assert (first.name, first.weight, second.name, second.weight) == ("stories", 9, "books", 1.0)
    assert first.train.directory == a and first.validation.split == "validation" and second.validation is None
    c = folder("deep/stories")
    assert [source.name for source in opened(a, b, c)] == [
        f"{tmp_path.name}-stories",
        f"{tmp_path.name}-books",
        "deep-stories",
    ]


def test_a_folder_named_twice_is_refused(folder, monkeypatch):
    a = folder("a")
    monkeypatch.chdir(a.parent)
    for again in (a, Path("a"), Path("../" + a.parent.name + "/a")):
        assert "name a folder twice; name it once" in refusal(a, again)


def test_a_folder_that_is_none_is_refused(folder, tmp_path):
    a = folder("a")
    (tmp_path / "plain").mkdir()
    assert refusal(a, tmp_path / "gone").startswith(f"{tmp_path / 'gone'}: no such folder")
    assert refusal(a, tmp_path / "plain").startswith(f"{tmp_path / 'plain'}: holds no manifest.json")


def test_parts_of_different_tokenizers_are_refused(folder):
    a, b = folder("a"), folder("b")
    assert len(opened(a, b)) == 2
    both = f"{a} and {b}: cannot be mixed, their "
    manifest = b / "manifest.json"
    content = json.loads(manifest.read_text())
    for key, value, what in (
        ("vocab_size", 300, "vocabulary sizes are 256 and 300"),
        ("end_id", 7, "end tokens are 255 and 7"),
    ):
        manifest.write_text(json.dumps(content | {key: value}))
        assert refusal(a, b).startswith(both + what)
    # The name is that of the folder the tokenizer was read from: it says nothing about the ids.
    manifest.write_text(json.dumps(content | {"tokenizer": "elsewhere"}))
    assert len(opened(a, b)) == 2
    file = b / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text() + "\n")
    assert refusal(a, b).startswith(both + "tokenizer.json differ (tokenizers 'bytes' and 'elsewhere')")
    file.unlink()
    assert refusal(a, b).startswith(f"{file}: cannot be read")
