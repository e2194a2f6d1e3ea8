"""The model in the box: a small byte-level model of Python code that comes with Headstart (models/README.md)."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from headstart.console import say
from headstart.errors import UsageError
from headstart.formats.config_json import CONFIG_FILE
from headstart.formats.hub import local_directory

NAME = "python-bytes-8"


def boxed_model() -> Path:
    """Its directory: in a clone of the repository, or where an installation has put it. Raises UsageError without."""
    clone = Path(__file__).resolve().parents[2] / "models" / NAME
    installed = Path(sysconfig.get_path("data")) / "share" / "headstart" / "models" / NAME
    for place in (clone, installed):
        if (place / CONFIG_FILE).is_file():
            # Results name it as a person would, whose home is nobody's business.
            return place.relative_to(Path.cwd()) if Path.cwd() in place.parents else place
    raise UsageError(f"the model in the box ({NAME}) is not here ({clone}, {installed}); name a model directory")


def model_directory(named: str | Path | None) -> Path:
    """The directory named (or a copy of the model of that name on the hub), or that of the model in the box, which is
    said in a line."""
    if named is not None:
        return local_directory(named)
    place = boxed_model()
    say(f"model in the box: {place}")
    return place
