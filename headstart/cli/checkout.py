"""Commands whose programs lie next to the package in a checkout, and not in an installation: bench, study."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from headstart.errors import UsageError


def bench(arguments: list[str]) -> None:
    """Measure what it costs: headstart bench loss|train|decode|adapt|load|serve [--out DIR] [--json] [settings]."""
    _program("bench").bench(arguments)


def study(arguments: list[str]) -> None:
    """Rerun an experiment of the paper: headstart study NAME --scale smoke|cpu|gpu|paper [--seeds N] [--out DIR]."""
    _program("studies").study(arguments)


def _program(folder: str) -> Any:
    """Import `folder`.__main__ from the checkout that this package lies in."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / folder / "__main__.py").is_file():
        raise UsageError(
            f"{folder}/ belongs to Headstart's source, not to an installation; "
            f"clone the repository and run python -m {folder} there"
        )
    sys.path.insert(0, str(checkout))
    return importlib.import_module(f"{folder}.__main__")
