"""Commands that look at models and machines: evaluate, tune, inspect, doctor, bench."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tyro
from tyro.conf import Positional

from headstart.cli.common import measure, print_json
from headstart.command_line import add_repeated
from headstart.errors import UsageError


def evaluate(arguments: list[str]) -> None:
    """Measure what a model knows of a text, head by head, and how many of its drafts are right."""
    from headstart.commands import evaluate

    measure("evaluate", arguments, evaluate.EvaluateSettings, evaluate.run, evaluate.format_evaluation)


def tune(arguments: list[str]) -> None:
    """Measure what drafts are worth and what a pass costs here, for decoding to choose by."""
    from headstart.commands import tune

    measure("tune", arguments, tune.TuneSettings, tune.tune, tune.format_tuning)


def inspect(model: Positional[str | None] = None, json: bool = False) -> None:
    """Show what a model directory holds: sizes, heads, wiring, acceptance.

    Args:
        model: a model directory, or one of the paper's sizes (1M, 3M, ... 6.7B, 13B) (default: the model in the box).
        json: print it as JSON.
    """
    from headstart.commands.inspect import format_inspection
    from headstart.commands.inspect import inspect as inspect_model
    from headstart.formats.bundled import model_directory

    found = inspect_model(model_directory(None) if model is None else model)
    print_json(found) if json else print(format_inspection(found))


def doctor(model: Positional[str | None] = None, json: bool = False) -> None:
    """Look at machine, versions and threads; with a model, check that speculation equals plain decoding.

    Args:
        model: a model directory.
        json: print the findings as JSON.
    """
    from headstart.commands.doctor import diagnose, format_diagnosis

    found = diagnose(model)
    print_json(found) if json else print(format_diagnosis(found))
    if any(finding["status"] == "fail" for finding in found["findings"]):
        raise SystemExit(1)


def bench(arguments: list[str]) -> None:
    """Measure what it costs: headstart bench loss|train|decode|adapt|load|serve [--out DIR] [--json] [settings]."""
    json, arguments = "--json" in arguments, [argument for argument in arguments if argument != "--json"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(bench.__doc__)
        return
    from bench import adapt, decode, load, loss, report, serve
    from bench import train as training

    benchmarks: dict[str, tuple[Any, Callable[[Any], dict[str, Any]]]] = {
        "loss": (loss.LossSettings, loss.run),
        "train": (training.TrainSettings, training.run),
        "decode": (decode.DecodeSettings, decode.run),
        "adapt": (adapt.AdaptSettings, adapt.run),
        "serve": (serve.ServeSettings, serve.run),
        "load": (load.LoadSettings, load.run),
    }
    if arguments[0] not in benchmarks:
        raise UsageError(f"there is no benchmark {arguments[0]!r}; take one of {', '.join(benchmarks)}")
    settings_type, run = benchmarks[arguments[0]]
    once = (tyro.conf.AvoidSubcommands,)
    settings = tyro.cli(
        settings_type,
        prog=f"headstart bench {arguments[0]}",
        args=add_repeated(settings_type, arguments[1:]),
        config=once,
    )
    result = run(settings)
    report.write(result, settings.out)
    print_json(result) if json else print(report.format_markdown(result))
