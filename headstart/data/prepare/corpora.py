"""Find the files of sources: files, folders, globs and Python's own library, in a fixed order."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headstart.errors import UsageError

STDLIB = "python-stdlib"
STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "venv"}
SKIPPED_FOLDERS = {"__pycache__", "node_modules"}


@dataclass(frozen=True)
class SourceFile:
    """A file of a source, not read yet. `name` is relative to the source, so it is the same on every machine."""

    source: str
    name: str
    path: Path
    size: int  # bytes
    modified: int  # nanoseconds, of the machine's own clock


def list_files(sources: Sequence[str]) -> list[SourceFile]:
    """Return the files of `sources`, each real file once, in an order that depends on the names alone.

    A source is the name `python-stdlib` (the library sources of the running interpreter, without its tests), a file, a
    folder (all files in it, hidden ones skipped), or a glob (`**` matches folders). A source that is missing,
    unreadable or without a file raises UsageError.
    """
    files: list[SourceFile] = []
    seen: set[str] = set()
    for source in sources:
        found = _files_of(source)
        if not found:
            raise UsageError(f"{source}: holds no readable file; name a folder or a glob with text files in it")
        for file in found:
            real = os.path.realpath(file.path)
            if real not in seen:
                seen.add(real)
                files.append(file)
    return files


def _files_of(source: str) -> list[SourceFile]:
    if source == STDLIB:
        return _stdlib_files()
    path = Path(os.path.expanduser(source))
    try:
        if path.is_dir():
            # abspath, not resolve: the folder's name as the user calls it, also for "." and for a link
            prefix = os.path.basename(os.path.abspath(path))
            return [
                _source_file(source, file, f"{prefix}/{file.relative_to(path).as_posix()}")
                for file in _walk(path, SKIPPED_FOLDERS, source)
            ]
        if path.exists():
            if not path.is_file():
                raise UsageError(f"{source}: neither a file nor a folder; copy its content into a file")
            with path.open("rb"):  # a file that was named must be readable; one in a folder is only counted
                return [_source_file(source, path, path.name)]
    except OSError as error:
        raise UsageError(f"{source}: cannot be read ({error.strerror}); name a place you may read") from error
    if glob.has_magic(source):
        return _glob_files(source)
    raise UsageError(f"{source}: no such file or folder; give a path, a glob, {STDLIB}, or hf:NAME")


def _glob_files(source: str) -> list[SourceFile]:
    pattern = os.path.expanduser(source)
    parts = Path(pattern).parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    base = Path(*parts[:fixed]) if fixed else Path(".")
    prefix = os.path.basename(os.path.abspath(base))
    files = []
    for match in sorted({Path(match) for match in glob.iglob(pattern, recursive=True)}, key=_order):
        # If the pattern holds "..", a match can lie outside of the base.
        name = os.path.relpath(match, base).replace(os.sep, "/")
        if match.is_file() and not SKIPPED_FOLDERS.intersection(name.split("/")):
            files.append(_source_file(source, match, f"{prefix}/{name}"))
    return files


def _stdlib_files() -> list[SourceFile]:
    root = Path(sysconfig.get_path("stdlib"))
    if not root.is_dir():
        raise UsageError(f"{STDLIB}: this Python keeps its library in no folder ({root}); name a folder of sources")
    return [
        _source_file(STDLIB, path, path.relative_to(root).as_posix())
        for path in _walk(root, STDLIB_SKIPPED | SKIPPED_FOLDERS, STDLIB)
        if path.suffix == ".py"
    ]


def _walk(root: Path, skipped: set[str], source: str) -> list[Path]:
    """Return the regular files under `root`, sorted by the parts of their paths, without hidden ones."""

    def fail(error: OSError) -> None:
        raise UsageError(
            f"{source}: the folder {error.filename} cannot be read ({error.strerror}); allow reading it or leave it out"
        ) from error

    files = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        for name in names:
            path = Path(folder, name)
            # is_file follows links, and leaves out pipes and devices, which would block or never end
            if not name.startswith(".") and path.is_file():
                files.append(path)
    return sorted(files, key=_order)


def _order(path: Path) -> tuple[str, ...]:
    return path.parts


def _source_file(source: str, path: Path, name: str) -> SourceFile:
    try:
        status = path.stat()
    except OSError:  # gone since it was listed: reading will count it as unreadable
        return SourceFile(source, name, path, 0, 0)
    return SourceFile(source, name, path, status.st_size, status.st_mtime_ns)
