"""The house (docs/architecture.md): who may import whom, how long a file is, and what an import costs.

The rules are read off the source of every file, imports inside functions included.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "headstart"
FLOORS = {
    "arguments": 0,
    "errors": 0,
    "fileio": 0,
    "hardware": 0,
    "command_line": 0,
    "console": 0,
    "settings_loader": 0,
    "model": 1,
    "data": 1,
    "objective": 2,
    "decoding": 2,
    "formats": 2,
    "training": 3,
    "evaluation": 3,
    "serving": 3,
    "api": 3,
    "integrations": 4,
    "reports": 4,
    "commands": 5,
    "cli": 6,
    "entry": 6,
    "__main__": 6,
}
"""Floor of each room (a folder) and of each file next to the rooms."""
LINES = 400
LONGER = {"headstart/model/heads.py"}
"""Files that may be longer: one kind of thing each, such as all kinds of heads."""


@dataclass(frozen=True)
class Import:
    """One import of one of our own modules."""

    file: str
    line: int
    source: str
    """Room that imports."""
    target: str
    """Room that is imported."""
    deferred: bool
    """Inside a function or under TYPE_CHECKING: not run when the file is imported."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.source} imports {self.target}"


def room_of(module: str) -> str:
    """ "headstart.model.heads" -> "model"; the package itself is "headstart"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "headstart"


def module_of(file: Path, root: Path) -> str:
    parts = file.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path, root: Path) -> Iterator[Import]:
    """Our own modules that `file` imports, wherever in it."""
    module = module_of(file, root)
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    path = str(file.relative_to(root.parent))

    def walk(node: ast.AST, deferred: bool) -> Iterator[Import]:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                kept = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*kept, *([node.module] if node.module else [])])
            # `from headstart import api` names a room, `from headstart.api import load` does too; and what is taken
            # from the package itself without being one of its files is an attribute of headstart/__init__.py.
            rooms = base == root.name
            names = [f"{base}.{alias.name}" if rooms and is_room(alias.name, root) else base for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            first = node.args[0]
            names = [first.value] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
        for name in names:
            if name.split(".")[0] == root.name:
                yield Import(path, getattr(node, "lineno", 0), room_of(module), room_of(name), deferred)
        late = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        for child in ast.iter_child_nodes(node):
            yield from walk(child, deferred or late)

    yield from walk(ast.parse(file.read_text(encoding="utf-8")), False)


def is_room(name: str, root: Path) -> bool:
    return (root / name).is_dir() or (root / f"{name}.py").is_file()


def files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.py"))


def upward(root: Path) -> list[str]:
    """Imports of a higher floor. The package's own __init__.py is the door: it may name the api, lazily."""
    found = []
    for file in files(root):
        for item in imports_of(file, root):
            if item.source == "headstart":
                if not item.deferred and item.target != "headstart":
                    found.append(f"{item} at import time")
            elif item.target == "headstart":
                # Only `__version__` and the like; the door's lazy names would lead up to the api.
                continue
            elif FLOORS.get(item.target, 0) > FLOORS.get(item.source, 6):  # rooms without a floor: see unknown_rooms
                found.append(f"{item} (floor {FLOORS[item.source]} -> {FLOORS[item.target]})")
    return found


def through_the_door(root: Path) -> list[str]:
    """`from headstart import load` below the api's floor: an upward import in disguise."""
    found = []
    for file in files(root):
        room = room_of(module_of(file, root))
        if room == "headstart" or FLOORS.get(room, 6) > FLOORS["api"]:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == root.name and not node.level:
                names = [alias.name for alias in node.names if not is_room(alias.name, root)]
                found += [f"{file.relative_to(root.parent)}:{node.lineno}: {n}" for n in names if n != "__version__"]
            elif isinstance(node, ast.Import):
                found += [
                    f"{file.relative_to(root.parent)}:{node.lineno}: import {root.name}"
                    for alias in node.names
                    if alias.name == root.name
                ]
    return found


def circles(root: Path) -> list[str]:
    """Rooms that import one another, directly or round a corner."""
    graph: dict[str, set[str]] = {}
    for file in files(root):
        for item in imports_of(file, root):
            if item.source != item.target and "headstart" not in (item.source, item.target):
                graph.setdefault(item.source, set()).add(item.target)

    def reach(room: str) -> set[str]:
        seen: set[str] = set()
        todo = [room]
        while todo:
            for target in graph.get(todo.pop(), set()) - seen:
                seen.add(target)
                todo.append(target)
        return seen

    return sorted(room for room in graph if room in reach(room))


def too_long(root: Path) -> list[str]:
    lengths = {str(file.relative_to(root.parent)): len(file.read_text("utf-8").splitlines()) for file in files(root)}
    return [f"{file}: {length} lines" for file, length in lengths.items() if length > LINES and file not in LONGER]


def unknown_rooms(root: Path) -> list[str]:
    rooms = {room_of(module_of(file, root)) for file in files(root)}
    rooms |= {item.target for file in files(root) for item in imports_of(file, root)}
    return sorted(rooms - FLOORS.keys() - {"headstart"})


def packages_without_init(root: Path) -> list[str]:
    return sorted({str(file.parent) for file in files(root) if not (file.parent / "__init__.py").exists()})


RULES = [unknown_rooms, packages_without_init, upward, through_the_door, circles, too_long]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_stands(rule: object) -> None:
    assert rule(PACKAGE) == []  # type: ignore[operator]


@pytest.mark.parametrize("folder", ["bench", "studies"])
def test_the_library_imports_no_program_of_the_checkout(folder: str) -> None:
    for file in files(PACKAGE):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert folder not in {name.split(".")[0] for name in names}, file


def test_the_model_knows_only_itself() -> None:
    rooms = {item.target for file in files(PACKAGE / "model") for item in imports_of(file, PACKAGE)}
    assert rooms <= {"model", "errors"}


def test_reading_shards_does_not_import_what_writes_them() -> None:
    for file in (PACKAGE / "data").glob("*.py"):
        assert "headstart.data.prepare" not in file.read_text(encoding="utf-8"), file


BREAKS = {
    "a higher floor": (upward, "model/heads.py", "from headstart.objective.walk import walk_step\n"),
    "a higher floor, by its name": (upward, "model/heads.py", "import headstart.formats.huggingface\n"),
    "a higher floor, out of the package": (upward, "formats/x.py", "from headstart import training\n"),
    "a higher floor, relatively": (upward, "data/x.py", "from ..decoding import engine\n"),
    "a higher floor, in a function": (upward, "data/x.py", "def f():\n    from headstart.serving import app\n"),
    "a higher floor, by string": (upward, "data/x.py", "import importlib\nimportlib.import_module('headstart.cli')\n"),
    "a higher floor, for types": (
        upward,
        "errors.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from headstart.model import heads\n",
    ),
    "the api, through the door": (through_the_door, "training/x.py", "from headstart import load\n"),
    "the whole package": (through_the_door, "evaluation/x.py", "import headstart\n"),
    "an eager door": (upward, "__init__.py", "from headstart.api import load\n"),
    "a circle on one floor": (circles, "model/x.py", "from headstart.data.batches import IGNORE\n"),
    "a long file": (too_long, "model/x.py", "x = 1\n" * (LINES + 1)),
    "a room without a floor": (unknown_rooms, "utils/x.py", ""),
    "an import of a room without a floor": (unknown_rooms, "data/x.py", "from headstart.utils import y\n"),
    "a folder without __init__": (packages_without_init, "model/parts/x.py", ""),
}


@pytest.mark.parametrize("name", BREAKS)
def test_each_rule_catches_what_it_forbids(name: str, tmp_path: Path) -> None:
    """A house that keeps the rules, then one line that breaks one."""
    rule, place, text = BREAKS[name]
    root = tmp_path / "headstart"
    for room in FLOORS:
        if room in (
            "model",
            "data",
            "objective",
            "decoding",
            "formats",
            "training",
            "evaluation",
            "serving",
            "commands",
        ):
            (root / room).mkdir(parents=True)
            (root / room / "__init__.py").write_text("")
    for file, content in {
        "__init__.py": "def __getattr__(name):\n    from headstart import api\n    return getattr(api, name)\n",
        "errors.py": "",
        "api.py": "from headstart.decoding import engine\n",
        "cli.py": "def main():\n    from headstart import training, __version__, load\n",
        "commands/demo.py": "import headstart.training\n",
        "data/batches.py": "from headstart.model.config import ModelConfig\nfrom . import shards\nimport torch\n",
        "training/loop.py": "from headstart import __version__\nfrom headstart.errors import UsageError\n" * 200,
    }.items():
        (root / file).write_text(content)
    for each in RULES:
        assert each(root) == []
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
