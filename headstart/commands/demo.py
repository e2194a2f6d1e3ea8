"""`headstart demo`: train a small model, decode with it, and write a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from headstart.console import print_json
from headstart.hardware import use_threads


@dataclass(frozen=True)
class DemoSettings:
    """Train a small model on Python's own sources, decode with it, and write a report."""

    out: Path = Path("runs/demo")
    """Run folder; the report is OUT/report.html. A finished demo is trained again."""
    minutes: float = 3.5
    """Minutes of training; decoding takes about one minute more."""
    seed: int = 0
    """Seed of weights, data order and sampling."""
    threads: int | None = None
    """CPU threads (None: all cores, and fewer while other programs keep them busy)."""
    json: bool = False
    """Print the results as JSON."""


def run(settings: DemoSettings) -> None:
    """Run the demo and say where the report is."""
    from headstart.commands.demo_run import run_demo

    use_threads(settings.threads)
    result = run_demo(settings.out, minutes=settings.minutes, seed=settings.seed, threads=settings.threads)
    if settings.json:
        print_json(result)
