"""Measure what Headstart costs: `python -m bench loss|train|decode|passes|adapt|load|serve|engines [settings]`."""

from __future__ import annotations

import importlib

from headstart.cli import run_program
from headstart.command_line import parse_settings
from headstart.console import print_json
from headstart.errors import UsageError

BENCHMARKS = ("loss", "train", "decode", "passes", "adapt", "load", "serve", "engines")


def bench(arguments: list[str]) -> None:
    """Measure costs, and prove exports: headstart bench NAME [--out DIR] [--json] [settings].

    NAME is loss, train, decode, passes, adapt, load, serve or engines.
    """
    json, arguments = "--json" in arguments, [argument for argument in arguments if argument != "--json"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(bench.__doc__)
        return
    if arguments[0] not in BENCHMARKS:
        raise UsageError(f"there is no benchmark {arguments[0]!r}; take one of {', '.join(BENCHMARKS)}")
    module, report = (importlib.import_module(f"bench.{name}") for name in (arguments[0], "report"))  # heavy: torch
    settings = parse_settings(module.Settings, arguments[1:], f"headstart bench {arguments[0]}")
    result = module.run(settings)
    report.write(result, settings.out)
    print_json(result) if json else print(report.format_markdown(result))


if __name__ == "__main__":
    run_program(bench)
