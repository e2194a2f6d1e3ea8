"""Corpora: files, folders, globs and Python's own library, read as documents in a fixed order."""

from __future__ import annotations

import glob
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from headstart.errors import UsageError

STDLIB = "python-stdlib"
STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "venv"}
SKIPPED_FOLDERS = {"__pycache__", "node_modules"}


@dataclass(frozen=True)
class Document:
    """One text. `name` is relative to its source, so that it is the same on another machine."""

    name: str
    text: str


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus, not read yet; `size` in bytes."""

    source: str
    name: str
    path: Path
    size: int


def read_documents(sources: Sequence[str], report: Callable[[str], None] | None = None) -> Iterator[Document]:
    """The documents of `sources`, one per file, in an order that depends on the names alone.

    A source is the name `python-stdlib` (the library sources of the running interpreter, without its tests), a file, a
    folder (all text files in it, hidden ones skipped), or a glob (`**` matches folders). Text is UTF-8 without NUL, by
    content; line ends stay as they are. A file named twice is read once. Files that are empty or not text are skipped
    and counted in a line to `report`. A source that is missing, unreadable or without a document raises UsageError: a
    missing one at once, before anything is read.
    """
    return read_files(list_files(sources), report)


def list_files(sources: Sequence[str]) -> list[SourceFile]:
    """The files of `sources` in reading order, each real file once. Raises as `read_documents`."""
    if isinstance(sources, str):
        sources = [sources]
    if not sources:
        raise UsageError(f"no source given; name a file, a folder, a glob, or {STDLIB}")
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


def read_files(files: Sequence[SourceFile], report: Callable[[str], None] | None = None) -> Iterator[Document]:
    """Reads what `list_files` found. Raises UsageError at the end of a source none of whose files was text."""
    for start, stop in _runs([file.source for file in files]):
        source = files[start].source
        documents, reasons = 0, {"empty": 0, "not UTF-8 text": 0, "unreadable": 0}
        for file in files[start:stop]:
            text, reason = _read_text(file.path)
            if text is None:
                reasons[reason] += 1
                continue
            documents += 1
            yield Document(file.name, text)
        skipped = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        if documents == 0:
            raise UsageError(f"{source}: no document in it (files skipped: {skipped}); name UTF-8 text files")
        if skipped and report is not None:
            report(f"{source}: {documents} documents read; files skipped: {skipped}")


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
                raise UsageError(f"{source}: neither a file nor a folder; copy what it gives into a file")
            with path.open("rb"):  # a file that was named must be readable; one in a folder is only counted
                return [_source_file(source, path, path.name)]
    except OSError as error:
        raise UsageError(f"{source}: cannot be read ({error.strerror}); name a place you may read") from error
    if glob.has_magic(source):
        return _glob_files(source)
    raise UsageError(f"{source}: no such file or folder; give a path, a glob, or {STDLIB}")


def _glob_files(source: str) -> list[SourceFile]:
    pattern = os.path.expanduser(source)
    parts = Path(pattern).parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    base = Path(*parts[:fixed]) if fixed else Path(".")
    prefix = os.path.basename(os.path.abspath(base))
    files = []
    for match in sorted({Path(match) for match in glob.iglob(pattern, recursive=True)}, key=_order):
        # A match of ".." in the pattern can lie outside its base.
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
    """Regular files under `root`, sorted by the parts of their paths; hidden files and folders are left out."""

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
        size = path.stat().st_size
    except OSError:  # gone since it was listed: reading will count it as unreadable
        size = 0
    return SourceFile(source, name, path, size)


def _read_text(path: Path) -> tuple[str | None, str]:
    """The text of a file, or None and the reason why it has none."""
    try:
        content = path.read_bytes()
    except OSError:
        return None, "unreadable"
    if not content:
        return None, "empty"
    try:
        return (None, "not UTF-8 text") if b"\0" in content else (content.decode("utf-8"), "")
    except UnicodeDecodeError:
        return None, "not UTF-8 text"


def _runs(values: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Half-open ranges of equal neighbours."""
    start = 0
    for index in range(1, len(values) + 1):
        if index == len(values) or values[index] != values[start]:
            yield start, index
            start = index
