"""Write the report of a study: results.json for programs, report.md and a figure for people."""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headstart import hardware
from headstart.console import duration, format_table
from headstart.fileio import replacing_file, write_text
from headstart.reports.html import COLOURS, SERIES, figure_style
from studies.folder import StudyFolder
from studies.study import Findings, Result, Scale, Study, StudySettings

INK, MUTED, LINE = (COLOURS[name][0] for name in ("ink", "muted", "line"))
SMOKE = "A smoke run shows that the study runs, and says nothing about its claim. "


def results_of(
    study: Study[Any], scale: Scale, settings: StudySettings, results: Sequence[Result], findings: Findings
) -> dict[str, Any]:
    """Return all results of a study with its claim, settings and machine, as JSON holds them."""
    smoke = scale == "smoke"
    return {
        "study": study.name,
        "scale": scale,
        "claim": study.claim,
        "section": study.section,
        "published": study.published,
        "verdict": "out of reach" if smoke else findings.verdict,
        "ours": findings.ours,
        "sentence": SMOKE + findings.sentence if smoke else findings.sentence,
        "table": {"headers": list(findings.headers), "rows": [list(row) for row in findings.rows]},
        "notes": list(findings.notes),
        "controls": [{**asdict(control), "passed": control.passed} for control in findings.controls],
        "cannot_show": study.cannot_show,
        "compared_at": study.compared_at,
        "date": datetime.date.today().isoformat(),
        "machine": hardware.describe(),
        "settings": json.loads(json.dumps(asdict(settings), default=str)),
        "seconds": round(sum(result.seconds for result in results), 1),
        "cases": [
            {**result.case.conditions, "arm": result.case.arm, "seed": result.case.seed}
            | {"seconds": round(result.seconds, 2)}
            | result.numbers
            for result in results
        ],
    }


def format_report(found: dict[str, Any], *, short: bool = False) -> str:
    """Return the report as Markdown, or, if `short`, its table and sentence for the terminal."""
    headers, rows = found["table"]["headers"], found["table"]["rows"]
    if short:
        return f"\n{format_table(headers, rows)}\n\n{found['verdict']}: {found['sentence']}\n"
    settings = ", ".join(f"{name} {_setting(value)}" for name, value in found["settings"].items())
    lines = [
        f"# Study {found['study']}, scale {found['scale']}",
        "",
        f"**Claim** ({found['section']}): {found['claim']}",
        "",
        f"**The paper's number**: {found['published']}",
        "",
        f"**Verdict: {found['verdict']}.** {found['sentence']}",
        "",
        "![figure](figure.png)",
        "",
        _row(headers),
        "|" + " --- |" * len(headers),
        *map(_row, rows),
        "",
        "Medians over seeds, in brackets the range.",
        "",
        *_controls(found["controls"]),
        *_arms(found),
        *(f"- {note}" for note in found["notes"]),
        f"- What this cannot show: {found['cannot_show']}",
        f"- Machine: {hardware.summary(found['machine'])}; {duration(found['seconds'])} in all, {found['date']}.",
        f"- Settings: {settings}.",
        f"- Run it again: `headstart study {found['study']} --scale {found['scale']}`, which also writes the raw data "
        "of every case, `results.json`.",
    ]
    return "\n".join(lines) + "\n"


def _controls(controls: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the positive controls."""
    lines = [
        f"- {control['what']}: {control['value']:.3f}, above {control['needed']:.3f} needed: "
        + ("passed" if control["passed"] else "**failed**")
        for control in controls
    ]
    return ["Controls:", "", *lines, ""] if lines else []


def _arms(found: dict[str, Any]) -> list[str]:
    """Return a table of every condition: share of its steps that were clipped, and its processor time."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for case in found["cases"]:
        arms.setdefault(case["arm"], []).append(case)
    if not any("clipped" in case for case in found["cases"]):
        return []

    def median(cases: Sequence[dict[str, Any]], name: str, form: str) -> str:
        known = [case[name] for case in cases if case.get(name) is not None]
        return format(statistics.median(known), form) if known else ""

    rows = [
        [arm, median(cases, "clipped", ".0%"), median(cases, "processor_seconds", ",.0f")]
        for arm, cases in arms.items()
    ]
    return [
        f"Conditions are compared at equal {found['compared_at']}; the table has what they share and what not.",
        "",
        _row(["condition", "steps clipped", "processor seconds"]),
        "| --- | --- | --- |",
        *map(_row, rows),
        "",
    ]


def index_row(found: dict[str, Any]) -> str:
    """Return the row of docs/studies/index.md."""
    cells = [f"[{found['study']}]({found['study']}/report.md)", f"{found['claim']} ({found['section']})"]
    return _row([*cells, found["published"], found["ours"], f"**{found['verdict']}**"])


def draw_figure(study: Study[Any], settings: StudySettings, results: Sequence[Result], path: Path) -> None:
    """Write the figure as PNG."""
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    style: Any = {
        "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": MUTED,
        "legend.labelcolor": INK, "grid.color": LINE, "legend.fontsize": 9, "legend.frameon": True,
        "legend.edgecolor": "none", "font.size": 10,
        "axes.prop_cycle": cycler(color=[COLOURS[name][0] for name in SERIES]),
    }  # fmt: skip
    with figure_style(), matplotlib.rc_context(style):
        figure = Figure(figsize=(9.6, 4.0), layout="constrained")
        study.draw(figure, settings, results)
        with replacing_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)


def write_results(found: dict[str, Any], folder: StudyFolder) -> None:
    """Write report.md and results.json."""
    write_text(folder.report, format_report(found))
    write_text(folder.results, json.dumps(found, indent=2, allow_nan=False) + "\n")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _setting(value: object) -> str:
    if isinstance(value, list):
        return "/".join(map(str, value))
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_setting(item)}" for name, item in value.items()) + ")"
    return str(value)
