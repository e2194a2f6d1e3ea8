"""Files of models/ that come with Headstart: a small byte-level model of Python code, and draft heads."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from headstart.console import say
from headstart.errors import UsageError
from headstart.formats.config_json import CONFIG_FILE
from headstart.formats.hub import local_path
from headstart.formats.packaged import packaged

NAME = "python-bytes-8"
CLONE = Path(__file__).resolve().parents[2]
"""The folder above the package: the checkout, if there is one."""


def boxed_model() -> Path:
    """Return the model's directory, in a clone of the repository or in an installation. Raises UsageError without."""
    places = _places(NAME)
    for place in places:
        if (place / CONFIG_FILE).is_file():
            # A relative path: results do not show the user's home directory.
            return place.relative_to(Path.cwd()) if Path.cwd() in place.parents else place
    raise UsageError(f"the model in the box ({NAME}) is not here ({places[0]}, {places[1]}); name a model directory")


def _places(name: str) -> tuple[Path, Path]:
    """Return where `name` of models/ is in a clone of the repository, and in an installation."""
    installed = Path(sysconfig.get_path("data")) / "share" / "headstart" / "models"
    return CLONE / "models" / name, installed / name


def find_model(
    named: str | Path | None, heads: str | Path | None = None, report: bool = True
) -> tuple[Path, str | None]:
    """Return the path of the model named and its draft heads, if any.

    None is the model in the box, which a line reports; a short name of `PACKAGED` comes with heads unless others are
    given; a name OWNER/NAME without a directory here is copied from the hub.
    """
    if named is None:
        place = boxed_model()
        if report:
            say(f"model in the box: {place}")
        return place, None if heads is None else str(heads)
    model, path = packaged(named), local_path(named)
    if model is not None and heads is None:
        heads = next((place for place in _places(model.heads) if place.is_dir()), None)
    return path, None if heads is None else str(heads)
