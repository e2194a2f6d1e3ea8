"""`headstart doctor`: check this machine, and that a model's speculation equals plain decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tyro.conf import Positional

from headstart import hardware
from headstart.console import print_result
from headstart.errors import UsageError


@dataclass(frozen=True)
class DoctorSettings:
    """Check machine, versions and threads; with a model, check that speculation equals plain decoding."""

    model: Positional[str | None] = None
    """A model directory or a GGUF file (None: check the machine alone)."""
    heads_from: str | None = None
    """A directory of draft heads for the model, or its name on the hub (docs/heads.md)."""
    json: bool = False
    """Print the findings as JSON."""


def run(settings: DoctorSettings) -> None:
    """Print the findings; the exit status is 1 if a check fails."""
    from headstart.commands.doctor_checks import diagnose

    if settings.heads_from is not None and settings.model is None:
        raise UsageError("--heads-from is for a model; name it")
    found = diagnose(settings.model, settings.heads_from)
    print_result(found, settings.json, format_diagnosis)
    if any(finding["status"] == "fail" for finding in found["findings"]):
        raise SystemExit(1)


def format_diagnosis(diagnosis: dict[str, Any]) -> str:
    """Format the result of `diagnose` for people, one line per finding."""
    lines = [hardware.summary(diagnosis["machine"]), ""]
    width = max(len(finding["name"]) for finding in diagnosis["findings"])
    for finding in diagnosis["findings"]:
        lines.append(f"{finding['status']:4}  {finding['name']:{width}}  {finding['sentence']}")
    verdict = {
        "ok": "All checks passed.",
        "warn": "Decoding works; the warnings above say what could be better.",
        "fail": "A check failed: see the lines that begin with fail.",
    }
    return "\n".join([*lines, "", verdict[diagnosis["verdict"]]])
