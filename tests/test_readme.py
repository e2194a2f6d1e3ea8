"""The commands and programs of the README and of the pages run as they stand, in order; only sizes are cut down."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest
from forks import Forks

ROOT = Path(__file__).parent.parent
# Imported once for all commands that use them.
LOADED = [
    name for name in ("transformers.models.llama.modeling_llama", "matplotlib.figure")
    if importlib.util.find_spec(name.partition(".")[0])
]  # fmt: skip
PAGES = (
    *("quickstart", "train", "decoding", "constraints", "engine", "adapt", "heads", "conversations", "evaluation"),
    *("export", "watching", "scale-out"),
)
FEWER = {"tune": ["--seconds", "0.1", "--prompt-count", "2"], "evaluate": ["--prompt-count", "3"]}
TRAINED = "runs/smoke/model"
"""A small model that earlier commands have made."""
SMALL = {
    "configs/smoke.yaml": ["--model.dim", "16", "--batch.length", "32", "--batch.rows", "2", "--validation.rows", "2"],
    "configs/bytes-8-heads.yaml": [
        *("--steps", "2", "--model.dim", "16", "--model.layers", "2", "--batch.rows", "2", "--batch.length", "32"),
        *("--validation.rows", "2"),
    ],
}


def blocks() -> list[tuple[str, str]]:
    """Return (language, text) of the fenced blocks of the README and of the pages, in the order of a first visit."""
    pages = [ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in PAGES)]
    return [
        found for page in pages
        for found in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    ]  # fmt: skip


def commands() -> list[list[str]]:
    """Return each command once. Blocks named `sh` are not run: they need a network, other programs, or hours."""
    lines = [line for language, text in blocks() if not language for line in text.splitlines()]
    found = [tuple(shlex.split(line, comments=True)) for line in lines if line.startswith("headstart ")]
    return [list(command) for command in dict.fromkeys(found)]


def small(command: list[str]) -> list[str]:
    """The same command, on a model of a few thousand weights. A dry run builds none."""
    if command[1] in FEWER:
        if command[1] == "tune" and command[2:3] != [TRAINED]:  # instead of the model in the box
            command = [*command[:2], TRAINED, *command[2:]]
        return [*command, *FEWER[command[1]]]
    if command[1] == "adapt":
        at = command.index("--steps")
        short = ["--length", "32"] if "--prompts" in command else []
        return [*command[: at + 1], "3", *command[at + 2 :], *short]
    if command[1] == "train" and "--dry-run" not in command:
        extra = list(SMALL[command[2]])
        if "--steps" in command:
            at = command.index("--steps")
            command = [*command[:at], "--steps", "6", *command[at + 2 :]]
        elif command[2] == "configs/smoke.yaml":
            extra += ["--steps", "3"]
        return command + extra
    return command


def test_everything_that_the_pages_show_runs(tmp_path: Path, forks: Forks) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for folder in ("my-project", "notes/deep"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(4):
            (tmp_path / folder / f"text{i}.md").write_text(f"# Note {i}\n" + "Words and more words. " * 60)
    (tmp_path / "prompts.txt").write_text("Words and\n# Note\n")

    def run(**request: object) -> str:
        status, said = forks.run(tmp_path.parent / "output.txt", tmp_path, load=LOADED, **request)
        assert status == 0, f"{request}\n{said[-3000:]}"
        return said

    found = commands()
    assert len(found) > 30
    said = {}
    for command in found:
        if command[1] == "doctor" and len(command) == 2:
            continue  # the same as with a model, which comes later
        said[shlex.join(command)] = run(headstart=small(command)[1:])
    pytest.importorskip("transformers")
    programs = [text for language, text in blocks() if language == "python"]
    assert len(programs) > 5
    for text in programs:
        run(program=text)
    plain = next(text for command, text in said.items() if "--heads 1" in command)
    assert plain.strip()


def test_every_command_has_a_page() -> None:
    from headstart.cli import COMMANDS

    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(r"headstart ([\w-]+)", text))
    assert set(COMMANDS) <= named


def test_links_and_files_named_exist() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        for name in re.findall(r"`((?:docs|bench|studies|configs|examples|models|scripts)/[\w./-]+)`", text):
            assert (ROOT / name).exists(), f"{page.name}: {name}"
