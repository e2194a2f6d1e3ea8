"""A program in the sandbox behaves as under `python program.py`: the same output, exit status and exception."""

from __future__ import annotations

import subprocess
import sys

import pytest

from headstart.evaluation.code import seccomp
from headstart.evaluation.code.sandbox import Program, Sandbox

pytestmark = pytest.mark.skipif(not seccomp.is_available(), reason="this system has no filter of system calls")

SEEN = """
import os, signal, sys, threading
folder = os.path.dirname(__file__)
print(__name__, os.path.basename(__file__), sys.argv, sys.path[0] == folder == os.getcwd(), sys.path.count(folder))
print(sorted(vars()), type(__builtins__), type(__loader__), __doc__, __package__, __spec__, __annotations__)
print(sys.getrecursionlimit(), sys.excepthook is sys.__excepthook__, sys.gettrace(), dict(os.environ))
print(sys.flags.isolated)
for stream, own in (sys.stdin, sys.__stdin__), (sys.stdout, sys.__stdout__), (sys.stderr, sys.__stderr__):
    print(stream is own, stream.encoding, stream.errors, stream.line_buffering, stream.fileno())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD, signal.SIGXCPU):
    print(signal.getsignal(number))
print(threading.main_thread() is threading.current_thread(), len(threading.enumerate()), signal.pthread_sigmask(0, []))
print(os.open(__file__, os.O_RDONLY), sys.modules["__main__"].__dict__ is globals(), "ctypes" in globals())
try:
    sys._getframe(1)
except ValueError as error:
    print(error)
"""
NAMES = """
import dataclasses, inspect, pickle, typing
import __main__
from __main__ import __file__ as file
@dataclasses.dataclass
class Point:
    x: int = 0
    other: "Point | None" = None
def f(x: Point) -> list[int]: return [x.x]
class Colour(__import__("enum").Enum): RED = 1
print(file == __file__, __main__.Point is Point, dataclasses.fields(Point)[0].type, f.__annotations__)
print(typing.get_type_hints(f), typing.get_type_hints(Point))
print(pickle.loads(pickle.dumps(Point(3))), pickle.dumps(Colour.RED), pickle.loads(pickle.dumps(f)) is f)
print(inspect.getsource(Point), inspect.getmodule(f) is __main__, [frame.function for frame in inspect.stack()])
print(f"{Point!r}", Colour.RED.__module__, __import__("program").__name__ if __name__ == "__main__" else "")
"""
EXACT = {
    "what a program sees": SEEN,
    "names and sources": NAMES,
    "a thread that is not joined": "import threading\n"
    "threading.Thread(target=lambda: (threading.main_thread().join(), print('late'))).start()\nprint('soon')",
    "a daemon thread": "import threading, time\n"
    "threading.Thread(target=lambda: (time.sleep(9), print('late')), daemon=True).start()\nprint('soon')",
    "an exception in a thread": "import threading\nthreading.Thread(target=lambda: 1 / 0).start()",
    "atexit": "import atexit\natexit.register(print, 'last')\nprint('first')\nraise SystemExit",
    "descriptor 1 as a file": "out = open(1, 'w')\nout.write(str(int(input()) * 2))",
    "sys.__stdout__": "import io, sys\nsys.stdout = io.StringIO()\nprint('lost')\nsys.__stdout__.write('kept')",
    "stdout closed": "import sys\nprint(1)\nsys.stdout.close()",
    "os._exit before a flush": "import os\nprint('lost')\nos._exit(0)",
    "os._exit": "import os\nprint('kept', flush=True)\nos._exit(7)",
    "sys.exit(False)": "import sys\nsys.exit(False)",
    "sys.exit with a message": "import sys\nsys.exit('no luck')",
    "exit in a function": "def f(): quit(3)\nf()",
    "input at its end": "print(input())\ninput()",
    "objects at exit": "class A:\n  def __del__(self): print('bye')\na, b = A(), A()\nb.b = b\n"
    "def g():\n  try: yield\n  finally: print('closed')\nh = g(); next(h)",
    "a warning": "import warnings\nwarnings.warn('old')\nprint(input())",
    "warnings as errors": "import warnings\nwarnings.simplefilter('error')\nwarnings.warn('old')",
    "an exception": "def f(): raise KeyError('x')\n"
    "try: f()\nexcept KeyError as e: raise ValueError('two\\nlines') from e",
    "an interrupt": "raise KeyboardInterrupt",
    "its own signal": "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)",
    "too deep a recursion": "def f(n): return n and f(n - 1)\nf(2000)",
    "more stack": "import resource, threading, sys\nresource.setrlimit(resource.RLIMIT_STACK, "
    "resource.getrlimit(resource.RLIMIT_STACK))\nsys.setrecursionlimit(10**5)\nthreading.stack_size(1 << 26)\n"
    "def f(n): return n and 1 + f(n - 1)\nthreading.Thread(target=lambda: print(f(20000))).start()",
    "a name that is missing": "def f(xs: List[int]): return xs",
    "no Python": "x = (1,\n",
    "an odd encoding": "# coding: latin-1\nprint(ascii('é'))",
    "a lone surrogate": "print('\\ud800')",
    "unittest that passes": "import unittest\nclass T(unittest.TestCase):\n  def test(self): print('ran')\n"
    "unittest.main()",
    "unittest that fails": "import unittest\nclass T(unittest.TestCase):\n  def test(self): assert 0\nunittest.main()",
    "a generator of numbers": "import random, asyncio, decimal\nrandom.seed(1)\nprint(random.random())\n"
    "async def f(): return decimal.Decimal(input())\nprint(asyncio.run(f()))",
}
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "LANG": "C.UTF-8"}


@pytest.fixture(scope="module")
def pythons(tmp_path_factory):
    """(exit status, output, errors) of every program under `python program.py`, all run at once."""
    running = {}
    for name, program in EXACT.items():
        folder = tmp_path_factory.mktemp("real")
        (folder / "program.py").write_text(program)
        pipe = subprocess.PIPE
        running[name] = subprocess.Popen(
            [sys.executable, "program.py"], cwd=folder, env=ENVIRONMENT, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )
        running[name].stdin.write("21\n")
        running[name].stdin.close()
    return {name: (p.stdout.read(), p.stderr.read(), p.wait()) for name, p in running.items()}


@pytest.fixture(scope="module")
def verdicts():
    with Sandbox(2) as sandbox:
        return dict(zip(EXACT, sandbox.run([Program(p, stdin="21\n", seconds=9) for p in EXACT.values()])))


@pytest.mark.parametrize("name", EXACT)
def test_a_program_does_what_it_does_under_python(pythons, verdicts, name) -> None:
    (output, errors, status), verdict = pythons[name], verdicts[name]
    assert verdict.stdout == output and verdict.passed == (status == 0), (verdict, errors)
    if errors and status > 0:
        *_, last = errors.splitlines()
        assert verdict.detail.endswith(last), (verdict, errors)


CASE = "import unittest\nclass T(unittest.TestCase):\n  def test(self): self.assertEqual(f(), 1)\n"
MAIN = """
class Main(unittest.TestProgram):
    def runTests(self):
        self.exit = False
        super().runTests()
        raise SystemExit
Main()
"""
TESTED = {
    "tests with flags of their own": (
        "from __future__ import annotations",
        "def g(x: int): 0\nassert g.__annotations__['x'] is int",
        1,
    ),
    "a program without flags": ("def f(x: int): return f.__annotations__['x'](x)", "assert f('3') == 3", 1),
    "names that are pickled": ("class A: x = 1", "import pickle; assert pickle.loads(pickle.dumps(A())).x", 1),
    "an alias of globals": ("globals = exec = compile = print = __name__", "assert globals == '__main__'", 1),
    "an open line": ("x = 1 \\", "assert x", 0),
    "nothing but a comment": ("# nothing", "", 1),
    "unittest that passes": ("def f(): return 1", CASE + "unittest.main()", 1),
    "unittest that fails": ("def f(): return 2", CASE + "unittest.main()", 0),
    "a main of its own that passes": ("def f(): return 1", CASE + MAIN, 1),
    "a main of its own that fails": ("def f(): return 2", CASE + MAIN, 0),
    "unittest without tests": ("def f(): return 1", "import unittest\nunittest.main()", 0),
    "unittest of the program alone": (f"def f(): return 1\n{CASE}unittest.main()", "assert 0", 0),
    "exit within the tests": ("def f(): exit()", "assert f() == 1", 0),
    "os._exit within the tests": ("import os\ndef f(): os._exit(0)", "assert f() == 1", 0),
    "exit in unittest": ("def f(): exit()", CASE + "unittest.main()", 0),
    "a thread that exits": (
        "import os, threading\nthreading.Timer(0.05, os._exit, (0,)).start()",
        "import time\ntime.sleep(9)",
        0,
    ),
    "an exception and a thread that stays": ("import threading\nthreading.Timer(9, print).start()\n1 / 0", "pass", 0),
}


def test_a_program_passes_only_by_its_tests() -> None:
    right = {name: "passed" if passes else "failed" for name, (_, _, passes) in TESTED.items()}
    with Sandbox(2) as sandbox:
        verdicts = sandbox.run([Program(program, tests, seconds=5) for program, tests, _ in TESTED.values()])
    assert {name: verdict.status for name, verdict in zip(TESTED, verdicts)} == right


def test_neither_tests_nor_secret_are_objects_while_the_program_runs() -> None:
    program = (
        "import gc, sys\nfound = [o for o in gc.get_objects() if type(o) is dict and 'tests' in o]\n"
        "try: sys._getframe(1)\nexcept ValueError: found.append('alone')\nprint(found)"
    )
    with Sandbox(1) as sandbox:
        verdict = sandbox.run([Program(program, "marked = 'tests'")])[0]
    assert verdict.passed and verdict.stdout == "['alone']\n"
