"""The `headstart` command: the table of commands, the parsing of their settings, and errors as exit statuses.

A command lives in `headstart/commands/NAME.py`, which is imported when the command runs: `headstart --help` answers
without torch. Such a module has a dataclass of settings, whose fields are the options, and `run(settings)`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

from headstart.command_line import parse_settings
from headstart.console import say
from headstart.errors import Stopped, UsageError

COMMANDS = {
    "demo": "Train a small model on Python's own sources, decode with it, and write a report.",
    "prepare": "Turn text, code and datasets into token shards for training.",
    "train": "Train a model from a configuration file.",
    "adapt": "Add heads to an existing model and train them, so that it decodes several tokens per pass.",
    "compare": "Compare training runs on one HTML page: losses, speed, settings that differ.",
    "distill-data": "Let a model write the text that its heads are then trained on.",
    "generate": "Continue a prompt, and print the text as it is decoded.",
    "serve": "Serve a model behind an OpenAI-compatible API, with a page to try it at /.",
    "evaluate": "Measure how well a model predicts text, head by head, and how many of its drafts are accepted.",
    "tune": "Measure how often drafts are right and what a pass costs here; decoding then chooses how many to feed.",
    "inspect": "Show what a model directory holds: sizes, heads, wiring, acceptance.",
    "convert": "Write a model in another format, read it back and compare the two.",
    "push": "Put a model, or draft heads alone, and a model card into a folder, or onto the Hugging Face hub.",
    "doctor": "Check machine, versions and threads; with a model, check that speculation equals plain decoding.",
    "bench": "Measure what Headstart costs (in a checkout): headstart bench loss|train|decode|passes|adapt|load|serve.",
    "study": "Rerun an experiment of the papers (in a checkout): headstart study NAME --scale smoke|cpu|gpu|paper.",
}
"""The commands, each with its line in `headstart --help`."""
CHECKOUT_PROGRAMS = {"bench": "bench", "study": "studies"}
"""Commands that are functions of a program in a folder next to the package, which only a checkout has."""


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 failed, 2 wrong use, 75 pre-empted, 130 interrupted."""
    run_program(run_command)


def run_command(arguments: list[str]) -> None:
    """Run the command that the first argument names, or print help or the version."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(_help())
    elif name == "--version":
        from headstart import __version__

        print(__version__)
    elif name not in COMMANDS:
        raise UsageError(f"there is no command {name!r}; take one of {', '.join(COMMANDS)}")
    elif name in CHECKOUT_PROGRAMS:
        getattr(_checkout_program(CHECKOUT_PROGRAMS[name]), name)(arguments[1:])
    else:
        command = importlib.import_module(f"headstart.commands.{name.replace('-', '_')}")
        command.run(_parse(settings_of(command), name, arguments[1:]))


def settings_of(command: Any) -> Any:
    """Return the settings class of a module of `headstart.commands`: what its `run` takes."""
    return get_type_hints(command.run)["settings"]


def _parse(settings_type: Any, name: str, arguments: list[str]) -> Any:
    """Parse the arguments of a command; settings that depend on a file (`train`) have a `parse` of their own."""
    if hasattr(settings_type, "parse"):
        return settings_type.parse(arguments)
    return parse_settings(settings_type, arguments, f"headstart {name}")


def _help() -> str:
    width = 2 + max(map(len, COMMANDS))
    return "\n".join(
        [
            "headstart: train language models that predict several tokens at once, decode several tokens per pass",
            "",
            "usage: headstart COMMAND [arguments]     headstart COMMAND --help",
            "",
            *(f"  {name:<{width}}{line}" for name, line in COMMANDS.items()),
            "",
            "  --debug   show the traceback of an error",
            "  --version",
        ]
    )


def _checkout_program(folder: str) -> Any:
    """Import `folder`.__main__ from the checkout that holds this package."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / folder / "__main__.py").is_file():
        raise UsageError(
            f"{folder}/ belongs to Headstart's source, not to an installation; "
            f"clone the repository and run python -m {folder} there"
        )
    sys.path.insert(0, str(checkout))
    return importlib.import_module(f"{folder}.__main__")


def run_program(program: Callable[[list[str]], None]) -> None:
    """Run `program` with the arguments of this process; an error becomes one line and an exit status."""
    debug = "--debug" in sys.argv
    try:
        program([argument for argument in sys.argv[1:] if argument != "--debug"])
    except BrokenPipeError:
        # The reader of our output is gone (`headstart ... | head`), which is no error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except Stopped as stop:
        say(f"headstart: {stop}")
        raise SystemExit(stop.status) from None
    except (KeyboardInterrupt, UsageError, OSError) as error:
        if debug:
            raise
        message, status = _describe(error)
        if message:
            print(f"headstart: {message}", file=sys.stderr)
        raise SystemExit(status) from None


def _describe(error: BaseException) -> tuple[str, int]:
    """Return the line that reports `error` ("": another process has reported it) and the exit status."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, UsageError):
        return "" if error.said else str(error), error.status
    assert isinstance(error, OSError)
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error} (--debug shows where)", 1
