"""Run a study case by case, resume it where an earlier start stopped, and write its report."""

from __future__ import annotations

import importlib
import time
from functools import partial
from pathlib import Path
from typing import Any

from headstart.console import Progress, duration, say
from headstart.errors import UsageError
from headstart.reports.html import need_matplotlib
from studies.folder import StudyFolder
from studies.report import draw_figure, format_report, results_of, write_results
from studies.study import Result, Scale, Study, StudySettings

STUDIES = (
    "polynomial",
    "induction",
    "choice-points",
    "mutual-information",
    "bytes",
    "heads",
    "scaling",
    "curriculum",
    "adapted-heads",
    "finetune",
    "speed",
    "memory",
    "path-star",
)
"""Names of the studies in the order of the index; each is the file of that name."""
STUDIES_FOLDER = Path("runs/studies")


def find_study(name: str) -> Study[Any]:
    """Return a study by its name, or raise UsageError."""
    if name not in STUDIES:
        raise UsageError(f"there is no study {name!r}; take one of {', '.join(STUDIES)}")
    study: Study[Any] = importlib.import_module(f"studies.{name.replace('-', '_')}").STUDY
    return study


def run_study(study: Study[Any], scale: Scale, settings: StudySettings, out: Path | None = None) -> dict[str, Any]:
    """Run the cases that are missing in `out` (None: runs/studies/NAME-SCALE), and return the content of results.json.

    Raises UsageError if the folder is in use, or holds another study or other settings.
    """
    need_matplotlib("a study's figure")
    if settings.seeds < 1:
        raise UsageError(f"seeds is {settings.seeds}; it must be at least 1")
    folder = StudyFolder(STUDIES_FOLDER / f"{study.name}-{scale}" if out is None else out)
    with folder.claimed():
        folder.accept(study.name, scale, settings)
        say(f"{study.name} ({study.section}), scale {scale}: {study.claim}")
        if scale in study.not_yet_run:
            say(f"the scale {scale} of this study was never run: its settings were checked, its numbers are new")
        results = _run_cases(study, settings, folder)
        findings = study.findings(settings, results)
        draw_figure(study, settings, results, folder.figure)
        found = results_of(study, scale, settings, results, findings)
        write_results(found, folder)
    say(format_report(found, short=True))
    say(f"{folder.results}\n{folder.report}\n{folder.figure}")
    return found


def _run_cases(study: Study[Any], settings: StudySettings, folder: StudyFolder) -> list[Result]:
    cases = study.cases(settings)
    results = {case.name: result for case in cases if (result := folder.find(case)) is not None}
    if results:
        say(f"{folder.path}: {len(results)} of {len(cases)} cases were finished before")
    with Progress(study.name, len(cases), unit="cases", start=len(results)) as bar:
        for case in cases:
            if case.name in results:
                continue
            bar.advance(0, case=case.name)
            began = time.monotonic()
            numbers = study.run(settings, case, partial(bar.advance, 0))
            results[case.name] = folder.keep(Result(case, numbers, time.monotonic() - began))
            bar.advance(1)
            say(f"{case.name}: {duration(results[case.name].seconds)}")
    return [results[case.name] for case in cases]
