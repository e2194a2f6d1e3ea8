"""The entry of the command line: help, the command asked for, and errors as exit statuses."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import tyro

from headstart.cli import COMMANDS, RAW
from headstart.command_line import add_repeated
from headstart.errors import UsageError


def _help() -> str:
    lines = [
        "headstart: train language models that predict several tokens at once, decode several tokens per pass",
        "",
        "usage: headstart COMMAND [arguments]     headstart COMMAND --help",
        "",
    ]
    width = 2 + max(map(len, COMMANDS))
    lines += [f"  {name:<{width}}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    lines += ["", "  --debug   show the traceback of an error", "  --version"]
    return "\n".join(lines)


def _dispatch(name: str, arguments: list[str]) -> None:
    command = COMMANDS[name]
    if command in RAW:
        command(arguments)
        return
    tyro.cli(command, prog=f"headstart {name}", args=add_repeated(command, arguments))


def main() -> None:
    """Entry point. Exit status: 0 done, 1 failed, 2 wrong use, 130 interrupted."""
    run_program(_command)


def _command(arguments: list[str]) -> None:
    """Run the command that the first argument names, or print help or the version."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
    elif arguments[0] == "--version":
        from headstart import __version__

        print(__version__)
    elif arguments[0] not in COMMANDS:
        raise UsageError(f"there is no command {arguments[0]!r}; take one of {', '.join(COMMANDS)}")
    else:
        _dispatch(arguments[0], arguments[1:])


def run_program(command: Callable[[list[str]], None]) -> None:
    """Run `command` with the arguments of this process; errors become one line and an exit status."""
    # Two threads of one product wait for each other by spinning. Where a core is shared, the spinning thread keeps
    # the other from its core for a whole time slice: products then take 8 ms whatever their size. A short spin costs
    # nothing on an idle machine. libgomp reads this once, when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        command(arguments)
    except KeyboardInterrupt:
        if debug:
            raise
        print("headstart: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except UsageError as error:
        if debug:
            raise
        if not error.said:
            print(f"headstart: {error}", file=sys.stderr)
        raise SystemExit(error.status) from None
    except BrokenPipeError:
        # The reader of our output has gone (`headstart ... | head`): that is no error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as error:
        if debug:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"headstart: {place}{error.strerror or error} (--debug shows where)", file=sys.stderr)
        raise SystemExit(1) from None
