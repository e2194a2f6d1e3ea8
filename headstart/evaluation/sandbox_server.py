"""Runs programs that nobody has read, each in a process of its own, forked from this one, which is small and warm.

Started by `sandbox.Sandbox` as a script of the standard library alone. A request and an answer are each a line of JSON.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NoReturn

OUTPUT = 1 << 20
"""Bytes of a program's output that are kept; a program that writes more is killed."""


def _seccomp() -> ModuleType:
    # Isolated from its folder (-I), so that a program cannot put modules in the way of it.
    spec = importlib.util.spec_from_file_location("seccomp", Path(__file__).with_name("seccomp.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def limit(memory: int, seconds: float) -> None:
    """Hard limits of this process: memory, processor time, no files, no core."""
    whole = int(seconds) + 1
    for what, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, whole),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(what, (value, value))


def child(request: dict[str, Any], fds: dict[str, int], secret: bytes, seccomp: ModuleType) -> NoReturn:
    """The process of one program. Never returns; what it found goes to the pipe `result`, then it ends: `secret`, which
    a program cannot guess, if it passed, else why not."""
    write, leave = os.write, os._exit  # a program may put others in their place
    os.setsid()
    for target, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(fds[name], target)
    os.dup2(fds["result"], 3)
    os.closerange(4, 256)
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.setrecursionlimit(10_000)
    sys.argv, sys.dont_write_bytecode = ["program.py"], True
    os.environ.clear()
    os.environ.update(PATH="/usr/bin:/bin", HOME="/nonexistent", LANG="C.UTF-8")
    os.chdir("/")
    space: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    kept = dict(vars(sys.modules["builtins"]))
    verdict = b""
    try:
        tests: CodeType | None = compile(request["tests"], "tests.py", "exec") if request["tests"] else None
        run = exec
        limit(request["memory"], request["seconds"])
        seccomp.confine()
        try:
            run(compile(request["program"], "program.py", "exec"), space)
        except SystemExit as end:
            # A program that reads and writes may end by itself; one that is tested afterwards may not.
            if tests is not None or end.code not in (None, 0):
                raise RuntimeError(f"the program ended itself: exit({end.code!r})") from None
        if tests is not None:
            # What the tests call is what it was before the program ran.
            vars(sys.modules["builtins"]).update(kept)
            sys.settrace(None)
            run(tests, space)
        sys.stdout.flush()
        verdict = secret
    except BaseException as error:
        with contextlib.suppress(BaseException):
            verdict = f"{type(error).__name__}: {error}".encode("utf-8", "replace")[:2000]
    with contextlib.suppress(BaseException):
        write(3, verdict or b"failed")
    leave(0)


def run(request: dict[str, Any], seccomp: ModuleType) -> dict[str, Any]:
    """Runs one program; its answer says how it ended, and what it wrote."""
    began, secret = time.monotonic(), os.urandom(16)
    pipes = {name: os.pipe() for name in ("stdin", "stdout", "stderr", "result")}
    ours = {name: pipe[name == "stdin"] for name, pipe in pipes.items()}
    theirs = {name: pipe[name != "stdin"] for name, pipe in pipes.items()}
    pid = os.fork()
    if pid == 0:
        for fd in ours.values():
            os.close(fd)
        # High numbers, so that 0 to 3 are free for it.
        moved = {name: os.dup2(fd, 100 + i) for i, (name, fd) in enumerate(theirs.items())}
        child(request, moved, secret, seccomp)
    for fd in theirs.values():
        os.close(fd)
    feed, found, ended = request["stdin"].encode(), {name: b"" for name in ("stdout", "stderr", "result")}, ""
    names = {ours[name]: name for name in found}
    os.set_blocking(ours["stdin"], False)
    open_fds, stdin = set(names), ours["stdin"]
    if not feed:
        os.close(stdin)
        stdin = -1
    # Only a thread that went on would keep the pipes open once the verdict is there.
    while open_fds and not (ended or found["result"]):
        left = began + request["seconds"] - time.monotonic()
        if left <= 0:
            ended = "timeout"
            break
        readable, writable, _ = select.select(list(open_fds), [stdin] if stdin >= 0 else [], [], left)
        for fd in readable:
            piece = os.read(fd, 1 << 16)
            found[names[fd]] += piece
            if not piece:
                open_fds.discard(fd)
            if len(found["stdout"]) > OUTPUT or len(found["stderr"]) > OUTPUT:
                ended = "output"
        if writable:
            try:
                feed = feed[os.write(stdin, feed[: 1 << 16]) :]
            except OSError:
                feed = b""
            if not feed:
                os.close(stdin)
                stdin = -1
    # What it wrote before the verdict lies in the pipes.
    for fd in open_fds - {ours["result"]}:
        os.set_blocking(fd, False)
        with contextlib.suppress(OSError):
            while len(found[names[fd]]) <= OUTPUT and (piece := os.read(fd, 1 << 16)):
                found[names[fd]] += piece
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    for fd in [*names, *([stdin] if stdin >= 0 else [])]:
        os.close(fd)
    passed = found["result"] == secret
    return {
        "status": ended or ("passed" if passed else _status(found["result"], status)),
        "detail": "" if passed else found["result"].decode("utf-8", "replace").strip(": \n"),
        "stdout": found["stdout"][:OUTPUT].decode("utf-8", "replace"),
        "seconds": time.monotonic() - began,
    }


def _status(result: bytes, status: int) -> str:
    """How a program that did not pass ended."""
    if result.startswith(b"MemoryError"):
        return "memory"
    if not result and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return "timeout"
    return "failed"


def main() -> None:
    sys.set_int_max_str_digits(0)  # tests and answers of some problems have more digits than Python reads by itself
    seccomp = _seccomp()
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    # A forked program has neither.
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    for line in requests:
        answers.write(json.dumps(run(json.loads(line), seccomp)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
