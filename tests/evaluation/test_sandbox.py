"""Hostile programs neither pass nor harm; honest ones run as anywhere."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

from headstart.errors import UsageError
from headstart.evaluation import sandbox as sandbox_module
from headstart.evaluation import seccomp
from headstart.evaluation.sandbox import Program, Sandbox, Verdict

pytestmark = pytest.mark.skipif(not seccomp.is_available(), reason="this system has no filter of system calls")


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(1) as sandbox:
        yield sandbox


def run(sandbox: Sandbox, program: str, tests: str = "pass", **more: object) -> Verdict:
    return sandbox.run([Program(program, tests, **more)])[0]  # type: ignore[arg-type]


HONEST = {
    "a function": ("def f(x): return x + 1", "assert f(1) == 2"),
    "what is behind it sees its names": ("import math\nr = [1]", "r.append(math.pi); assert len(r) == 2"),
    "as a script": ("ran = __name__ == '__main__'", "assert ran"),
    "threads": ("import threading\nt = threading.Thread(target=print)\nt.start(); t.join()", "pass"),
    "threads left behind": ("import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()", "pass"),
    "asyncio": ("import asyncio\nasync def f(): return 3\nr = asyncio.run(f())", "assert r == 3"),
    "reading a file": ("import os\nt = open(os.__file__).read(9)", "assert len(t) == 9"),
    "its limits": ("import resource as r\nl = r.getrlimit(r.RLIMIT_AS)", "assert l == (2**30, 2**30)"),
    "deep recursion": ("def f(n): return n and 1 + f(n - 1)\nr = f(5000)", "assert r == 5000"),
    "an assertion of its own that it catches": ("try: assert 0\nexcept AssertionError: r = 1", "assert r"),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_pass(sandbox, name) -> None:
    verdict = run(sandbox, *HONEST[name])
    assert verdict.passed, verdict


def test_a_program_that_reads_and_writes(sandbox) -> None:
    verdict = run(sandbox, "print(sum(map(int, input().split())))", "", stdin="1 2 3\n")
    assert verdict.passed and verdict.stdout == "6\n"
    assert run(sandbox, "import sys; print(len(sys.stdin.read()))", "", stdin="x" * 300_000).stdout == "300000\n"
    assert run(sandbox, "print('é'); import sys; sys.exit(0)", "").stdout == "é\n"
    assert run(sandbox, "print(1); import sys; sys.exit(3)", "").status == "failed"
    assert run(sandbox, "print('unread')", "", stdin="x" * 300_000).passed


WRONG = {
    "a failed test": ("def f(x): return x", "assert f(1) == 2", "AssertionError"),
    "an exception": ("1 / 0", "pass", "ZeroDivisionError: division by zero"),
    "no Python": ("def f(:", "pass", "SyntaxError"),
    "a name that is not there": ("", "f()", "NameError: name 'f'"),
    "endless recursion": ("def f(): f()\nf()", "pass", "RecursionError"),
    "a crash": ("import ctypes; ctypes.string_at(0)", "pass", ""),
    "an abort": ("import os; os.abort()", "pass", ""),
    # Leaving before the tests.
    "os._exit": ("import os; os._exit(0)", "assert 0", ""),
    "sys.exit": ("import sys; sys.exit(0)", "assert 0", "the program ended itself"),
    "exit at exit": ("import atexit, os; atexit.register(os._exit, 0); quit()", "assert 0", "ended itself"),
    "exec replaced": ("import builtins; builtins.exec = lambda *a: None", "assert 0", "AssertionError"),
    "AssertionError replaced": ("import builtins\nbuiltins.AssertionError = SystemExit", "assert 0", "AssertionError"),
    "abs replaced": ("import builtins\nbuiltins.abs = lambda x: 0\ndef f(): return 9", "assert abs(f()) == 0", ""),
    "a trace": ("import sys\nsys.settrace(lambda *a: quit())\ndef f(): return 1", "assert f() == 2", "AssertionError"),
    "the verdict forged": (
        "import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'passed')\n  except OSError: pass\nos._exit(0)",
        "assert 0",
        "passed",
    ),
    # Harm.
    "fork": ("import os\nwhile True: os.fork()", "pass", "PermissionError"),
    "a command": ("import subprocess; subprocess.run(['true'])", "pass", "PermissionError"),
    "os.system": ("import os\nassert os.system('true') == 0", "pass", "AssertionError"),
    "a process": ("import multiprocessing as m; m.Process(target=print).start()", "pass", "PermissionError"),
    "another program in its place": ("import os; os.execv('/bin/true', ['true'])", "pass", "PermissionError"),
    "threads without end": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()",
        "pass",
        "RuntimeError: can't start new thread",
    ),
    "files without end": ("i = 0\nwhile True: open(f'/tmp/eater{i}', 'w'); i += 1", "pass", "PermissionError"),
    "appending": ("open('/dev/shm/eater', 'a').write('x')", "pass", "PermissionError"),
    "a folder": ("import os; os.mkdir('/tmp/eater')", "pass", "PermissionError"),
    "memory as a file": ("import os; os.memfd_create('eater')", "pass", "PermissionError"),
    "removing": ("import os; os.unlink(VICTIM)", "pass", "PermissionError"),
    "renaming": ("import os; os.rename(VICTIM, VICTIM + '2')", "pass", "PermissionError"),
    "emptying": ("import os; os.truncate(VICTIM, 0)", "pass", "PermissionError"),
    "rights": ("import os; os.chmod(VICTIM, 0)", "pass", "PermissionError"),
    "network": ("import socket; socket.create_connection(('127.0.0.1', PORT))", "pass", "PermissionError"),
    "a datagram": ("import socket; socket.socket(type=socket.SOCK_DGRAM)", "pass", "PermissionError"),
    "a server": ("import http.server as h; h.HTTPServer(('', 0), None)", "pass", "PermissionError"),
    "killing its parent": ("import os; os.kill(os.getppid(), 9)", "pass", "PermissionError"),
    "killing everyone": ("import os; os.kill(-1, 9)", "pass", "PermissionError"),
    "killing by thread": (
        "import ctypes, os\nassert ctypes.CDLL(None).syscall(TGKILL, os.getppid(), os.getppid(), 9) == 0",
        "pass",
        "AssertionError",
    ),
    "raising a limit": ("import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))", "pass", "not allowed"),
    # Any other limit is refused as well: not every user may raise one without the filter.
    "setting it otherwise": ("import resource as r; r.prlimit(0, r.RLIMIT_NOFILE, (8, 8))", "pass", "PermissionError"),
}


@pytest.mark.parametrize("name", WRONG)
def test_others_do_not_pass_and_do_no_harm(sandbox, tmp_path, name) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    program, tests, detail = WRONG[name]
    tgkill = seccomp.TGKILL[list(seccomp.ARCHITECTURES).index(os.uname().machine)]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        known = f"VICTIM, PORT, TGKILL = {str(victim)!r}, {listener.getsockname()[1]}, {tgkill}\n"
        verdict = run(sandbox, known + program, tests)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert verdict.status == "failed" and detail in verdict.detail, verdict
    assert victim.read_text() == "mine" and victim.stat().st_mode & 0o400
    assert run(sandbox, "x = 1", "assert x").passed  # the sandbox is as it was


def test_what_takes_too_much_is_stopped(sandbox) -> None:
    assert run(sandbox, "while True: pass", seconds=0.3).status == "timeout"
    assert run(sandbox, "import time; time.sleep(99)", seconds=0.3).status == "timeout"
    blocking = (
        "import signal, time\nfor s in range(1, 32):\n  try: signal.signal(s, signal.SIG_IGN)\n  except OSError: 0\n"
    )
    assert run(sandbox, blocking + "time.sleep(99)", seconds=0.3).status == "timeout"
    assert run(sandbox, "input()", "", seconds=0.3).status == "failed"  # nothing to read is an end, not a wait
    assert run(sandbox, "while True: print('x' * 1000)", seconds=9).status == "output"
    assert run(sandbox, "x = [0] * 10**9").status == "memory"
    assert run(sandbox, "x = []\nwhile True: x.append(bytearray(10**6))", memory=1 << 28, seconds=9).status == "memory"


def test_a_lost_sandbox_is_started_anew(monkeypatch) -> None:
    with Sandbox(1) as sandbox:
        server = sandbox._servers.get()
        server.send_signal(signal.SIGKILL)
        server.wait()
        sandbox._servers.put(server)
        assert run(sandbox, "x = 1").status == "sandbox"
        assert run(sandbox, "x = 1").passed


def test_programs_run_side_by_side_and_answers_keep_their_order() -> None:
    with Sandbox(2) as sandbox:
        programs = [Program(f"import time; time.sleep({0.2 if i % 4 == 0 else 0}); print({i})") for i in range(8)]
        assert [verdict.stdout for verdict in sandbox.run(programs)] == [f"{i}\n" for i in range(8)]


def test_without_a_filter_nothing_runs(monkeypatch) -> None:
    monkeypatch.setattr(sandbox_module.seccomp, "is_available", lambda: False)
    with pytest.raises(UsageError, match="where the kernel filters system calls"):
        Sandbox()


def test_the_filter_is_what_stops_them(tmp_path) -> None:
    """The control: the same program without the filter writes and forks."""
    program = f"import os\nopen({str(tmp_path / 'made')!r}, 'w')\nos._exit(0) if os.fork() == 0 else os.wait()"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0 and (tmp_path / "made").exists()
