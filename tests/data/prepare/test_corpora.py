"""Documents of corpora: their order, and files that are refused."""

import os
from pathlib import Path

import pytest

from headstart.data.prepare.corpora import list_files
from headstart.data.prepare.documents import Document
from headstart.data.prepare.units import Selection, plan, read
from headstart.errors import UsageError


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "corpus"
    files = {
        "b.txt": b"bee\r\n",
        "a/deep/c.py": "naïve ÿ\n".encode(),
        "a/x.md": b"x",
        "empty.txt": b"",
        "latin.txt": b"na\xefve",
        "nul.bin": b"a\0b",
        ".hidden/h.txt": b"hidden",
        ".git/config": b"git",
        ".env": b"secret",
        "__pycache__/p.txt": b"cache",
        "a/node_modules/n.js": b"module",
    }
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def contents(sources):
    return [each for unit in plan(sources, Selection(), Path("/nowhere")) for each in read(unit, Selection())]


def names(sources):
    return [each.name for each in contents(sources) if isinstance(each, Document)]


def reasons(sources):
    return sorted(each.reason for each in contents(sources) if not isinstance(each, Document))


def test_a_folder_gives_its_text_files_in_order(folder):
    found = [each for each in contents([str(folder)]) if isinstance(each, Document)]
    assert [(each.name, each.text, each.bytes) for each in found] == [
        ("corpus/a/deep/c.py", "naïve ÿ\n", 10),
        ("corpus/a/x.md", "x", 1),
        ("corpus/b.txt", "bee\r\n", 5),
    ]
    assert reasons([str(folder)]) == ["empty", "not UTF-8 text", "not UTF-8 text"]


def test_files_and_globs(folder, monkeypatch):
    assert names([str(folder / "b.txt")]) == ["b.txt"]
    assert names([f"{folder}/**/*.[pm][yd]"]) == ["corpus/a/deep/c.py", "corpus/a/x.md"]
    assert names([f"{folder}/**/*.txt"]) == ["corpus/b.txt"]
    monkeypatch.chdir(folder)
    assert names(["*.txt"]) == ["corpus/b.txt"]
    assert names(["."]) == ["corpus/a/deep/c.py", "corpus/a/x.md", "corpus/b.txt"]


def test_a_file_named_twice_is_read_once(folder):
    (folder / "link.txt").symlink_to(folder / "b.txt")
    every = names([str(folder)])
    assert every.count("corpus/b.txt") + every.count("corpus/link.txt") == 1
    assert names([str(folder), str(folder / "b.txt"), f"{folder}/**/*.py"]) == every


def test_pipes_and_loops_do_not_hang(folder):
    os.mkfifo(folder / "pipe")
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "broken").symlink_to(folder / "nowhere")
    assert len(names([str(folder)])) == 3
    with pytest.raises(UsageError, match="neither a file nor a folder"):
        names([str(folder / "pipe")])


def test_sources_without_a_document_are_refused(folder, tmp_path):
    (tmp_path / "void").mkdir()
    for source, expected in [
        (tmp_path / "missing", "no such file or folder"),
        (tmp_path / "void", "holds no readable file"),
        (f"{folder}/*.none", "holds no readable file"),
    ]:
        with pytest.raises(UsageError, match=expected) as raised:
            names([str(folder / "b.txt"), str(source)])
        assert str(source) in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(UsageError, match="no source"):
        names([])


def test_a_missing_source_is_found_before_anything_is_read(folder, tmp_path):
    with pytest.raises(UsageError, match="missing"):
        plan([str(folder), str(tmp_path / "missing")], Selection(), tmp_path / "out")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_places_are_refused(folder):
    (folder / "b.txt").chmod(0)
    with pytest.raises(UsageError, match="cannot be read"):
        names([str(folder / "b.txt")])
    assert len(names([str(folder)])) == 2 and "unreadable" in reasons([str(folder)])
    (folder / "a").chmod(0)
    try:
        with pytest.raises(UsageError, match="cannot be read"):
            names([str(folder)])
    finally:
        (folder / "a").chmod(0o755)


def test_a_file_that_vanishes_is_counted(folder):
    units = plan([str(folder)], Selection(), folder / "out")
    (folder / "b.txt").unlink()
    found = [each for unit in units for each in read(unit, Selection())]
    assert sum(isinstance(each, Document) for each in found) == 2
    assert "unreadable" in [each.reason for each in found if not isinstance(each, Document)]


def test_the_standard_library_without_its_tests():
    files = list_files(["python-stdlib"])
    found = [file.name for file in files]
    assert 5e6 < sum(file.size for file in files) < 40e6
    assert "argparse.py" in found and "json/decoder.py" in found and "unittest/case.py" in found
    parts = {part for name in found for part in name.split("/")[:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert found == sorted(found, key=lambda name: name.split("/"))
