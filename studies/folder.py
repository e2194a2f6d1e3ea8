"""Keep the folder of a study: a file for each finished case, a folder of checkpoints for each begun one."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headstart.errors import UsageError
from headstart.fileio import claimed, remove_unfinished, write_text
from studies.study import Case, Result, StudySettings


class StudyFolder:
    """A folder with study.json (name and settings), cases/, and at the end results.json, report.md and figure.png."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / "study.json"
        self.cases = path / "cases"
        self.results = path / "results.json"
        self.report = path / "report.md"
        self.figure = path / "figure.png"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the folder and keep other processes out of it."""
        taken = f"{self.path}: another study is running there; wait for it or give another --out"
        with claimed(self.path / ".lock", taken, "give another --out"):
            self.cases.mkdir(exist_ok=True)
            remove_unfinished(self.cases)
            yield

    def accept(self, name: str, scale: str, settings: StudySettings) -> None:
        """Write the settings, or raise UsageError if the folder holds another study or other settings.

        Another number of seeds and another device are no other settings.
        """
        now = {"study": name, "scale": scale, **_plain(settings)}
        if self.settings.exists():
            try:
                before = json.loads(self.settings.read_text(encoding="utf-8"))
                flat = _flat(before)
            except (ValueError, AttributeError) as error:
                raise UsageError(f"{self.settings}: cannot be read ({error}); give another --out") from error
            expected = _flat(now)
            for key in [*expected, *(flat.keys() - expected.keys())]:
                if key not in ("seeds", "device") and flat.get(key) != expected.get(key):
                    raise UsageError(
                        f"{self.path}: holds a study with {key} {flat.get(key)}, not {expected.get(key)}; "
                        "give another --out"
                    )
        write_text(self.settings, json.dumps(now, indent=2) + "\n")

    def find(self, case: Case) -> Result | None:
        """Return the result of `case`, if it is finished."""
        file = self.cases / f"{case.name}.json"
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            return Result(case, kept["numbers"], float(kept["seconds"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{file}: cannot be read ({error}); delete it and run the study again") from error

    def trainings(self, case: Case) -> Path:
        """Return the folder of the checkpoints of a case that is not finished."""
        return self.cases / case.name

    def keep(self, result: Result) -> Result:
        """Write a result in one step, and return it as `find` will read it. Its checkpoints are deleted."""
        case = result.case
        kept = {"conditions": case.conditions, "seed": case.seed, "numbers": _finite(result.numbers)}
        text = json.dumps({**kept, "seconds": round(result.seconds, 2)}, indent=2, allow_nan=False)
        write_text(self.cases / f"{case.name}.json", text + "\n")
        shutil.rmtree(self.trainings(case), ignore_errors=True)
        return Result(case, json.loads(text)["numbers"], result.seconds)


def _plain(settings: StudySettings) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(asdict(settings), default=str))
    return plain


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _finite(value: Any) -> Any:
    """Return `value` with null for numbers that JSON lacks."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
