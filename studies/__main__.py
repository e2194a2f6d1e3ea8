"""Rerun an experiment of the papers: `python -m studies NAME --scale smoke|cpu|gpu|paper`."""

from __future__ import annotations

from pathlib import Path

from headstart.cli import run_program
from headstart.command_line import parse_settings
from headstart.console import format_table, print_json
from headstart.errors import UsageError
from headstart.hardware import use_threads


def study(arguments: list[str]) -> None:
    """Rerun an experiment of the paper: headstart study NAME --scale smoke|cpu|gpu|paper [--seeds N] [--out DIR].

    Started again, it resumes where it was stopped. All its settings are flags: headstart study NAME --help.

    NAME --scale S   name of the study (see --list), and its budget (default: cpu)
    --out DIR        folder of the results (default: runs/studies/NAME-SCALE)
    --threads N      CPU threads
    --jobs N         conditions that run at once, each in a process of its own (default: 1)
    --json           print the results as JSON
    --list           print the names and claims of all studies
    """
    # Heavy: torch.
    from studies.run import STUDIES, find_study, run_study
    from studies.study import SCALES

    json, arguments = "--json" in arguments, [argument for argument in arguments if argument != "--json"]
    if "--list" in arguments:
        studies = [find_study(name) for name in STUDIES]
        if json:
            print_json([{"study": s.name, "section": s.section, "claim": s.claim} for s in studies])
        else:
            print(format_table(["study", "section", "claim"], [[s.name, s.section, s.claim] for s in studies]))
        return
    if not arguments or arguments[0] in ("-h", "--help"):
        print(study.__doc__)
        return
    name, *rest = arguments
    scale, out, threads, jobs = (_take_value(rest, flag) for flag in ("--scale", "--out", "--threads", "--jobs"))
    chosen, scale = find_study(name), scale or "cpu"
    if scale not in SCALES:
        raise UsageError(f"--scale {scale!r} is unknown; take one of {', '.join(SCALES)}")
    for flag, text in (("--threads", threads), ("--jobs", jobs)):
        if text is not None and not text.isdigit():
            raise UsageError(f"{flag} is {text!r}; it must be a number")

    default = chosen.scales[scale]
    settings = parse_settings(type(default), rest, f"headstart study {name} --scale {scale}", default)
    use_threads(None if threads is None else int(threads))
    found = run_study(chosen, scale, settings, None if out is None else Path(out), int(jobs or 1))
    if json:
        print_json(found)


def _take_value(arguments: list[str], flag: str) -> str | None:
    """Remove `flag` from `arguments` and return its value."""
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
