"""Run a study case by case, resume it where an earlier start stopped, and write its report."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from headstart.console import Progress, duration, say
from headstart.errors import UsageError
from headstart.reports.html import need_matplotlib
from studies.folder import StudyFolder
from studies.report import draw_figure, format_report, results_of, write_results
from studies.resume import Clock, trainings_kept_in
from studies.study import Case, Result, Scale, Study, StudySettings, Tell

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
TUNING = 10
"""Seeds below this are for tuning settings."""


def find_study(name: str) -> Study[Any]:
    """Return a study by its name, or raise UsageError."""
    if name not in STUDIES:
        raise UsageError(f"there is no study {name!r}; take one of {', '.join(STUDIES)}")
    study: Study[Any] = importlib.import_module(f"studies.{name.replace('-', '_')}").STUDY
    return study


def run_study(
    study: Study[Any], scale: Scale, settings: StudySettings, out: Path | None = None, jobs: int = 1
) -> dict[str, Any]:
    """Run the cases that are missing in `out` (None: runs/studies/NAME-SCALE), and return the content of results.json.

    `jobs` cases run at once, each in a process of its own if there are several. Raises UsageError if the folder is in
    use, or holds another study or other settings, and for seeds that are for tuning.
    """
    need_matplotlib("a study's figure")
    if settings.seeds < 1:
        raise UsageError(f"seeds is {settings.seeds}; it must be at least 1")
    if jobs < 1:
        raise UsageError(f"--jobs is {jobs}; it must be at least 1")
    if settings.first_seed < TUNING:
        raise UsageError(
            f"first_seed is {settings.first_seed}, and seeds below {TUNING} were used for tuning; a verdict needs "
            f"others: take {TUNING} or more"
        )
    folder = StudyFolder(STUDIES_FOLDER / f"{study.name}-{scale}" if out is None else out)
    with folder.claimed():
        folder.accept(study.name, scale, settings)
        say(f"{study.name} ({study.section}), scale {scale}: {study.claim}")
        if scale in study.not_yet_run:
            say(f"the scale {scale} of this study was never run: its settings were checked, its numbers are new")
        results = _run_cases(study, settings, folder, jobs)
        findings = study.findings(settings, results)
        draw_figure(study, settings, results, folder.figure)
        found = results_of(study, scale, settings, results, findings)
        write_results(found, folder)
    say(format_report(found, short=True))
    say(f"{folder.results}\n{folder.report}\n{folder.figure}")
    return found


def _run_cases(study: Study[Any], settings: StudySettings, folder: StudyFolder, jobs: int) -> list[Result]:
    cases = study.cases(settings)
    results = {case.name: result for case in cases if (result := folder.find(case)) is not None}
    if results:
        say(f"{folder.path}: {len(results)} of {len(cases)} cases were finished before")
    missing, took = [case for case in cases if case.name not in results], list[float]()
    with Progress(study.name, len(cases), unit="cases", start=len(results)) as bar:
        for result in (
            _in_turn(study, settings, missing, folder, bar)
            if jobs == 1
            else _at_once(study, settings, missing, folder, jobs)
        ):
            results[result.case.name] = folder.keep(result)
            took.append(result.seconds)
            bar.advance(1)
            left = statistics.fmean(took) * (len(missing) - len(took)) / jobs
            remaining = f"; about {duration(left)} left for the study" if len(took) < len(missing) else ""
            say(f"{result.case.name}: {duration(result.seconds)}{remaining}")
    return [results[case.name] for case in cases]


def _in_turn(
    study: Study[Any], settings: StudySettings, cases: Sequence[Case], folder: StudyFolder, bar: Progress
) -> Iterator[Result]:
    for case in cases:
        bar.advance(0, case=case.name)
        yield _run_case(study, settings, case, folder.trainings(case), partial(bar.advance, 0))


def _at_once(
    study: Study[Any], settings: StudySettings, cases: Sequence[Case], folder: StudyFolder, jobs: int
) -> Iterator[Result]:
    """Yield the results of cases that run in `jobs` processes, which share the threads of this one."""
    threads = max(1, torch.get_num_threads() // jobs)
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,))
    try:
        places = [(case, folder.trainings(case)) for case in cases]
        for done in as_completed([pool.submit(_run_case, study, settings, *place) for place in places]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _run_case(
    study: Study[Any], settings: StudySettings, case: Case, trainings: Path, tell: Tell = lambda **_: None
) -> Result:
    """Run a case, whose trainings are kept in the folder `trainings` until it is finished."""
    began = Clock.now()
    with trainings_kept_in(trainings) as kept:
        numbers = study.run(settings, case, tell)
    spent = kept.spent.plus(Clock.now().since(began))
    return Result(case, {"processor_seconds": round(spent.processor, 2)} | numbers, spent.wall)
