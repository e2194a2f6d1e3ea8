"""Files are written to a temporary name and renamed; a full disk is reported as such, whoever notices it."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from headstart import cli
from headstart.errors import UsageError
from headstart.fileio import appending, replacing_directory, replacing_file, write_text

Usage = namedtuple("Usage", "total used free")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), replacing_file(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with replacing_directory(path) as temporary:
        (temporary / "a").write_text("1")
    with pytest.raises(ZeroDivisionError), replacing_directory(path) as temporary:
        (temporary / "b").write_text("2")
        raise ZeroDivisionError
    assert [p.name for p in path.iterdir()] == ["a"]
    with replacing_directory(path) as temporary:
        (temporary / "b").write_text("2")
    assert [p.name for p in path.iterdir()] == ["b"] and [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 704 vs 598")]
)
def test_a_full_disk_is_told_in_one_line(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100, 100, 0))
    with pytest.raises(UsageError, match="disk is full") as told, replacing_directory(tmp_path / "folder"):
        raise error
    assert "\n" not in str(told.value) and not list(tmp_path.iterdir())
    assert told.value.status == 1  # not wrong use


@pytest.mark.parametrize(
    ("number", "status"),
    [(errno.ENOSPC, 1), (errno.EDQUOT, 1), (errno.EIO, 1), (errno.EACCES, 2), (errno.ENOTDIR, 2), (errno.EROFS, 2)],
)
def test_what_the_machine_lacks_is_a_failure_and_another_place_is_wrong_use(
    number: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def program(arguments: list[str]) -> None:
        """Write a file."""
        with replacing_file(tmp_path / "file"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr("sys.argv", ["headstart", "doctor"])
    with pytest.raises(SystemExit) as ended:
        cli.run_program(program)
    said = capsys.readouterr().err
    assert ended.value.code == status and said.startswith(f"headstart: {tmp_path}/file: ") and said.count("\n") == 1


def test_another_error_of_torchs_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), replacing_directory(tmp_path / "folder"):
        raise RuntimeError("shapes do not fit")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk without room")
def test_a_full_disk_names_the_file_that_grows():
    with (
        pytest.raises(UsageError, match=r"^/dev/full: the disk is") as error,
        appending(Path("/dev/full")) as file,
    ):
        file.write("x")
    assert error.value.status == 1
