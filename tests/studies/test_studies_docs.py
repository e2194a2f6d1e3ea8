"""docs/studies: what was run lies there whole, and the index says of it what its results say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from studies.catalogue import STUDIES, study_called
from studies.report import format_report, index_row

DOCS = Path(__file__).parents[2] / "docs" / "studies"
FOLDERS = sorted(file.parent for file in DOCS.glob("*/results.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_results_report_figure_and_index_agree(folder: Path) -> None:
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    study = study_called(folder.name)
    assert (found["study"], found["claim"], found["published"]) == (study.name, study.claim, study.published)
    assert found["scale"] in ("cpu", "gpu", "paper") and found["cases"] and found["machine"]["torch"]
    assert (folder / "report.md").read_text(encoding="utf-8") == format_report(found)
    assert (folder / "figure.png").stat().st_size > 5000
    assert index_row(found) in (DOCS / "index.md").read_text(encoding="utf-8").splitlines()


def test_the_index_names_every_study() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert FOLDERS and [name for name in STUDIES if f"[{name}]" not in index and f"| {name} |" not in index] == []
