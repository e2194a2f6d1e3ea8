"""Write reports of benchmarks: measurements with their bars, as JSON for programs and as Markdown for people."""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from headstart import hardware
from headstart.console import say
from headstart.decoding.policy.timing import ratios
from headstart.fileio import write_text

RESULTS = Path("bench/results")
HEADERS = ("part", "what", "median", "spread", "bar", "result", "details")


@dataclass(frozen=True)
class BenchSettings:
    """Settings that every benchmark has."""

    out: Path = RESULTS
    """Folder of the report."""
    date: str | None = None
    """Date of the report (None: today)."""


@dataclass(frozen=True)
class Bar:
    """A limit for a measured value."""

    sign: Literal["<", "<=", ">="]
    value: float

    def met(self, value: float) -> bool:
        """Return whether `value` reaches the bar."""
        return {"<": value < self.value, "<=": value <= self.value, ">=": value >= self.value}[self.sign]

    def __str__(self) -> str:
        return f"{self.sign} {_number(self.value)}"


NONE = Bar("<=", 0)
"""Bar of a count of errors."""


@dataclass
class Findings:
    """Results of one part of a benchmark."""

    part: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Measurements, see `measure`."""
    notes: list[str] = field(default_factory=list)
    """Sentences that explain them."""

    def measure(
        self, what: str, values: Sequence[float], unit: str = "", bar: Bar | None = None, **details: Any
    ) -> dict[str, Any]:
        """Append and return one measured quantity, whose median `bar` judges, with further `details`."""
        found = spread(values)
        judged = {"bar": asdict(bar), "met": bar.met(found["median"])} if bar else {"bar": None, "met": None}
        self.rows.append({"part": self.part, "what": what, "unit": unit, **found, **judged, "details": details})
        return self.rows[-1]

    def times(self, what: str, seconds: Sequence[float], **details: Any) -> None:
        """Append times, in ms."""
        self.measure(what, [1e3 * s for s in seconds], "ms", **details)

    def ratio(
        self, what: str, a: Sequence[float], b: Sequence[float], bar: Bar | None = None, block: int = 1
    ) -> dict[str, Any]:
        """Append and return the ratios of two measured quantities, see `timing.ratios`."""
        return self.measure(what, ratios(a, b, block), bar=bar)

    def note(self, sentences: str) -> None:
        """Append sentences that explain the measurements."""
        self.notes.append(f"{self.part}: {sentences}")


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return the median with quartiles, or with the range of fewer than eight values."""
    if len(values) >= 8:
        low, _, high = statistics.quantiles(values, n=4)
        kind = "quartiles"
    else:
        low, high, kind = min(values), max(values), "range" if len(values) > 1 else "single value"
    median = statistics.median(values)
    return {"median": median, "low": low, "high": high, "spread": kind, "repetitions": len(values)}


Settings = TypeVar("Settings", bound=BenchSettings)


def run_parts(
    name: str, settings: Settings, parts: Mapping[Any, Callable[[Settings], Findings]], notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Run the parts in order, print each measurement, and return what `result` makes of them."""
    found = Findings(name, notes=list(notes))
    for part, measure in parts.items():
        say(f"{part} ...")
        more = measure(settings)
        for row in more.rows:
            say(f"{row['part']}: {row['what']}: {row['median']:.4g} {row['unit']}".rstrip())
        found.rows += more.rows
        found.notes += more.notes
    return result(name, settings, found)


def result(name: str, settings: BenchSettings, found: Findings) -> dict[str, Any]:
    """Return the results of a benchmark with its settings and the machine, as JSON holds them."""
    plain = json.loads(json.dumps(asdict(settings), default=str))
    date = plain.pop("date") or datetime.date.today().isoformat()
    del plain["out"]
    return {
        "benchmark": name,
        "date": date,
        "machine": hardware.describe(),
        "settings": plain,
        "measurements": found.rows,
        "notes": found.notes,
        "met": all(row["met"] is not False for row in found.rows),
    }


def format_markdown(result: dict[str, Any]) -> str:
    """Return the report as a Markdown page."""
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
        *_lines(
            ["part", "what", "median", "spread", "bar", "result", "details"], list(map(_cells, result["measurements"]))
        ),
        "",
    ]
    if result["notes"]:
        lines += ["## Notes", "", *(f"- {note}" for note in result["notes"]), ""]
    return "\n".join(lines)


def write(result: dict[str, Any], out: str | Path = RESULTS) -> list[Path]:
    """Write NAME.json and NAME.md into `out`, each in one step, and return their paths."""
    paths = [Path(out) / f"{result['benchmark']}.{kind}" for kind in ("json", "md")]
    write_text(paths[0], json.dumps(result, indent=2) + "\n")
    write_text(paths[1], format_markdown(result))
    return paths


def count(number: int, noun: str) -> str:
    """Return a number with its noun: 1 thread, 2 threads."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _cells(row: dict[str, Any]) -> list[str]:
    met = "" if row["met"] is None else ("met" if row["met"] else "**missed**")
    bar = "" if row["bar"] is None else str(Bar(**row["bar"]))
    around = ""
    if row["repetitions"] > 1:
        around = f"{_number(row['low'])} to {_number(row['high'])} ({row['spread']} of {row['repetitions']})"
    details = "; ".join(f"{name.replace('_', ' ')} {_setting(value)}" for name, value in row["details"].items())
    return [row["part"], row["what"], f"{_number(row['median'])} {row['unit']}".strip(), around, bar, met, details]


def _lines(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(headers), "|" + " --- |" * len(headers), *map(line, rows)]


def _number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.1e}"


def _setting(value: object) -> str:
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, (list, tuple)):
        return "/".join(map(_setting, value))
    if isinstance(value, dict):
        return "(" + ", ".join(f"{k} {v}" for k, v in value.items() if v is not None) + ")"
    return str(value)
