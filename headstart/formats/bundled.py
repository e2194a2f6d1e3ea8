"""The model in the box: a small byte-level model of Python code that comes with Headstart (models/README.md)."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from headstart.console import say
from headstart.errors import UsageError
from headstart.formats.config_json import CONFIG_FILE
from headstart.formats.hub import local_path

NAME = "python-bytes-8"
CLONE = Path(__file__).resolve().parents[2]
"""The folder above the package: the checkout, if there is one."""


def boxed_model() -> Path:
    """Return the model's directory, in a clone of the repository or in an installation. Raises UsageError without."""
    clone = CLONE / "models" / NAME
    installed = Path(sysconfig.get_path("data")) / "share" / "headstart" / "models" / NAME
    for place in (clone, installed):
        if (place / CONFIG_FILE).is_file():
            # A relative path: results do not show the user's home directory.
            return place.relative_to(Path.cwd()) if Path.cwd() in place.parents else place
    raise UsageError(f"the model in the box ({NAME}) is not here ({clone}, {installed}); name a model directory")


def model_path(named: str | Path | None) -> Path:
    """Return the directory of the model named, or of the model in the box, which a line reports.

    A name OWNER/NAME without a directory here is copied from the hub.
    """
    if named is not None:
        return local_path(named)
    place = boxed_model()
    say(f"model in the box: {place}")
    return place
