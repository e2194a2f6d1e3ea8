"""headstart study: names, scales and flags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headstart.errors import UsageError
from studies.__main__ import study
from studies.run import STUDIES


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["sums"], "there is no study 'sums'"),
        (["polynomial", "--scale", "huge"], "--scale 'huge' is unknown; take one of smoke, cpu, gpu, paper"),
        (["polynomial", "--scale"], "--scale has no value"),
        (["polynomial", "--threads", "many"], "--threads is 'many'; it must be a number"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        study(arguments)


def test_the_list_names_every_study(capsys: pytest.CaptureFixture[str]) -> None:
    study(["--list", "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert [each["study"] for each in listed] == list(STUDIES) and all(each["claim"] for each in listed)
    study(["--list"])
    assert all(name in capsys.readouterr().out for name in ("induction",))


def test_settings_are_flags_and_results_are_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--scale=smoke", "--draws", "3", "--alphabets", "2", "--training.steps", "2", "--documents", "9"]
    study(["mutual-information", *flags, "--seeds", "2", "--out", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert found["settings"]["draws"] == 3 and found["settings"]["training"]["steps"] == 2
    assert len(found["cases"]) == 4 and "shows that the study runs" in found["sentence"]
    with pytest.raises(UsageError, match="holds a study with draws 3, not 4"):
        study(["mutual-information", *flags, "--draws", "4", "--seeds", "2", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        study(["mutual-information", "--scale", "smoke", "--drawn", "4"])
    assert stopped.value.code == 2
