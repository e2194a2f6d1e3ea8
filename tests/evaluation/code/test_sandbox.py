"""Hostile programs neither pass nor harm; honest ones run as anywhere."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from headstart.errors import UsageError
from headstart.evaluation.code import confinement, seccomp
from headstart.evaluation.code import sandbox as sandbox_module
from headstart.evaluation.code.sandbox import Program, Sandbox, Verdict

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
    "its limits": (
        "import resource as r\nkinds = r.RLIMIT_AS, r.RLIMIT_CPU, r.RLIMIT_FSIZE, r.RLIMIT_CORE, r.RLIMIT_NOFILE",
        "assert [*map(r.getrlimit, kinds)] == [(2**30, 2**30), (4, 5), (0, 0), (0, 0), (64, 64)]",
    ),
    "deep recursion": (
        "import sys\nsys.setrecursionlimit(9999)\ndef f(n): return n and 1 + f(n - 1)\nr = f(5000)",
        "assert r == 5000",
    ),
    "itself, otherwise": (
        "import os, signal\nos.sched_setaffinity(0, os.sched_getaffinity(0)); os.nice(1)\n"
        "signal.signal(signal.SIGUSR1, print); os.kill(os.getpid(), signal.SIGUSR1)",
        "pass",
    ),
    "a pair of streams": ("import socket\na, b = socket.socketpair(); a.send(b'x')", "assert b.recv(9) == b'x'"),
    "reading here and there": (
        "import os\nr = open('/proc/self/status').read(4) + open('/proc/meminfo').read(3) + open('/dev/stdin').read()",
        "assert r == 'NameMem' and os.listdir('/') and open('/dev/urandom', 'rb').read(1)",
    ),
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
    # Through what is open or readable.
    "a signal by a descriptor": ("import fcntl\nfcntl.fcntl(0, fcntl.F_SETOWN, PARENT)", "pass", "PermissionError"),
    "another signal": ("import fcntl\nfcntl.fcntl(0, fcntl.F_SETSIG, 9)", "pass", "PermissionError"),
    "typing": ("import fcntl\nfcntl.ioctl(0, 0x5412, b'x')", "pass", "PermissionError"),
    "flags of a file": ("import fcntl\nfcntl.ioctl(open(VICTIM), 0x40086602, bytes(8))", "pass", "PermissionError"),
    "a lock": ("import fcntl\nfcntl.flock(open(VICTIM), fcntl.LOCK_EX)", "pass", "PermissionError"),
    "another lock": ("import fcntl\nfcntl.lockf(open(VICTIM), fcntl.LOCK_SH)", "pass", "PermissionError"),
    "a pair of datagrams": ("import socket\nsocket.socketpair(type=socket.SOCK_DGRAM)", "pass", "PermissionError"),
    "an address": (
        "import socket\na, b = socket.socketpair()\na.sendto(b'x', '/nonexistent')",
        "pass",
        "PermissionError",
    ),
    "descriptors handed over": (
        "import socket\na, b = socket.socketpair()\nsocket.send_fds(a, [b'x'], [0])",
        "pass",
        "PermissionError",
    ),
    "priority of another": ("import os\nos.setpriority(0, PARENT, 19)", "pass", "PermissionError"),
    "priority of a group": ("import os\nos.setpriority(1, 0, 19)", "pass", "PermissionError"),
    "processors of another": ("import os\nos.sched_setaffinity(PARENT, {0})", "pass", "PermissionError"),
    "a scheduler": ("import os\nos.sched_setscheduler(0, 5, os.sched_param(0))", "pass", "PermissionError"),
    "its server's environment": ("import os\nopen(f'/proc/{os.getppid()}/environ')", "pass", "PermissionError"),
    "its server's memory": ("import os\nopen(f'/proc/{os.getppid()}/mem', 'rb')", "pass", "PermissionError"),
    "its server's descriptors": (
        "import os\nos.open(f'/proc/{os.getppid()}/fd/1', os.O_RDONLY)",
        "pass",
        "PermissionError",
    ),
    "our environment": ("open(f'/proc/{PARENT}/environ')", "pass", "PermissionError"),
    "our memory's map": ("open(f'/proc/{PARENT}/maps').read()", "pass", "PermissionError"),
    "another user": ("import os\nos.setuid(os.getuid())", "pass", "PermissionError"),
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
        known = (
            f"VICTIM, PORT, TGKILL = {str(victim)!r}, {listener.getsockname()[1]}, {tgkill}\nPARENT = {os.getpid()}\n"
        )
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
    closed = "import os, time\nfor fd in 0, 1, 2: os.close(fd)\ntime.sleep(99)"
    assert run(sandbox, closed, "", seconds=0.3).status == "timeout"
    assert run(sandbox, "input()", "", seconds=0.3).status == "failed"  # nothing to read is an end, not a wait
    assert run(sandbox, "while True: print('x' * 1000)", seconds=9).status == "output"
    assert run(sandbox, "import sys\nwhile True: print('x' * 1000, file=sys.stderr)", seconds=9).status == "output"
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


def test_a_verdict_comes_in_time_though_the_sandbox_is_stuck(monkeypatch) -> None:
    monkeypatch.setattr(sandbox_module, "GRACE", 0.1)
    with Sandbox(1) as sandbox:
        assert run(sandbox, "x = 1", seconds=9).passed
        server = sandbox._servers.get()
        sandbox._servers.put(server)
        server.send_signal(signal.SIGSTOP)
        assert run(sandbox, "x = 1", stdin="x" * 10**6, seconds=0.1).status == "sandbox"
        assert server.poll() is not None and not server.folder.exists()
        assert run(sandbox, "x = 1", seconds=9).passed


def test_a_program_has_no_privileges(sandbox) -> None:
    wanted = ("CapInh", "CapPrm", "CapEff", "CapAmb", "NoNewPrivs", "Seccomp")
    program = "print(open('/proc/self/status').read())"
    lines = (line.split(":") for line in run(sandbox, program, "").stdout.splitlines() if ":" in line)
    found = {name: int(value, 16) for name, value in lines if name in wanted}
    assert found == dict.fromkeys(wanted, 0) | {"NoNewPrivs": 1, "Seccomp": 2}


def test_privileges_that_cannot_be_dropped_are_named(monkeypatch, tmp_path) -> None:
    for name in ("seccomp", "sandbox_server"):
        source = sandbox_module.SERVER.with_name(f"{name}.py").read_text()
        (tmp_path / f"{name}.py").write_text(source)
    (tmp_path / "confinement.py").write_text(
        "def drop_capabilities(): raise OSError(1, 'no way to give up privileges')"
    )
    monkeypatch.setattr(sandbox_module, "SERVER", tmp_path / "sandbox_server.py")
    with pytest.raises(UsageError, match="cannot be run here: no way to give up privileges; run this as a user"):
        Sandbox(1)


def test_memory_is_hidden_while_programs_run_and_not_longer() -> None:
    get_dumpable = functools.partial(ctypes.CDLL(None).prctl, 3, 0, 0, 0, 0)
    before = get_dumpable()
    with confinement.hidden_memory():
        with confinement.hidden_memory():
            assert get_dumpable() == 0
        assert get_dumpable() == 0
    assert get_dumpable() == before


def test_our_memory_is_hidden_while_programs_run(sandbox) -> None:
    seen: list[int] = []
    sandbox.run([Program("x = 1")], lambda _: seen.append(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)))
    assert seen == [0]


def test_the_memory_of_the_server_is_hidden_without_landlock(monkeypatch, tmp_path) -> None:
    for name in ("seccomp", "sandbox_server", "confinement"):
        source = sandbox_module.SERVER.with_name(f"{name}.py").read_text()
        (tmp_path / f"{name}.py").write_text(source)
    with (tmp_path / "confinement.py").open("a") as file:
        file.write("\nFileRules.apply = lambda self: None\n")
    monkeypatch.setattr(sandbox_module, "SERVER", tmp_path / "sandbox_server.py")
    with Sandbox(1) as sandbox:
        assert run(sandbox, "import os\nopen(f'/proc/{os.getppid()}/status')").passed  # no rule forbids reading
        for name in ("environ", "mem", "maps", "fd/1"):
            verdict = run(sandbox, f"import os\nos.open(f'/proc/{{os.getppid()}}/{name}', os.O_RDONLY)")
            assert verdict.status == "failed" and "PermissionError" in verdict.detail, verdict


def test_a_program_ends_with_its_server() -> None:
    with Sandbox(1) as sandbox, ThreadPoolExecutor(1) as pool:
        server = sandbox._servers.get()
        sandbox._servers.put(server)
        verdict = pool.submit(run, sandbox, "import time; time.sleep(99)", seconds=60)
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
        pid = until(children.read_text)
        server.send_signal(signal.SIGKILL)
        assert verdict.result().status == "sandbox"
        state = Path(f"/proc/{pid.strip()}/stat")
        until(lambda: not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX")


def until(condition: Callable[[], Any]) -> Any:
    """Return the first true value of a condition."""
    for _ in range(5000):
        if value := condition():
            return value
        time.sleep(0.002)
    raise AssertionError("it has not happened")


LANDLOCK = """
import os, socket, subprocess, sys
from headstart.evaluation.code.confinement import FileRules
actions = {
    "read": lambda: open(os.__file__),
    "read a device that is allowed": lambda: open("/dev/null"),
    "read another device": lambda: os.close(os.open("/dev/ptmx", os.O_RDONLY)),
    "read another process": lambda: open(f"/proc/{os.getppid()}/status"),
    "write": lambda: open(sys.argv[1], "w"),
    "execute": lambda: subprocess.run(["true"]),
    "connect": lambda: socket.create_connection(("127.0.0.1", int(sys.argv[2]))),
    "signal": lambda: os.kill(os.getppid(), 0),
}
def refused():
    found = set()
    for name, action in actions.items():
        try:
            action()
        except PermissionError:
            found.add(name)
    return found
before = refused()
FileRules().apply()
print(*sorted(refused() - before), sep=",")
"""


def test_the_rules_of_files_hold_without_the_filter(tmp_path) -> None:
    version = ctypes.CDLL(None).syscall(444, None, 0, 1)
    if version < 1:
        pytest.skip("this kernel has no Landlock")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-c", LANDLOCK, str(tmp_path / "made"), str(listener.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = {"read another device", "read another process", "write", "execute"}
    expected |= ({"connect"} if version >= 4 else set()) | ({"signal"} if version >= 6 else set())
    assert done.stdout.strip().split(",") == sorted(expected)


PID = 4321
CHECKED = {
    "OPENAT": (
        [(0, 9, os.O_RDONLY | os.O_CLOEXEC)],
        [(0, 9, os.O_WRONLY | os.O_CREAT), (0, 9, 3), (0, 9, os.O_TMPFILE | os.O_RDWR), (0, 9, os.O_APPEND)],
    ),
    "CLONE": (
        [(0x3D0F00,), (0x7D0F00,)],
        [(17,), (0,), (0x10000,), (0x3D0F00 | 0x40000000,), (0x3D0F00 | 0x20000000,)],
    ),
    "KILL": ([(PID, 9)], [(0, 9), (-1 & 0xFFFFFFFF, 9), (PID + 1, 9), (1, 9)]),
    "TGKILL": ([(PID, 99, 9)], [(99, 99, 9)]),
    "PRLIMIT64": ([(0, 7, 0, 9), (PID, 7, 0, 9), (0, 3, 9)], [(0, 7, 9), (0, 7, 1 << 32), (99, 3, 9), (99, 7, 0, 9)]),
    "SETPRIORITY": ([(0, 0, 5), (0, PID, 5)], [(0, 99, 5), (1, 0, 5), (2, 0, 5)]),
    "SCHED_SETAFFINITY": ([(0,), (PID,)], [(99,)]),
    "PRCTL": ([(15,), (16,)], [(4, 1), (22,), (1, 0), (38,), (0x59616D61,)]),
    "IOCTL": ([(0, 0x5401), (0, 0x5451)], [(0, 0x5412), (0, 0x541C), (0, 0x40086602), (0, 0xAA00), (0, 0x8902)]),
    "FCNTL": ([(0, c) for c in (0, 1, 2, 3, 4, 1030)], [(0, c) for c in (6, 7, 8, 10, 15, 37, 1024, 1026, 1031)]),
    "SOCKETPAIR": ([(1, 1), (1, 0x80801)], [(1, 2), (1, 5), (2, 1), (16, 3), (1, 0x80002)]),
    "SENDTO": ([(0, 9, 9, 0, 0)], [(0, 9, 9, 0, 9), (0, 9, 9, 0, 1 << 32)]),
}
"""Arguments of calls that are looked at: those that are allowed, and those that are refused."""


NEVER = {
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "sendmsg": (46, 211), "sendmmsg": (307, 269),
    "setsockopt": (54, 208), "fork": (57, None), "execve": (59, 221), "unshare": (272, 97), "ptrace": (101, 117),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "timer_create": (222, 107), "pidfd_send_signal": (424, 424),
    "creat": (85, None), "mkdirat": (258, 34), "unlinkat": (263, 35), "truncate": (76, 45), "memfd_create": (319, 279),
    "mq_open": (240, 180), "shmget": (29, 194), "setxattr": (188, 5), "setxattrat": (463, 463), "flock": (73, 32),
    "file_setattr": (469, 469), "utimensat": (280, 88), "fchmod": (91, 52), "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274), "ioprio_set": (251, 30), "setrlimit": (160, 164), "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282), "fspick": (433, 433), "open_tree_attr": (467, 467), "quotactl_fd": (443, 443),
    "iopl": (172, None), "bpf": (321, 280), "perf_event_open": (298, 241), "seccomp": (317, 277), "setuid": (105, 146),
    "capset": (126, 91), "personality": (135, 92), "process_vm_writev": (311, 271), "splice": (275, 76),
}  # fmt: skip
"""Calls that must never be on the list, as in `seccomp.ALLOWED`."""


@pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)
def test_the_filter_allows_what_is_listed_alone(machine) -> None:
    """The instructions, run here: also those of the other architecture."""
    column, code = list(seccomp.ARCHITECTURES).index(machine), seccomp.program(machine, PID)

    def answer(number: int, *arguments: int, architecture: int = seccomp.ARCHITECTURES[machine]) -> object:
        data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
        place, value = 0, 0
        while True:
            operation, if_true, if_false, k = struct.unpack_from("<HBBI", code, 8 * place)
            if operation == seccomp.GIVE:
                errors = {seccomp.REFUSE | e: name for e, name in errno.errorcode.items()}
                return {seccomp.ALLOW: True, seccomp.KILL_PROCESS: "killed"}.get(k) or errors[k]
            if operation == seccomp.LOAD:
                (value,) = struct.unpack_from("<I", data, k)
            elif operation == seccomp.AND:
                value &= k
            else:
                tests = {seccomp.JUMP_IF: value == k, seccomp.JUMP_FROM: value >= k, seccomp.JUMP_IF_ANY: value & k}
                place += if_true if tests[operation] else if_false
            place += 1

    listed = {pair[column] for pair in seccomp.ALLOWED.values() if pair[column] is not None}
    judged = [getattr(seccomp, name)[column] for name in (*CHECKED, "OPEN")]
    known = {n for first, end in seccomp.KNOWN[machine] for n in range(first, end)}
    for number in set(range(1000)) - set(judged):
        absent = number not in known or number in (435, 437)
        assert answer(number) == (True if number in listed else "ENOSYS" if absent else "EPERM"), number
    assert not listed & {pair[column] for pair in NEVER.values() if pair[column] is not None}
    assert answer(10**6) == "ENOSYS" and answer(0, architecture=0x40000003) == "killed"
    if machine == "x86_64":
        assert answer(0x40000000) == "killed"
    for name, (allowed, refused) in CHECKED.items():
        number = getattr(seccomp, name)[column]
        assert [answer(number, *arguments) for arguments in allowed] == [True] * len(allowed), name
        assert [answer(number, *arguments) for arguments in refused] == ["EPERM"] * len(refused), name


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
