"""What commands share: threads, and results as JSON."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable
from typing import Any

import tyro

from headstart.command_line import add_repeated
from headstart.errors import UsageError

MOST_THREADS = 4096


def use_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        if not 1 <= threads <= MOST_THREADS:
            raise UsageError(f"--threads is {threads}; it must be at least 1, and at most {MOST_THREADS}")
        torch.set_num_threads(threads)


def print_json(result: object) -> None:
    print(json_module.dumps(result, indent=2, default=str))


def measure(
    command: str, arguments: list[str], settings_type: Any, run: Callable[[Any], Any], text: Callable[[Any], str]
) -> None:
    """A command that parses `arguments` into its settings, and prints what it finds (--json: as JSON)."""
    json, arguments = "--json" in arguments, [argument for argument in arguments if argument != "--json"]
    once = (tyro.conf.AvoidSubcommands,)
    settings = tyro.cli(
        settings_type, prog=f"headstart {command}", args=add_repeated(settings_type, arguments), config=once
    )
    use_threads(settings.threads)
    found = run(settings)
    print_json(found) if json else print(text(found))
