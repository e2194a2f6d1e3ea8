"""`headstart compare`: compare training runs on one page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from headstart.console import print_result, say


@dataclass(frozen=True)
class CompareSettings:
    """Compare training runs on one HTML page: losses, speed, settings that differ."""

    runs: Positional[list[Path]]
    """Run folders, at least one; a run may still be running."""
    out: Path | None = None
    """The page to write (None: runs/comparison.html; none with --json)."""
    json: bool = False
    """Print final numbers and differing settings as JSON."""


def run(settings: CompareSettings) -> None:
    """Write the page and print the final numbers of the runs."""
    from headstart.reports.compare import compare, format_comparison

    page = Path("runs/comparison.html") if settings.out is None and not settings.json else settings.out
    print_result(compare(settings.runs, page), settings.json, format_comparison)
    if page is not None:
        say(f"page: {page}")
