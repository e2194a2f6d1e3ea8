"""docs/studies holds a report and a figure of every study that was run, and an index of all studies."""

from __future__ import annotations

from pathlib import Path

import pytest

from studies.report import PARTS
from studies.run import STUDIES, find_study

DOCS = Path(__file__).parents[2] / "docs" / "studies"
FOLDERS = sorted(file.parent for file in DOCS.glob("*/report.md"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_report_and_index_state_the_claim_of_the_study(folder: Path) -> None:
    study = find_study(folder.name)
    report, index = ((folder.parent / name).read_text(encoding="utf-8") for name in (folder / "report.md", "index.md"))
    assert study.claim in report and study.published in report
    assert f"[{study.name}]({study.name}/report.md)" in index and study.claim.replace("|", "\\|") in index
    assert [part for part in PARTS if f"**{part}" not in report] == [] and study.cannot_show in report
    assert f"`headstart study {study.name} --scale " in report and f"at equal {study.compared_at}" in report
    assert (folder / "figure.png").stat().st_size > 5000


def test_the_index_names_every_study() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert FOLDERS and [name for name in STUDIES if f"[{name}]" not in index and f"| {name} |" not in index] == []
