"""Reports of benchmarks: measurements with their bars, as JSON for programs and as Markdown for people."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bench.measure import spread
from headstart import hardware
from headstart.fileio import write_text

RESULTS = Path("bench/results")


@dataclass(frozen=True)
class Bar:
    """What a measured value must reach."""

    sign: Literal["<", "<=", ">="]
    value: float

    def met(self, value: float) -> bool:
        return {"<": value < self.value, "<=": value <= self.value, ">=": value >= self.value}[self.sign]

    def __str__(self) -> str:
        return f"{self.sign} {_number(self.value)}"


def measurement(
    part: str, what: str, values: Sequence[float], unit: str = "", bar: Bar | None = None, **details: Any
) -> dict[str, Any]:
    """One measured quantity; its median is judged by `bar`. `details` are kept in the JSON file."""
    row: dict[str, Any] = {"part": part, "what": what, "unit": unit, **spread(values), "bar": None, "met": None}
    if bar is not None:
        row |= {"bar": asdict(bar), "met": bar.met(row["median"])}
    return row | details


def table(title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> dict[str, Any]:
    """A table that is more than measurements in a column, for people."""
    return {"title": title, "headers": list(headers), "rows": [[_cell(cell) for cell in row] for row in rows]}


def result(
    name: str,
    settings: Any,
    measurements: list[dict[str, Any]],
    notes: Sequence[str] = (),
    tables: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """What a benchmark's `run` returns. `settings` is its dataclass, with the field `date`."""
    kept = json.loads(json.dumps(asdict(settings), default=str))
    date = kept.pop("date") or datetime.date.today().isoformat()
    kept.pop("out", None)
    return {
        "benchmark": name,
        "date": date,
        "machine": hardware.describe(),
        "settings": kept,
        "measurements": measurements,
        "tables": list(tables),
        "notes": list(notes),
        "met": all(row["met"] is not False for row in measurements),
    }


def format_markdown(result: dict[str, Any]) -> str:
    """The report as a page."""
    settings = ", ".join(f"{name} {_setting(value)}" for name, value in result["settings"].items())
    load, name = result["machine"]["load_average"], result["benchmark"]
    lines = [
        f"# headstart bench {name}",
        "",
        f"- Date: {result['date']}",
        f"- Machine: {hardware.summary(result['machine'])}",
        *([f"- Load average when the report was written: {load[0]:.2f}"] if load else []),
        f"- Settings: {settings}",
        f"- Raw data: `python -m bench {name}` with these settings writes `{name}.json` next to this page",
        "",
        *_rows(
            ["part", "what", "median", "spread", "bar", "result"],
            [
                [
                    row["part"],
                    row["what"],
                    f"{_number(row['median'])} {row['unit']}".strip(),
                    _spread(row),
                    "" if row["bar"] is None else str(Bar(**row["bar"])),
                    "" if row["met"] is None else ("met" if row["met"] else "**missed**"),
                ]
                for row in result["measurements"]
            ],
        ),
        "",
    ]
    for part in result["tables"]:
        lines += [f"## {part['title']}", "", *_rows(part["headers"], part["rows"]), ""]
    if result["notes"]:
        lines += ["## Notes", "", *(f"- {note}" for note in result["notes"]), ""]
    return "\n".join(lines)


def write(result: dict[str, Any], out: str | Path = RESULTS) -> list[Path]:
    """Writes NAME.json and NAME.md into `out`, each in one step, and returns their paths."""
    paths = [Path(out) / f"{result['benchmark']}.{kind}" for kind in ("json", "md")]
    write_text(paths[0], json.dumps(result, indent=2) + "\n")
    write_text(paths[1], format_markdown(result))
    return paths


def _rows(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(headers), "|" + " --- |" * len(headers), *map(line, rows)]


def _spread(row: dict[str, Any]) -> str:
    if row["repetitions"] == 1:
        return ""
    return f"{_number(row['low'])} to {_number(row['high'])} ({row['spread']} of {row['repetitions']})"


def count(number: int, noun: str) -> str:
    """1 thread, 2 threads."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.1e}"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return _number(value) if isinstance(value, float) else str(value)


def _setting(value: object) -> str:
    if isinstance(value, list):
        return "/".join(map(str, value))
    if isinstance(value, dict):
        return "(" + ", ".join(f"{k} {v}" for k, v in value.items() if v is not None) + ")"
    return str(value)
