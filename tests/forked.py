"""Run commands and programs in processes forked from this one, which has everything imported: this saves seconds each.

Reads JSON lines from standard input: {"headstart": [arguments]} or {"program": text, "arguments": [...]}; "outputs", a
file for the output of each process of the request; "environments", changes to the environment of each; "folder", where
they run; "load", modules that are imported here first, if any. Answers each with two lines: the process ids, and when
all have ended their exit statuses. tests/forks.py asks.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any

import torch
import torch._dynamo  # with the first optimiser: two seconds

import headstart.commands.doctor_checks
import headstart.reports.compare
import headstart.training.estimate
import headstart.training.loop  # noqa: F401
from headstart import cli

torch.set_num_threads(1)


def run(request: dict[str, Any]) -> None:
    if "program" in request:
        sys.argv = ["<program>", *request.get("arguments", [])]
        exec(compile(request["program"], "<program>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = ["headstart", *request["headstart"]]
        cli.main()


def child(request: dict[str, Any], output: str, environment: dict[str, str]) -> int:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    signal.alarm(600)  # ends a process that waits for ever, so that the tests continue
    os.environ.update(environment)
    os.chdir(request["folder"])
    try:
        run(request)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        for module in request.get("load", []):
            importlib.import_module(module)
        pids = []
        for output, environment in zip(request["outputs"], request["environments"]):
            if (pid := os.fork()) == 0:
                os._exit(child(request, output, environment))
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


if __name__ == "__main__":
    main()
