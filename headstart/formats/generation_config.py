"""`generation_config.json` of a model directory: the tokens that end a generation, and its copy by conversion."""

from __future__ import annotations

import json
from pathlib import Path

from headstart.errors import UsageError, shorten
from headstart.fileio import MOST_JSON, read_bounded, read_json, write_text
from headstart.formats.config_json import CONFIG_FILE

GENERATION_FILE = "generation_config.json"
NONE = -1
"""The number that some files write for no token."""
KEPT_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def named_ends(directory: Path, rows: int) -> frozenset[int]:
    """Return every id of `eos_token_id` in generation_config.json, or in config.json if the first names none.

    Raises UsageError for a value that is neither an id below `rows`, the size of the vocabulary, nor a list of ids.
    """
    for file in (directory / GENERATION_FILE, directory / CONFIG_FILE):
        value = read_json(file).get("eos_token_id") if file.is_file() else None
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(token) is not int or not NONE <= token < rows for token in ids):
            raise UsageError(
                f"{file}: eos_token_id is {shorten(json.dumps(value))}; it must be a token id or a list of them, "
                f"each below {rows}"
            )
        if ids:
            return frozenset(ids) - {NONE}
    return frozenset()


def keep_generation(source: Path, target: Path) -> None:
    """Copy generation_config.json of the model directory `source` to `target`, and the special ids of its config.json.

    A model then ends its text after a conversion where it ended it before.
    """
    if (source / GENERATION_FILE).is_file():
        write_text(target / GENERATION_FILE, read_bounded(source / GENERATION_FILE, MOST_JSON).decode("utf-8"))
    if not ((source / CONFIG_FILE).is_file() and (target / CONFIG_FILE).is_file()):
        return
    old, new = (read_json(place / CONFIG_FILE) for place in (source, target))
    new |= {name: old[name] for name in KEPT_IDS if name in old}
    write_text(target / CONFIG_FILE, json.dumps(new, indent=2) + "\n")
