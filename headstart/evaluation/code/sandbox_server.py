"""Run programs that nobody has read, each in a process of its own, forked from this one, which is small and warm.

`sandbox.Sandbox` starts Python on the script `program.py`, which does not exist yet, with this file as `sitecustomize`:
Python imports it after its own start and before it opens the script. The server stays at this point and forks for every
request. Each child confines itself and returns: Python opens the script, which exists by then, runs it as `__main__`
and ends, exactly as `python program.py` does. This file uses the standard library alone. Requests and answers are lines
of JSON.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import importlib.util
import json
import os
import platform
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

OUTPUT = 1 << 20
"""The most bytes of a program's output; a program that writes more is killed."""
DESCRIPTORS = 64
"""The most open files of a program."""
RESULT, TESTS = DESCRIPTORS - 2, DESCRIPTORS - 1
"""Descriptors of a program with tests: the verdict goes to one, the tests and then the secret come from the other."""
TESTED = '\n__import__("sys").settrace(None); __import__("sitecustomize").run_tests()\n'
"""The last line of a program with tests."""
ENVIRONMENT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH")
_BUILTINS = dict(vars(builtins))


def _load(name: str) -> ModuleType:
    # By path, and not in sys.modules: a program must find the same modules as without the sandbox.
    spec = importlib.util.spec_from_file_location(name, Path(__file__).resolve().with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def limit(memory: int, seconds: float) -> None:
    """Set hard limits on this process: memory, processor time, no files, no core."""
    whole = int(seconds) + 1
    for what, soft, hard in (
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_CPU, whole, whole + 1),
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS),
    ):
        resource.setrlimit(what, (soft, hard))


class Server:
    """The process that forks one process per program."""

    def __init__(self) -> None:
        self._confinement, self._seccomp = _load("confinement"), _load("seccomp")
        self._confinement.drop_capabilities()
        self._confinement.hide_memory()
        self._rules = self._confinement.FileRules()
        self._seccomp.program(platform.machine(), 0)  # caches the part that all filters share
        self._pid = os.getpid()
        # The one difference to plain Python: some tests and answers have more digits than it reads by default.
        sys.set_int_max_str_digits(0)
        # The garbage collector of a forked process would touch, and so copy, all objects of this one.
        gc.collect()
        gc.freeze()

    def run(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Run one program and return its answer; return None in the program's own process."""
        began, secret = time.monotonic(), os.urandom(16)
        tests = request["tests"].encode("utf-8", "surrogatepass")
        source = request["program"] + (TESTED if tests else "\n")
        Path("program.py").write_bytes(source.encode("utf-8", "surrogatepass"))
        given = {"stdin": request["stdin"].encode("utf-8", "surrogatepass")}
        found = {"stdout": b"", "stderr": b""}
        if tests:
            given["tests"], found["result"] = len(tests).to_bytes(8, "little") + tests + secret, b""
        pipes = {name: os.pipe() for name in (*given, *found)}
        theirs = {name: pipes[name][name in found] for name in pipes}
        pid = os.fork()
        if pid == 0:
            self._become(theirs, request)
            return None
        for fd in theirs.values():
            os.close(fd)
        process = _Process(pid, began + request["seconds"])
        feeds = {pipes[name][1]: memoryview(data) for name, data in given.items()}
        ended = process.exchange(feeds, {pipes[name][0]: name for name in found}, found)
        status = process.end()
        passed = found["result"] == secret if tests else not ended and status == 0
        detail = "" if passed else _reason(found, status, ended)
        return {
            "status": "passed" if passed else ended or _status(detail, status),
            "detail": detail,
            "stdout": found["stdout"][:OUTPUT].decode("utf-8", "replace"),
            "seconds": time.monotonic() - began,
        }

    def _become(self, fds: dict[str, int], request: dict[str, Any]) -> None:
        """Turn this forked process into that of a program: its descriptors, names, limits and rules."""
        os.setpgid(0, 0)
        self._confinement.end_with(self._pid)
        self._rules.apply()
        # High numbers first, so that no descriptor overwrites another.
        moved = {name: os.dup2(fd, 1000 - i) for i, (name, fd) in enumerate(fds.items())}
        os.closerange(3, 1000 - len(fds))
        for name, target in (("stdin", 0), ("stdout", 1), ("stderr", 2), ("result", RESULT), ("tests", TESTS)):
            if name in fds:
                os.dup2(moved[name], target)
        os.closerange(DESCRIPTORS, 1024)
        if "tests" in fds:
            sys.excepthook = _report
        # The old module is frozen, so its objects would never be freed.
        main = ModuleType("__main__")
        vars(main).update(vars(sys.modules["__main__"]), __annotations__={})
        sys.modules["__main__"] = main
        sys.dont_write_bytecode = True
        limit(request["memory"], request["seconds"])
        self._seccomp.confine()


class _Process:
    """The process of one program, seen from outside."""

    def __init__(self, pid: int, deadline: float) -> None:
        self._pid, self._deadline = pid, deadline

    def exchange(self, feeds: dict[int, memoryview], names: dict[int, str], found: dict[str, bytes]) -> str:
        """Write `feeds` and read into `found` until all is closed and the process has ended, or its verdict is there.

        Returns "timeout" or "output" if the process must be ended, else "".
        """
        ended, reading = "", set(names)
        for fd in feeds:
            os.set_blocking(fd, False)
        while reading and not (ended or found.get("result")):
            left = self._deadline - time.monotonic()
            if left <= 0:
                ended = "timeout"
                break
            for fd in [fd for fd, data in feeds.items() if not data]:
                os.close(fd)
                del feeds[fd]
            readable, writable, _ = select.select(list(reading), list(feeds), [], left)
            for fd in readable:
                piece = os.read(fd, 1 << 16)
                found[names[fd]] += piece
                if not piece:
                    reading.discard(fd)
                if len(found["stdout"]) > OUTPUT or len(found["stderr"]) > OUTPUT:
                    ended = "output"
            for fd in writable:
                try:
                    feeds[fd] = feeds[fd][os.write(fd, feeds[fd][: 1 << 16]) :]
                except OSError:
                    feeds[fd] = feeds[fd][:0]
        # Output from before the verdict may still lie in the pipes.
        for fd in reading:
            os.set_blocking(fd, False)
            with contextlib.suppress(OSError):
                while len(found[names[fd]]) <= OUTPUT and (piece := os.read(fd, 1 << 16)):
                    found[names[fd]] += piece
        if not (ended or found.get("result")):
            ended = self._wait()
        for fd in (*names, *feeds):
            os.close(fd)
        return ended

    def _wait(self) -> str:
        """Wait until a process that has closed its output ends, which it usually has already."""
        pause = 0.0001
        while os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > self._deadline:
                return "timeout"
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        return ""

    def end(self) -> int:
        """Kill the process if it is still running, and return its wait status."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        return os.waitpid(self._pid, 0)[1]


def _reason(found: dict[str, bytes], status: int, ended: str) -> str:
    """Return the exception that ended a program, as its standard error shows it, or else how it ended."""
    lines = found["stderr"].decode("utf-8", "replace").splitlines()
    places = [i for i, line in enumerate(lines) if line.startswith('  File "')]
    if places:
        # Source lines and their marks are indented; the exception follows them.
        shown = [i for i in range(places[-1] + 1, len(lines)) if not lines[i].startswith(" ")]
        if shown:
            return "\n".join(lines[shown[0] :]).strip()[:2000]
    last = lines[-1][:2000] if lines else ""
    if ended or found.get("result"):
        return last or found.get("result", b"").decode("utf-8", "replace")[:2000]
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"the program ended itself with exit status {os.WEXITSTATUS(status)}" + (last and f": {last}")


def _status(detail: str, status: int) -> str:
    """Return how a program that did not pass ended."""
    if detail.endswith("MemoryError") or detail.partition(":")[0].endswith("MemoryError"):
        return "memory"
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return "timeout"
    return "failed"


def _report(
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
    write: Callable[[int, bytes], int] = os.write,
) -> None:
    """Show an exception that ends a program as usual, and report failure at once: threads may still run."""
    sys.__excepthook__(kind, error, trace)
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.flush()
    write(RESULT, b"failed")


def _take(count: int, read: Callable[[int, int], bytes] = os.read) -> bytes:
    data = b""
    while len(data) < count:
        piece = read(TESTS, count - len(data))
        if not piece:
            raise EOFError("the tests are gone")
        data += piece
    return data


def run_tests(write: Callable[[int, bytes], int] = os.write) -> None:
    """Run the tests in the namespace of the program, whose last line calls this, and send the secret if they pass.

    While the program runs, this process holds neither the tests nor the secret; while the tests run, it does not hold
    the secret. So a verdict can be forged on purpose, but not by accident.
    """
    vars(builtins).update(_BUILTINS)  # tests call the builtins from before the program ran
    tests = _take(int.from_bytes(_take(8), "little"))
    try:
        exec(compile(tests, "tests.py", "exec", dont_inherit=True), sys._getframe(1).f_globals)
    except SystemExit as end:
        if not _unittest_passed(end):
            raise
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stdout.flush()
    write(RESULT, _take(16))


def _unittest_passed(end: SystemExit) -> bool:
    """Return whether the process ends in a `unittest.main()` that ran some tests and failed none."""
    trace = end.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    main = trace and trace.tb_frame.f_locals.get("self")
    unittest = sys.modules.get("unittest")
    if trace is None or unittest is None or not isinstance(main, unittest.TestProgram):
        return False
    return not end.code and main.result.testsRun > 0 and main.result.wasSuccessful()


def _requests() -> Any:
    """Yield the lines of standard input without using sys.stdin, which belongs to the programs."""
    buffer = bytearray()
    while piece := os.read(0, 1 << 20):
        buffer += piece
        if piece.endswith(b"\n"):
            yield json.loads(buffer)
            buffer.clear()


def _answer(found: dict[str, Any]) -> None:
    data = memoryview(json.dumps(found).encode() + b"\n")
    while data:
        data = data[os.write(1, data) :]


def serve() -> None:
    """Answer requests until there are no more, then end. Return only in the processes of programs.

    If a server returned or raised, Python would run its script; so it never does.
    """
    try:
        folder = os.getcwd()
        sys.path.remove(folder)
        for name in set(os.environ) - set(ENVIRONMENT):
            del os.environ[name]
        try:
            server = Server()
        except OSError as error:
            _answer({"refused": error.strerror})
            os._exit(1)
        _answer({"ready": True})
        for request in _requests():
            answer = server.run(request)
            if answer is None:
                return
            _answer(answer)
        for name in os.listdir(folder):
            os.unlink(name)
        os.rmdir(folder)
    except BaseException:
        traceback.print_exc()
    os._exit(70)


if __name__ == "sitecustomize":
    serve()
