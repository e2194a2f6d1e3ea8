"""What becomes a document, in which order, and what is refused."""

import os

import pytest

from headstart.data.corpora import list_files, read_documents, read_files
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


def names(sources):
    return [document.name for document in read_documents(sources)]


def test_a_folder_gives_its_text_files_in_order(folder):
    lines = []
    documents = list(read_documents([str(folder)], lines.append))
    assert [(d.name, d.text) for d in documents] == [
        ("corpus/a/deep/c.py", "naïve ÿ\n"),
        ("corpus/a/x.md", "x"),
        ("corpus/b.txt", "bee\r\n"),
    ]
    assert len(lines) == 1
    assert "1 empty" in lines[0] and "2 not UTF-8 text" in lines[0]


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
        (folder / "latin.txt", "1 not UTF-8 text"),
        (folder / "empty.txt", "1 empty"),
        (f"{folder}/*.bin", "no document in it"),
    ]:
        with pytest.raises(UsageError, match=expected) as raised:
            names([str(folder / "b.txt"), str(source)])
        assert str(source) in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(UsageError, match="no source"):
        names([])


def test_a_missing_source_is_found_before_anything_is_read(folder, tmp_path):
    with pytest.raises(UsageError, match="missing"):
        read_documents([str(folder), str(tmp_path / "missing")])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_places_are_refused(folder):
    (folder / "b.txt").chmod(0)
    with pytest.raises(UsageError, match="cannot be read"):
        names([str(folder / "b.txt")])
    lines = []
    assert len(list(read_documents([str(folder)], lines.append))) == 2
    assert "1 unreadable" in lines[0]
    (folder / "a").chmod(0)
    try:
        with pytest.raises(UsageError, match="cannot be read"):
            names([str(folder)])
    finally:
        (folder / "a").chmod(0o755)


def test_a_file_that_vanishes_is_counted(folder):
    files = list_files([str(folder)])
    (folder / "b.txt").unlink()
    lines = []
    assert len(list(read_files(files, lines.append))) == 2
    assert "1 unreadable" in lines[0]


def test_the_standard_library_without_its_tests():
    files = list_files(["python-stdlib"])
    found = [file.name for file in files]
    assert 5e6 < sum(file.size for file in files) < 40e6
    assert "argparse.py" in found and "json/decoder.py" in found and "unittest/case.py" in found
    parts = {part for name in found for part in name.split("/")[:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert found == sorted(found, key=lambda name: name.split("/"))
    first = next(iter(read_documents(["python-stdlib"])))
    assert first.name == found[0] and first.text
