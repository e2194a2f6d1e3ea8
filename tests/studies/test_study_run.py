"""Running a study: what a second start finds, who may write, and what the report holds. The study is made up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from headstart.errors import UsageError
from studies.folder import StudyFolder
from studies.report import PARTS
from studies.run import run_study
from studies.study import Case, Findings, Result, Scale, Study, StudySettings, Tell, crossed, spread, values
from studies.verdicts import Control, contrast, judge


@dataclass(frozen=True)
class MadeUpSettings(StudySettings):
    heads: tuple[int, ...] = (1, 2)
    gain: float = 1.0


class MadeUp(Study[MadeUpSettings]):
    name, claim, section, published = "made-up", "More heads, more points.", "section 0", "+1"
    cannot_show = "Anything else."
    scales: ClassVar[dict[Scale, Any]] = {"smoke": MadeUpSettings(seeds=2)}

    def __init__(self, stop_at: int | None = None) -> None:
        self.ran: list[str] = []
        self.stop_at = stop_at

    def cases(self, settings: MadeUpSettings) -> list[Case]:
        return crossed(settings.chosen_seeds, n=settings.heads)

    def run(self, settings: MadeUpSettings, case: Case, tell: Tell) -> dict[str, Any]:
        if len(self.ran) == self.stop_at:
            raise KeyboardInterrupt
        self.ran.append(case.name)
        tell(step="1/1")
        return {
            "points": int(case.conditions["n"]) * settings.gain + (case.seed - 10) / 10,
            "lost": float("nan"),
            "clipped": 0.25,
        }

    def findings(self, settings: MadeUpSettings, results: Sequence[Result]) -> Findings:
        points = [values(results, lambda r: r.numbers["points"], n=n) for n in settings.heads]
        control = Control("points of two heads", max(points[1]), 1.0)
        contrasts = [contrast("2 over 1", points[1], points[0])]
        verdict = judge(contrasts, controls=[control])
        rows = [[str(n), spread(p)] for n, p in zip(settings.heads, points)]
        return Findings(["n", "points"], rows, verdict, "It is so.", "+1", controls=[control], contrasts=contrasts)

    def draw(self, figure: Any, settings: MadeUpSettings, results: Sequence[Result]) -> None:
        figure.add_subplot().plot([result.numbers["points"] for result in results])


def test_a_run_leaves_results_a_report_and_a_figure(tmp_path: Path) -> None:
    found = run_study(MadeUp(), "cpu", MadeUpSettings(seeds=3), tmp_path)
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert found["verdict"] == "reproduced" and found["settings"] == {
        "seeds": 3, "first_seed": 10, "device": "auto", "heads": [1, 2], "gain": 1.0,
    }  # fmt: skip
    assert [(case["n"], case["seed"], case["points"]) for case in found["cases"]] == [
        (1, 10, 1.0), (1, 11, 1.1), (1, 12, 1.2), (2, 10, 2.0), (2, 11, 2.1), (2, 12, 2.2),
    ]  # fmt: skip
    assert found["cases"][0]["lost"] is None  # JSON has no NaN
    assert {"machine", "seconds", "date", "claim", "published"} <= found.keys()
    assert found["machine"]["threads"] >= 1 and found["machine"]["torch"]
    report = (tmp_path / "report.md").read_text()
    assert "| 2 | 2.100 (2.000 to 2.200) |" in report and "Verdict: reproduced" in report
    assert "- points of two heads: 2.200, above 1.000 needed: passed" in report
    assert "  - 2 over 1: +1 (bar 0.16; every seed)" in report and "**Seeds**: 10, 11, 12," in report
    assert "**Clip rates**: n 1: 25%; n 2: 25%." in report and "**Arms**, compared at equal tokens" in report
    assert [part for part in PARTS if f"**{part}" not in report] == [] and "**Cannot show**: Anything else." in report
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_start_runs_only_what_is_missing(tmp_path: Path) -> None:
    stopped = MadeUp(stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        run_study(stopped, "smoke", MadeUpSettings(seeds=2), tmp_path)
    assert not (tmp_path / "results.json").exists()
    again = MadeUp()
    run_study(again, "smoke", MadeUpSettings(seeds=2), tmp_path)
    assert stopped.ran + again.ran == [case.name for case in again.cases(MadeUpSettings(seeds=2))]
    more = MadeUp()
    run_study(more, "smoke", MadeUpSettings(seeds=3, device="cpu"), tmp_path)
    assert more.ran == ["n=1,seed=12", "n=2,seed=12"]


def test_other_settings_are_refused_and_the_cases_stay(tmp_path: Path) -> None:
    run_study(MadeUp(), "smoke", MadeUpSettings(seeds=1), tmp_path)
    with pytest.raises(UsageError, match=r"holds a study with gain 1.0, not 2.0; give another --out"):
        run_study(MadeUp(), "smoke", MadeUpSettings(seeds=1, gain=2.0), tmp_path)
    with pytest.raises(UsageError, match="holds a study with scale smoke, not cpu"):
        run_study(MadeUp(), "cpu", MadeUpSettings(seeds=1), tmp_path)
    assert len(list((tmp_path / "cases").glob("*.json"))) == 2


def test_two_runs_into_one_folder_are_refused(tmp_path: Path) -> None:
    with StudyFolder(tmp_path).claimed(), pytest.raises(UsageError, match="another study is running there"):
        run_study(MadeUp(), "smoke", MadeUpSettings(), tmp_path)
    run_study(MadeUp(), "smoke", MadeUpSettings(), tmp_path)


def test_a_case_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    run_study(MadeUp(), "smoke", MadeUpSettings(), tmp_path)
    (tmp_path / "cases" / "n=1,seed=10.json").write_text("{")
    with pytest.raises(UsageError, match=r"n=1,seed=10.json: cannot be read .* delete it and run the study again"):
        run_study(MadeUp(), "smoke", MadeUpSettings(), tmp_path)


def test_no_seed_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="seeds is 0"):
        run_study(MadeUp(), "smoke", MadeUpSettings(seeds=0), tmp_path)


def test_seeds_for_tuning_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="first_seed is 9, and seeds below 10 were used for tuning"):
        run_study(MadeUp(), "smoke", MadeUpSettings(first_seed=9), tmp_path)


def test_cases_run_at_once_and_the_time_left_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_study(MadeUp(), "cpu", MadeUpSettings(seeds=2), tmp_path, jobs=2)
    assert [case["points"] for case in found["cases"]] == [1.0, 1.1, 2.0, 2.1]
    told = capsys.readouterr().err
    assert told.count("left for the study") == 3


@pytest.mark.parametrize(
    "more, less, control, verdict",
    [
        ([2.0, 2.1, 2.2], [1.0, 1.5, 1.2], 1.0, "reproduced"),
        ([2.0, 2.1], [1.0, 1.1], 1.0, "direction only"),  # two seeds show no more
        ([2.0], [1.0], 1.0, "direction only"),
        ([2.0, 3.0, 1.0], [1.0, 2.5, 0.8], 1.0, "null"),  # every seed, and less than two standard errors
        ([1.0, 1.0], [1.0, 1.0], 1.0, "null"),
        ([1.0, 2.0, 1.0], [2.0, 3.0, 2.0], 1.0, "null"),  # the opposite is no lesser null
        ([2.0, 2.1, 2.2], [1.0, 1.5, 1.2], 0.5, "out of reach"),
    ],
)
def test_verdicts(more: list[float], less: list[float], control: float, verdict: str) -> None:
    controls = [Control("solved", control, 0.9)]
    assert judge([contrast("more over less", more, less)], controls=controls) == verdict


def test_the_bar_is_two_pooled_standard_errors() -> None:
    each = contrast("a", [2.0, 3.0, 4.0], [1.0, 1.0, 4.0])
    assert each.bar == pytest.approx(2 * (1 / 3 + 3 / 3) ** 0.5)
    assert contrast("b", [1.0, 1.0], [0.0, 0.0], margin=0.1).bar == 0.1


def test_a_claim_is_null_without_its_essential_contrast() -> None:
    holds = contrast("a", [2.0, 2.1, 2.2], [1.0, 1.1, 1.2])
    fails = contrast("b", [1.0, 1.1, 1.2], [2.0, 2.1, 2.2], essential=True)
    assert judge([holds, holds, fails]) == "null"
    assert judge([replace(holds, essential=True), holds, replace(fails, essential=False)]) == "direction only"


def test_a_verdict_over_several_contrasts() -> None:
    holds, not_at_all = contrast("a", [2.0] * 3, [1.0] * 3), contrast("b", [1.0] * 3, [2.0] * 3)
    assert judge([holds, holds]) == "reproduced"
    assert judge([holds, holds, not_at_all]) == "direction only"
    assert judge([holds, not_at_all]) == "null"
    assert judge([]) == "out of reach"
    within_noise = contrast("c", [1.02, 1.03], [1.0, 1.0], margin=0.05)
    assert not within_noise.leans and judge([within_noise]) == "null"
    assert not_at_all.reversed and not holds.reversed
