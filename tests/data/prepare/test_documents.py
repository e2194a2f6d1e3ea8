"""Formats: what is a document in each, what is skipped, and how damage is named."""

import gzip
import json
from pathlib import Path

import pytest

from headstart.data.lines import format_of
from headstart.data.prepare import units
from headstart.data.prepare.documents import Document, Skipped
from headstart.data.prepare.units import Selection, plan, read
from headstart.errors import UsageError

ROWS = [{"text": f"row {i} ÿ " + "x" * i, "n": i, "meta": {"note": f"note {i}"}} for i in range(200)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def contents(file, **selection):
    chosen = Selection(**selection)
    return [each for unit in plan([str(file)], chosen, Path("/nowhere")) for each in read(unit, chosen)]


def pairs(file, **selection):
    return [(each.name, each.text) for each in contents(file, **selection)]


def write(kind, folder):
    file = folder / f"rows.{kind}"
    if kind == "jsonl":
        file.write_bytes(LINES)
    elif kind.endswith(".gz"):  # of two members, with padding, as cat and tape drives make them
        file.write_bytes(gzip.compress(LINES[:1000]) + bytes(20) + gzip.compress(LINES[1000:]))
    elif kind.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        file.write_bytes(zstandard.compress(LINES[:1000]) + zstandard.compress(LINES[1000:]))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), file, row_group_size=30)
    return file


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json.gz", "jsonl.zst", "parquet"])
def test_every_format_gives_the_same_texts(tmp_path, monkeypatch, kind):
    file = write(kind, tmp_path)
    first = 0 if kind == "parquet" else 1
    expected = [(f"{file.name}:{i}", row["text"]) for i, row in enumerate(ROWS, start=first)]
    assert pairs(file) == expected
    assert [text for _, text in pairs(file, text_field="meta.note")] == [row["meta"]["note"] for row in ROWS]
    assert contents(file)[7].bytes == len(ROWS[7]["text"].encode())
    monkeypatch.setattr(units, "UNIT_BYTES", 1500)
    pieces = plan([str(file)], Selection(), tmp_path / "out")
    assert len(pieces) > 4 or kind.endswith(("gz", "zst"))
    assert sum(piece.size for piece in pieces) == pytest.approx(file.stat().st_size, abs=len(pieces))
    assert pairs(file) == expected


@pytest.mark.parametrize("unit_bytes", [1, 7, 40, 41, 42, 10**6])
@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n \n"])
def test_lines_are_cut_nowhere(tmp_path, monkeypatch, unit_bytes, end):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join(b'{"text": "%s"}' % (b"y" * i) for i in range(1, 30)) + end)
    monkeypatch.setattr(units, "UNIT_BYTES", unit_bytes)
    assert pairs(file) == [(f"a.jsonl:{i}", "y" * i) for i in range(1, 30)]


def test_names_decide_the_format():
    kinds = ["a.jsonl", "A.JSONL", "a.jsonl.gz", "a.json.gz", "a.json.zst", "a.parquet", "a.json", "a.gz", "jsonl"]
    assert [format_of(name) for name in kinds] == [
        *("jsonl", "jsonl", "jsonl.gz", "jsonl.gz", "jsonl.zst", "parquet", "text", "text", "text")
    ]


def test_a_folder_may_mix_formats(tmp_path):
    for kind in ("jsonl", "parquet"):
        write(kind, tmp_path)
    (tmp_path / "code.py").write_text("print()\n")
    found = pairs(tmp_path)
    assert found[0] == (f"{tmp_path.name}/code.py", "print()\n")
    assert len(found) == 1 + 2 * len(ROWS)


def test_rows_without_text_are_skipped(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": null}\n{"text": ""}\n\n{"text": "\\ud800"}\n{"text": "yes"}\n')
    assert [each.reason if isinstance(each, Skipped) else each.name for each in contents(file)] == [
        *("null", "empty", "not UTF-8 text", "a.jsonl:5")
    ]
    file.write_text('{"a": null}\n{"a": {"b": null}}\n{"a.b": "literal"}\n{"a": {"b": "inner"}}\n')
    found = contents(file, text_field="a.b")
    assert [each.text for each in found if isinstance(each, Document)] == ["literal", "inner"]


@pytest.mark.parametrize(
    ("line", "field", "expected"),
    [
        ('{"text": oops}', "text", "a.jsonl, line 3: not JSON"),
        ('{"text": "\udcff"}', "text", "a.jsonl, line 3: not JSON"),
        ("[1]", "text", "a.jsonl, line 3: not an object"),
        ("null", "text", "a.jsonl, line 3: not an object"),
        ('{"text": 5}', "text", 'a.jsonl, line 3: field "text" holds int, not text'),
        ('{"b": 1, "c": {"d": 2}}', "text", 'a.jsonl, line 3: no field "text".*: b, c.d$'),
        ('{"c": {"d": "x"}}', "c.e", 'a.jsonl, line 3: no field "c.e".*: c.d$'),
        ('{"c": "x"}', "c.e", 'a.jsonl, line 3: no field "c.e".*: c$'),
        ("{}", "text", "a.jsonl, line 3: no field .*it has none"),
        ("[" * 100_000, "text", "a.jsonl, line 3: n"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, field, expected):
    good = '{"text": "x", "c": {"e": "x"}}'
    (tmp_path / "a.jsonl").write_bytes(f"{good}\n\n{line}\n{good}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=expected) as raised:
        contents(tmp_path / "a.jsonl", text_field=field)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_damaged_compression_is_named(tmp_path, kind):
    file = write(kind, tmp_path)
    whole = file.read_bytes()
    for content, expected in [
        (whole[:-3], "cut short"),
        (whole[: len(whole) // 3], "cut short"),
        (LINES, "damaged from line 1 on"),
        (whole + b"rubbish behind it", "damaged from line"),
    ]:
        file.write_bytes(content)
        with pytest.raises(UsageError, match=f"{file.name}: damaged.*{expected}|{expected}") as raised:
            contents(file)
        assert file.name in str(raised.value) and "\n" not in str(raised.value)
    file.write_bytes(b"")
    assert contents(file) == []


def test_damaged_and_unfitting_parquet_is_named(tmp_path):
    file = write("parquet", tmp_path)
    for field, expected in [
        ("body", 'rows.parquet: no field "body".*: text, n, meta'),
        ("n", 'rows.parquet, row 0: field "n" holds int'),
        ("meta.x", 'row 0: no field "meta.x".*: meta.note'),
    ]:
        with pytest.raises(UsageError, match=expected):
            contents(file, text_field=field)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"rows\.parquet: not a whole Parquet file"):
        contents(file)
    file.write_bytes(b"PAR1" + b"\xa5" * 500 + whole[504:])
    with pytest.raises(UsageError, match=r"rows\.parquet: damaged from row 0 on"):
        contents(file)
