"""The studies by name."""

from __future__ import annotations

import importlib
from typing import Any

from headstart.errors import UsageError
from studies.study import Study

STUDIES = (
    "polynomial",
    "induction",
    "choice-points",
    "mutual-information",
    "bytes",
    "heads",
    "scaling",
    "curriculum",
    "adapted-heads",
    "finetune",
    "speed",
    "memory",
    "path-star",
)
"""In the order in which they are told; each is the file of that name."""


def study_called(name: str) -> Study[Any]:
    """Raises UsageError for a name that no study has."""
    if name not in STUDIES:
        raise UsageError(f"there is no study {name!r}; take one of {', '.join(STUDIES)}")
    module = importlib.import_module(f"studies.{name.replace('-', '_')}")
    study: Study[Any] = module.STUDY
    return study
