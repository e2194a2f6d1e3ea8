"""Commands that look at models and machines: evaluate, tune, inspect, doctor."""

from __future__ import annotations

from tyro.conf import Positional

from headstart.cli.common import measure, print_json


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
