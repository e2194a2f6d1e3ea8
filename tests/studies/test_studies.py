"""Every study of the catalogue: its smoke runs, and its larger settings are models that can be built."""

from __future__ import annotations

from pathlib import Path

import pytest

from headstart.errors import UsageError
from studies.run import STUDIES, find_study, run_study
from studies.study import SCALES


@pytest.mark.parametrize("name", STUDIES)
def test_the_smoke_of_every_study_runs(name: str, tmp_path: Path, in_process: None) -> None:
    study = find_study(name)
    assert study.name == name and study.claim.endswith(".") and study.published
    found = run_study(study, "smoke", study.scales["smoke"], tmp_path)
    assert (
        found["sentence"] and found["table"]["rows"] and len(found["cases"]) == len(study.cases(study.scales["smoke"]))
    )
    assert all(len(row) == len(found["table"]["headers"]) for row in found["table"]["rows"])


@pytest.mark.parametrize("name", STUDIES)
def test_every_scale_has_cases_of_different_names(name: str) -> None:
    study = find_study(name)
    assert {*study.scales} == {*SCALES}
    for settings in study.scales.values():
        names = [case.name for case in study.cases(settings)]
        assert names and len({*names}) == len(names)


def test_a_study_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="there is no study 'sums'; take one of polynomial"):
        find_study("sums")
