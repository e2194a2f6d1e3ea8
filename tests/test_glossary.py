"""Wording: one standard term per concept, in code and docs (the style that CONTRIBUTING.md names)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLACES = ("headstart", "bench", "studies", "tests", "docs", "configs", "deploy")
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
KINDS = {".py", ".md", ".c", ".h", ".html", ".yaml"}
INSTEAD = {
    r"\btexts\b": "sequences, requests, outputs or prompts",
    r"\bbeside\b": "next to, compared with or in addition to",
    r"\b(go|goes|gone|going|went) on\b": "continue or resume",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\b(is|are|was|were|be) (told|had)\b": "is reported or is available",
    r"\bis asked (for|about|of)\b": "is requested or is required",
    r"\b(purse|planted|despair|hoped|hopeless|strays|doubted)\b": "the field's term",
    r"\bwhere there (is|are)\b": "if there is",
}
STORED = re.compile(r"\btexts(=|: bool)|(selection|self)\.texts\b")
"""A field of `Selection` that stored manifests name."""
LEFT_OUT = ("bench/results/", "tests/test_glossary.py")
"""Reports written by earlier versions, and the words themselves."""
OPENERS = re.compile(r'"""(Of|What|Whether|By|As|In|Where|Which|How|From|With) ')


def lines() -> list[tuple[str, str]]:
    """Return (file:line, text) of everything that people read in the repository."""
    found = []
    for place in (*PLACES, *PAGES):
        path = ROOT / place
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix in KINDS and not str(file.relative_to(ROOT)).startswith(LEFT_OUT):
                text = file.read_text(encoding="utf-8")
                found += [(f"{file.relative_to(ROOT)}:{n}", line) for n, line in enumerate(text.splitlines(), 1)]
    return found


@pytest.mark.parametrize("pattern", INSTEAD)
def test_the_standard_term_is_used(pattern: str) -> None:
    expression = re.compile(pattern, re.IGNORECASE)
    assert [place for place, line in lines() if expression.search(line) and not STORED.search(line)] == [], (
        f"write {INSTEAD[pattern]}"
    )


def test_docstrings_start_with_a_verb() -> None:
    assert [place for place, line in lines() if ".py:" in place and OPENERS.search(line)] == []
