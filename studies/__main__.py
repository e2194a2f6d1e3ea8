"""Rerun an experiment of the papers: `python -m studies NAME --scale smoke|cpu|gpu|paper`."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from headstart.cli import run_program
from headstart.command_line import parse_settings
from headstart.console import format_table, print_json
from headstart.errors import UsageError
from headstart.hardware import use_threads


def study(arguments: list[str]) -> None:
    """Rerun an experiment of the paper: headstart study NAME --scale smoke|cpu|gpu|paper [--seeds N] [--out DIR].

    Started again, it goes on where it was stopped. All its settings are flags: headstart study NAME --help.

    NAME --scale S   which study (--list: all of them), for which purse (default: cpu)
    --out DIR        where its results lie (default: runs/studies/NAME-SCALE)
    --threads N      CPU threads
    --json           print the results as JSON
    --list           print the studies, what each claims and what is known of it
    """
    from studies.catalogue import STUDIES, study_called
    from studies.run import run_study
    from studies.study import SCALES, Scale

    json, arguments = "--json" in arguments, [argument for argument in arguments if argument != "--json"]
    if "--list" in arguments:
        known = [study_called(name) for name in STUDIES]
        if json:
            print_json([{"study": s.name, "section": s.section, "claim": s.claim} for s in known])
        else:
            print(format_table(["study", "section", "claim"], [[s.name, s.section, s.claim] for s in known]))
        return
    if not arguments or arguments[0] in ("-h", "--help"):
        print(study.__doc__)
        return
    name, *rest = arguments
    wanted, out, threads = (_taken(rest, flag) for flag in ("--scale", "--out", "--threads"))
    chosen, scale = study_called(name), cast(Scale, wanted or "cpu")
    if scale not in SCALES:
        raise UsageError(f"--scale {scale!r} is unknown; take one of {', '.join(SCALES)}")
    if threads is not None and not threads.isdigit():
        raise UsageError(f"--threads is {threads!r}; it must be a number")

    default = chosen.scales[scale]
    settings = parse_settings(type(default), rest, f"headstart study {name} --scale {scale}", default)
    use_threads(None if threads is None else int(threads))
    found = run_study(chosen, scale, settings, None if out is None else Path(out))
    if json:
        print_json(found)


def _taken(arguments: list[str], flag: str) -> str | None:
    """The value of `flag`, which is taken out of `arguments`."""
    for at, argument in enumerate(arguments):
        if argument.startswith(flag + "="):
            return arguments.pop(at).removeprefix(flag + "=")
        if argument == flag:
            if at + 1 == len(arguments):
                raise UsageError(f"{flag} has no value; give it one")
            del arguments[at]
            return arguments.pop(at)
    return None


if __name__ == "__main__":
    run_program(study)
