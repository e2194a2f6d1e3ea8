"""Measure what Headstart costs: `python -m bench loss|train|decode|adapt|load|serve [settings]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headstart.cli import run_program
from headstart.command_line import parse_settings
from headstart.console import print_json
from headstart.errors import UsageError


def bench(arguments: list[str]) -> None:
    """Measure what it costs: headstart bench loss|train|decode|adapt|load|serve [--out DIR] [--json] [settings]."""
    json, arguments = "--json" in arguments, [argument for argument in arguments if argument != "--json"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(bench.__doc__)
        return
    # Heavy: torch.
    from bench import adapt, decode, load, loss, report, serve, train
    from bench.decode_settings import DecodeSettings
    from bench.train_steps import TrainSettings

    benchmarks: dict[str, tuple[Any, Callable[[Any], dict[str, Any]]]] = {
        "loss": (loss.LossSettings, loss.run),
        "train": (TrainSettings, train.run),
        "decode": (DecodeSettings, decode.run),
        "adapt": (adapt.AdaptSettings, adapt.run),
        "serve": (serve.ServeSettings, serve.run),
        "load": (load.LoadSettings, load.run),
    }
    if arguments[0] not in benchmarks:
        raise UsageError(f"there is no benchmark {arguments[0]!r}; take one of {', '.join(benchmarks)}")
    settings_type, run = benchmarks[arguments[0]]
    settings = parse_settings(settings_type, arguments[1:], f"headstart bench {arguments[0]}")
    result = run(settings)
    report.write(result, settings.out)
    print_json(result) if json else print(report.format_markdown(result))


if __name__ == "__main__":
    run_program(bench)
