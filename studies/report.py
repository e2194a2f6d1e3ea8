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
from headstart.console import format_table
from headstart.fileio import replacing_file, write_text
from headstart.reports.html import COLOURS, SERIES, figure_style
from studies.folder import StudyFolder
from studies.study import Findings, Result, Scale, Study, StudySettings

INK, MUTED, LINE = (COLOURS[name][0] for name in ("ink", "muted", "line"))
PARTS = (
    "Claim", "Verdict", "Setting", "Arms", "Seeds", "Margin", "Controls", "Clip rates", "Hours", "Command",
    "Cannot show",
)  # fmt: skip
"""Parts of a report, each of which begins with its name in bold."""
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
        "contrasts": [
            {"what": each.what, "median": each.median, "bar": each.bar, "seeds": each.seeds_in_words}
            for each in findings.contrasts
        ],
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
    seeds = sorted({case["seed"] for case in found["cases"]})
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
        *(f"- {note}" for note in found["notes"]),
        f"- **Setting**: {settings}. Machine: {hardware.summary(found['machine'])}, {found['date']}.",
        _arms(found),
        f"- **Seeds**: {', '.join(map(str, seeds))}, chosen before the run; those below 10 are for tuning.",
        *_margin(found["contrasts"]),
        *_controls(found["controls"]),
        _clip_rates(found["cases"]),
        f"- **Hours**: {_hours(found)}",
        f"- **Cannot show**: {found['cannot_show']}",
        f"- **Command**: `headstart study {found['study']} --scale {found['scale']}`, which also writes the raw data "
        "of every case, `results.json`.",
    ]
    return "\n".join(lines) + "\n"


def _by_arm(cases: Sequence[dict[str, Any]], number: str, form: str) -> str:
    """Return the median over seeds of a number of every condition that has it, in words."""
    arms: dict[str, list[float]] = {}
    for case in cases:
        if case.get(number) is not None:
            arms.setdefault(case["arm"], []).append(case[number])
    return "; ".join(f"{arm}: {statistics.median(found):{form}}" for arm, found in arms.items())


def _arms(found: dict[str, Any]) -> str:
    """Return the line of the conditions: the amount at which they are equal, and the processor time of each."""
    seconds = _by_arm(found["cases"], "processor_seconds", ",.0f")
    return f"- **Arms**, compared at equal {found['compared_at']}; seconds of processor time of each: {seconds}."


def _margin(contrasts: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the judged differences, with the bar of each."""
    rule = "two pooled standard errors over the seeds, or the noise of the measurement where that is more"
    each = [f"  - {c['what']}: {c['median']:+.3g} (bar {c['bar']:.2g}; {c['seeds']})" for c in contrasts]
    return [f"- **Margin**: {rule}. Differences, positive as the claim has them:", *each]


def _controls(controls: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the positive controls."""
    lines = [
        f"  - {control['what']}: {control['value']:.3f}, above {control['needed']:.3f} needed: "
        + ("passed" if control["passed"] else "**failed**")
        for control in controls
    ]
    return ["- **Controls**:" + ("" if lines else " none: no difference here needs a model that has learned."), *lines]


def _clip_rates(cases: Sequence[dict[str, Any]]) -> str:
    """Return the line of the share of steps whose gradient was clipped, of each condition that trains."""
    rates = _by_arm(cases, "clipped", ".0%")
    return f"- **Clip rates**: {rates or 'not counted, for no clipped training is compared'}."


def _hours(found: dict[str, Any]) -> str:
    """Return the hours of the whole study: of the clock, and of processors."""
    processors = sum(case.get("processor_seconds") or 0 for case in found["cases"])
    return f"{found['seconds'] / 3600:.2g} of all cases one after the other, {processors / 3600:.2g} of processor time."


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
