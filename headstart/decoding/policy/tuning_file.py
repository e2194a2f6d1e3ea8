"""`tuning.json` of a model directory: what `headstart tune` measured, of the model and of the machines it ran on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headstart.decoding.policy.calibration import Tuning, content_with, setting, tuning_from
from headstart.errors import UsageError
from headstart.fileio import read_json, write_text
from headstart.model.transformer import Transformer

TUNING_FILE = "tuning.json"


def read_tuning(directory: str | Path, model: Transformer) -> Tuning | None:
    """The tuning of `model` (in decoding form) for this machine, dtype and number of threads; None where there is none.

    Raises UsageError for a file that is damaged or of another model.
    """
    file = Path(directory) / TUNING_FILE
    if not file.exists():
        return None
    try:
        return tuning_from(read_json(file), model)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file}: no tuning ({error!r}); delete it, or measure again with headstart tune") from error
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error


def write_tuning(directory: str | Path, model: Transformer, tuning: Tuning, more: dict[str, Any]) -> Path:
    """Puts `tuning` into the directory, beside what other machines measured; `more` says how it was measured."""
    file = Path(directory) / TUNING_FILE
    content = read_json(file) if file.is_file() else None
    write_text(file, json.dumps(content_with(content, setting(model), tuning, more), indent=1) + "\n")
    return file
