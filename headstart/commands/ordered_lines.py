"""Write a file of JSON lines in order, so that a second call can resume it.

The lines grow in the hidden folder `.FILE.distilling` next to FILE and appear as FILE when all are written: an
unfinished file never looks whole. The folder also holds a lock and the settings that the file is written with. It stays
as long as the file does, so that a file never holds lines of two settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from headstart.errors import UsageError
from headstart.fileio import claimed, read_json, unwritable, write_text


class OrderedLines:
    """Takes lines in any order and writes them in the order of their places."""

    def __init__(self, file: IO[str], next_place: int) -> None:
        self.next_place = next_place
        """First place that is not written."""
        self.written = 0
        self._file = file
        self._waiting: dict[int, dict[str, Any] | None] = {}

    def give(self, place: int, record: Mapping[str, Any] | None) -> None:
        """Write a record, with its "place", once all before it are written; None writes nothing for the place."""
        self._waiting[place] = None if record is None else {"place": place, **record}
        while self.next_place in self._waiting:
            line = self._waiting.pop(self.next_place)
            if line is not None:
                try:
                    self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    self._file.flush()
                except OSError as error:
                    raise unwritable(Path(self._file.name), error, "name a file you may write") from error
                self.written += 1
            self.next_place += 1


@contextmanager
def ordered_lines(path: Path, settings: Mapping[str, Any], places: int) -> Iterator[OrderedLines]:
    """Open `path` for writing; lines that an earlier call wrote with the same `settings` are kept.

    A torn last line is cut off. `path` appears once all `places` are given. Raises UsageError if another process writes
    it, if it was written with other settings or by another program, or if it is damaged.
    """
    folder = path.with_name(f".{path.name}.distilling")
    taken = f"{path}: another process is writing it; wait for it, or name another file"
    with claimed(folder / "lock", taken, "name a file you may write", path):
        growing = folder / "lines.jsonl"
        written = any(file.exists() and file.stat().st_size > 0 for file in (path, growing))
        _check_settings(path, folder / "settings.json", json.loads(json.dumps(settings)), written)
        try:
            if path.exists() and not growing.exists():
                path.replace(growing)  # whole, or unfinished from a version that wrote it in place
            next_place = _cut_torn_end(growing)
            with growing.open("a", encoding="utf-8") as file:
                lines = OrderedLines(file, next_place)
                yield lines
            if lines.next_place >= places:
                growing.replace(path)
        except OSError as error:
            raise unwritable(path, error, "name a file you may write") from error


def _check_settings(path: Path, file: Path, settings: dict[str, Any], written: bool) -> None:
    """Keep the settings in `file`, or check that lines written before had the same."""
    if not written:
        write_text(file, json.dumps(settings, indent=2) + "\n")
        return
    try:
        before = read_json(file)
    except UsageError:
        raise UsageError(f"{path}: exists, and nothing says how it was written; name a new file") from None
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed:
        what = ", ".join(f"{name} {before.get(name)} (now {settings[name]})" for name in changed)
        raise UsageError(f"{path}: was written with {what}; give the same again, or name another file")


def _cut_torn_end(path: Path) -> int:
    """Cut off what follows the last line end, and return the place after that of the last line."""
    if not path.exists():
        return 0
    number = place = whole = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                place = int(json.loads(line)["place"]) + 1
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f'{path}, line {number}: no JSON with a "place"; name a new file') from error
            whole += len(line)
    with path.open("r+b") as file:
        file.truncate(whole)
    return place
