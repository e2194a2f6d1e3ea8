"""The structure of the code: who imports whom, how long functions are, and what an import costs.

The rules are read off the source of every file, imports inside functions and for types included.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "headstart"
PROGRAMS = ("bench", "studies")
"""Folders of the checkout that may import the library and that the library never imports."""
DOOR = "headstart"
"""`headstart/__init__.py`. It names the API lazily, so its imports inside functions count for nothing."""
LINES, PARAMETERS = 60, 8
TRITON = "a Triton kernel: each pointer, stride and block size is an argument"
LONGER: dict[str, str] = {
    "headstart/decoding/kernels/cuda/kernels.py: _products": TRITON,
    "headstart/decoding/kernels/cuda/kernels.py: _linear": TRITON,
    "headstart/decoding/kernels/cuda/kernels.py: _rotated_qkv": TRITON,
    "headstart/decoding/kernels/cuda/kernels.py: _rotated": TRITON,
    "headstart/decoding/kernels/cuda/kernels.py: _rotate": TRITON,
    "headstart/decoding/kernels/cuda/kernels.py: _attend": TRITON,
    "headstart/integrations/multi_token.py: multi_token_step": "public: one name per input of other loops",
    "headstart/data/batches.py: __init__": "BatchStream: what a run's configuration says about its rows",
}
"""Functions with more than `LINES` lines or `PARAMETERS` parameters, and the reason."""


STATEMENTS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def statements(file: Path) -> list[ast.AST]:
    """Return the imports and functions of a file, in any depth, and calls of `import_module`."""
    return [
        node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, STATEMENTS) or (isinstance(node, ast.Call) and called(node) == "import_module")
    ]  # fmt: skip


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


@cache
def files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.py"))


def forget_files() -> None:
    """Read everything anew: a file has changed."""
    for cached in (statements, files, file_graph):
        cached.cache_clear()


def module_of(file: Path, root: Path) -> str:
    parts = file.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """Return the folder or top-level file of a module: "headstart.model.heads" is in "model"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else DOOR


def imported(file: Path, root: Path, modules: set[str]) -> set[str]:
    """Return the `modules`, those below `root`, that `file` imports, anywhere in it."""
    module = module_of(file, root)
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in statements(file):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names]
        elif isinstance(node, ast.Call) and node.args:
            first = node.args[0]
            names = [first.value] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
        found |= {name for name in names if name.split(".")[0] == root.name}
    return found - {module}


@cache
def file_graph(root: Path) -> dict[str, set[str]]:
    """Return which modules each module imports, without the door."""
    modules = {module_of(file, root) for file in files(root)}
    graph = {module_of(file, root): imported(file, root, modules) - {root.name} for file in files(root)}
    return {
        module: {target for target in targets if target in graph}
        for module, targets in graph.items()
        if module != root.name
    }


def room_graph(root: Path) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for module, targets in file_graph(root).items():
        room = room_of(module)
        graph.setdefault(room, set()).update(room_of(target) for target in targets)
    return {room: targets - {room} for room, targets in graph.items()}


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Return what can reach itself."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for target in graph.get(todo.pop(), set()) - seen:
                seen.add(target)
                todo.append(target)
        return seen

    return sorted(name for name in graph if name in reach(name))


def circles_of_rooms(root: Path) -> list[str]:
    return circles(room_graph(root))


def circles_of_files(root: Path) -> list[str]:
    return circles(file_graph(root))


def through_the_door(root: Path) -> list[str]:
    """Return uses of the package itself below the API, such as `from headstart import load`."""
    below = {room for room, reached in room_graph(root).items() if "api" not in reached} - {"api", DOOR}
    found = []
    for file in files(root):
        if room_of(module_of(file, root)) not in below:
            continue
        for node in statements(file):
            if isinstance(node, ast.ImportFrom) and node.module == root.name and not node.level:
                names = [
                    a.name for a in node.names if not (root / a.name).is_dir() and not (root / f"{a.name}.py").is_file()
                ]
                found += [f"{file.relative_to(root.parent)}: {name}" for name in names if name != "__version__"]
            elif isinstance(node, ast.Import):
                found += [f"{file.relative_to(root.parent)}" for alias in node.names if alias.name == root.name]
    return found


def imports_of_programs(root: Path) -> list[str]:
    found = []
    for file in files(root):
        for node in statements(file):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [f"{file.relative_to(root.parent)}: {name}" for name in names if name.split(".")[0] in PROGRAMS]
    return found


def packages_without_init(root: Path) -> list[str]:
    return sorted({str(file.parent) for file in files(root) if not (file.parent / "__init__.py").exists()})


def imports_of_the_model(root: Path) -> list[str]:
    """Return what the model imports in addition to itself and to errors: it knows no losses, files or devices."""
    return sorted(room_graph(root).get("model", set()) - {"errors"})


def functions(root: Path) -> Iterator[tuple[str, int, int]]:
    """Yield (file: name, lines without decorators and docstring's share included, parameters) of every function."""
    for file in files(root):
        for node in statements(file):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len([a for a in arguments if a.arg not in ("self", "cls")])
                yield f"{file.relative_to(root.parent)}: {node.name}", (node.end_lineno or 0) - node.lineno + 1, count


def too_long(root: Path) -> list[str]:
    found = {name: (lines, count) for name, lines, count in functions(root) if lines > LINES or count > PARAMETERS}
    return [
        f"{name}: {lines} lines, {count} parameters" for name, (lines, count) in found.items() if name not in LONGER
    ]


RULES: list[Callable[[Path], list[str]]] = [
    circles_of_rooms, circles_of_files, through_the_door, imports_of_programs, imports_of_the_model,
    packages_without_init, too_long,
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_code_keeps_the_rule(rule: Callable[[Path], list[str]]) -> None:
    assert rule(PACKAGE) == []


@pytest.mark.parametrize("folder", PROGRAMS)
@pytest.mark.parametrize("rule", [circles_of_files, packages_without_init, too_long], ids=lambda rule: rule.__name__)
def test_the_programs_of_the_checkout_keep_the_rule(folder: str, rule: Callable[[Path], list[str]]) -> None:
    assert rule(REPOSITORY / folder) == []


def test_no_two_files_of_tests_share_a_name() -> None:
    """pytest imports them by their bare names, and cannot collect two of one name."""
    names = [file.name for file in files(REPOSITORY / "tests") if file.name.startswith("test_")]
    assert [name for name in set(names) if names.count(name) > 1] == []


def test_no_exception_is_outdated() -> None:
    names = {name for root in (PACKAGE, *(REPOSITORY / p for p in PROGRAMS)) for name, lines, count in functions(root)
             if lines > LINES or count > PARAMETERS}  # fmt: skip
    assert set(LONGER) <= names


def test_the_floors_drawn_are_the_depth_of_imports() -> None:
    """docs/architecture.md draws each room on a floor: one above the highest room that it imports."""
    graph = room_graph(PACKAGE)

    @cache
    def depth(room: str) -> int:
        return max((1 + depth(target) for target in graph[room]), default=0)

    drawing = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1]
    drawn = {
        name.removesuffix(".py").rstrip("/"): int(floor)
        for names, floor in re.findall(r"^\s+((?:[\w.]+/?(?:, )?)+).*floor (\d+)$", drawing, re.M)
        for name in names.split(", ")
    }
    assert drawn == {room: depth(room) for room in graph}


BREAKS: dict[str, tuple[Callable[[Path], list[str]], str, str]] = {
    "a circle of rooms": (circles_of_rooms, "model/x.py", "from headstart.data.batches import IGNORE\n"),
    "a circle of rooms, relatively": (circles_of_rooms, "model/x.py", "from ..data import batches\n"),
    "a circle of rooms, in a function": (circles_of_rooms, "model/x.py", "def f():\n    from headstart import data\n"),
    "a circle of rooms, by string": (
        circles_of_rooms, "model/x.py", "import importlib\nimportlib.import_module('headstart.data.batches')\n"
    ),
    "a circle of files": (circles_of_files, "model/config.py", "from headstart.model.heads import x\n"),
    "a circle of files, for types": (
        circles_of_files,
        "model/config.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from headstart.model import heads\n",
    ),
    "the API, through the door": (through_the_door, "data/x.py", "from headstart import load\n"),
    "the whole package": (through_the_door, "data/x.py", "import headstart\n"),
    "a benchmark": (imports_of_programs, "data/x.py", "def f():\n    from bench.report import write\n"),
    "a model that knows data": (imports_of_the_model, "model/x.py", "import headstart.data.batches\n"),
    "a folder without __init__": (packages_without_init, "model/parts/x.py", ""),
    "a long function": (too_long, "model/x.py", "def f():\n" + "    x = 1\n" * LINES),
    "many parameters": (too_long, "model/x.py", "def f(a, b, c, d, e, f, g, *, h, i): ...\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_each_rule_catches_what_it_forbids(name: str, tmp_path: Path) -> None:
    """A package that keeps the rules, then a line that breaks one."""
    rule, place, text = BREAKS[name]
    root = tmp_path / "headstart"
    for file, content in {
        "__init__.py": "def __getattr__(name):\n    from headstart import api\n    return getattr(api, name)\n",
        "errors.py": "",
        "api.py": "from headstart.data import batches\n",
        "cli.py": "def main():\n    from headstart import api, __version__, load\n",
        "model/__init__.py": "",
        "model/config.py": "from headstart.errors import UsageError\n",
        "model/heads.py": "from headstart.model.config import ModelConfig\n",
        "data/__init__.py": "",
        "data/batches.py": "from headstart.model.config import ModelConfig\nfrom . import shards\nimport torch\n",
        "data/shards.py": "from headstart import __version__\n",
    }.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(content)
    for each in RULES:
        assert each(root) == []
    forget_files()
    target = root / place
    target.parent.mkdir(exist_ok=True)
    target.write_text((target.read_text() if target.exists() else "") + text)
    assert len(rule(root)) >= 1


def test_loading_a_model_does_not_import_the_compiler() -> None:
    """torch._dynamo takes two seconds, and filling a tensor on the meta device imports it."""
    program = (
        "import sys, headstart; headstart.load().generate('x', max_new_tokens=1); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("module", ["headstart", "headstart.cli"])
def test_importing_does_not_cost_a_second(module: str) -> None:
    """`headstart --help` must not wait for torch."""
    heavy = "{'torch', 'numpy', 'transformers', 'tokenizers', 'safetensors', 'matplotlib'}"
    program = f"import sys, {module}; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
