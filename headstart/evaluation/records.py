"""Keep what an evaluation has done in a folder, so that the same command resumes after a kill."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headstart.errors import UsageError
from headstart.fileio import claimed, write_text


@contextmanager
def owned(folder: Path, identity: Mapping[str, Any]) -> Iterator[None]:
    """Own the folder within the block. Raise UsageError if another run does, or it holds results of other settings."""
    taken = f"{folder}: another run is writing there; wait for it, or name another --out"
    with claimed(folder / ".lock", taken, "name another --out"):
        file = folder / "settings.json"
        if file.is_file():
            before = json.loads(file.read_text(encoding="utf-8"))
            for name, value in identity.items():
                if before.get(name) != value:
                    raise UsageError(
                        f"{folder}: holds samples with {name} {before.get(name)!r}, not {value!r}; name another --out"
                    )
        else:
            write_text(file, json.dumps(identity, indent=2) + "\n")
        yield


def whole_lines(file: Path) -> list[dict[str, Any]]:
    """Return the lines of an earlier run, and remove a last line that a kill cut short."""
    if not file.is_file():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        write_text(file, whole.decode("utf-8"))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise UsageError(f"{file}: is damaged ({error}); remove it to decode its samples again") from error
