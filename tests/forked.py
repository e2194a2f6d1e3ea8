"""Runs commands and programs in processes forked from this one, which has everything imported: seconds less each.

Reads JSON lines from standard input: {"headstart": [arguments]} or {"program": text}, and "output", a file for what the
process prints. Answers each with its exit status on a line.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

import headstart.benchmarks
import headstart.comparison.report
import headstart.doctor
import headstart.training.dry_run
import headstart.training.loop  # noqa: F401
from headstart import entry


def run(request: dict[str, Any]) -> None:
    if "program" in request:
        exec(compile(request["program"], "<program>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = ["headstart", *request["headstart"]]
        entry.main()


def child(request: dict[str, Any]) -> int:
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
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
        if (pid := os.fork()) == 0:
            status = child(json.loads(line))
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
