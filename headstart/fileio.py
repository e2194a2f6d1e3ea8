"""Write files so that nothing half-written looks whole: write to a temporary name, flush to disk, rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from headstart.errors import UsageError, first_line

COPY_BYTES = 1 << 22
"""Size of the pieces in which files are read and copied."""
MOST_JSON = 64 << 20
"""The largest JSON file of a model directory; the index of a model with 100,000 tensors has 10 MB."""

FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Errors of the machine, which another path would not avoid."""


def status_of(error: OSError) -> int:
    """Return the exit status for `error`: 1 if the machine is the cause, 2 if another path would work."""
    return 1 if error.errno in FAILURES else 2


def unwritable(path: Path, error: OSError, advice: str = "name a place you may write to") -> UsageError:
    """Return the UsageError for a `path` that cannot be written."""
    status = status_of(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        why, advice = "the disk is full, nothing was replaced", "free some space and run the command again"
    else:
        why = f"cannot be written ({error.strerror})"
        advice = "run the command again" if status == 1 else advice
    return UsageError(f"{path}: {why}; {advice}", status=status)


@contextmanager
def appending(path: Path) -> Iterator[IO[str]]:
    """Open a text file to append lines; a full disk raises an error that names the file."""
    try:
        with path.open("a", encoding="utf-8") as file:
            yield file
    except OSError as error:
        if status_of(error) == 1:
            raise unwritable(path, error) from error
        raise


def regular(path: Path) -> Path:
    """Return `path`. Raise UsageError if it is a pipe, a device or a socket, which could be read forever.

    This is for files of models, shards, checkpoints and settings. A file of prompts may be a pipe.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return path  # the reader reports what is wrong
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UsageError(f"{path}: is not a regular file but a pipe, a device or a socket; put the file itself there")
    return path


def read_bounded(path: Path, most: int) -> bytes:
    """Return the content of a regular file. Raise UsageError if it has more than `most` bytes."""
    with regular(path).open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UsageError(f"{path}: larger than {most:,} bytes, which no such file is; copy the right one there")
    return content


def sync(path: Path) -> None:
    """Flush a file or a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` in one step on a clean exit, and is removed otherwise."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` on a clean exit, replacing an existing one as a whole.

    A directory cannot be exchanged in one system call, so the old one is moved aside first: a kill between the two
    renames leaves the old content under `.NAME.old-PID`, and never a half-written directory under `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    with becoming_directory(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary


@contextmanager
def becoming_directory(path: Path, temporary: Path, *, mine: bool = True) -> Iterator[None]:
    """Rename the folder `temporary` to `path` on a clean exit; otherwise remove it and explain the failure.

    If several processes fill it together, only one passes `mine`.
    """
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    try:
        yield
        if mine:
            for file in temporary.rglob("*"):
                sync(file)
            sync(temporary)
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
            sync(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    except RuntimeError as error:
        # torch's file writer says "unexpected pos" when the disk is full.
        if shutil.disk_usage(path.parent).free < 2**20:
            raise unwritable(path, OSError(errno.ENOSPC, "No space left on device")) from error
        raise
    finally:
        if mine:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cache_folder() -> Path:
    """Return this user's cache directory, $XDG_CACHE_HOME/headstart, which need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headstart"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file, in hexadecimal digits. Raise UsageError for a pipe or a device."""
    digest = hashlib.sha256()
    with regular(path).open("rb") as file:
        while content := file.read(COPY_BYTES):
            digest.update(content)
    return digest.hexdigest()


def take_lock(file: IO[str]) -> bool:
    """Lock `file` until it is closed and return whether that worked; True if the file system has no locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextmanager
def claimed(lock: Path, taken: str, advice: str, path: Path | None = None) -> Iterator[None]:
    """Hold the file `lock`, made with its folders, so that one process at a time works on what it stands for.

    The file stays when the process ends; the system releases the lock. `taken` is the error if another process holds
    it; the error if the lock cannot be written names `path` (None: the folder of the lock) and gives `advice`.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a")
    except OSError as error:
        raise unwritable(path or lock.parent, error, advice) from error
    with file:
        if not take_lock(file):
            raise UsageError(taken)
        yield


def remove_unfinished(*folders: Path) -> None:
    """Delete what `replacing_file` and its like left in `folders` when their process was killed."""
    for folder in folders:
        for left in folder.glob(".*.writing-*"):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def read_json(
    file: Path,
    most: int | None = None,
    readable: str = "name a model directory you may read",
    fix: str = "copy the model directory again",
) -> dict[str, Any]:
    """Return the JSON object in `file`, of at most `most` bytes. Raise UsageError, with advice, for anything else."""
    try:
        content = json.loads(read_bounded(file, most or MOST_JSON).decode("utf-8"))
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror}); {readable}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: is not JSON ({first_line(error)}); {fix}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file}: is not a JSON object; {fix}")
    return content
