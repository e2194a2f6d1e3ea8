"""state.json of a checkpoint: position of the run, digests of the other files, and a digest of itself."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from headstart.errors import UsageError
from headstart.fileio import regular
from headstart.training.spikes import LossHistory

FORMAT = 2
READABLE = (1, FORMAT)
"""Format 1 has no digest of state.json itself."""
STATE_FILE = "state.json"
GO_BACK = "delete it to resume from the one before it"


@dataclass
class Position:
    """Position of a run."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    tokens: int = 0
    """Positions trained on."""
    skipped: int = 0
    """Steps that were not applied: not finite, or a spike."""
    skipped_in_a_row: int = 0
    """Length of the streak of skipped steps that ends here."""
    data: dict[str, int] = field(default_factory=dict)
    """`BatchStream.state_dict`."""
    history: dict[str, Any] = field(default_factory=dict)
    """The fields of `LossHistory`."""
    sources: list[dict[str, str]] = field(default_factory=list)
    """`TokenShards.digests` of each source; empty in checkpoints that do not record them."""
    lr: float = 0.0
    """Learning rate of the last step."""
    planned: int = 0
    """Steps of the whole run, as planned when this was the position; 0 in checkpoints that do not record it."""
    extended: int = 0
    """Steps done when the present extension of a finished run began; 0 if there is no extension."""
    extension: str = ""
    """The `OptimizerConfig.extension` of the present extension."""
    seconds: float = 0.0
    """Seconds of training, those of earlier starts included; 0 in checkpoints that do not record them."""
    best_tokens_per_pass: float = 0.0
    """Most tokens per pass of a sample so far."""
    samples_since_best: int = 0
    """Samples since then, none of which had more."""


@dataclass(frozen=True)
class State:
    """The content of state.json."""

    position: Position
    model: str
    """Digest of the model's shape."""
    files: dict[str, int]
    """Bytes of every other file."""
    sha256: dict[str, str]
    """SHA-256 of every other file; empty in checkpoints of the first Headstart."""


def state_text(position: Position, model: str, files: dict[str, int], sha256: dict[str, str]) -> str:
    """Return the text of state.json."""
    content = {"format": FORMAT, "position": asdict(position), "model": model, "files": files, "sha256": sha256}
    return _with_digest(content)


def read_state(path: Path) -> State:
    """Read state.json of the checkpoint `path` and check it, and the sizes of the files that it names.

    Raises UsageError if it is damaged, of a later format, or of another step than the folder's name says.
    """
    try:
        for file in path.iterdir():
            regular(file)
        text = (path / STATE_FILE).read_bytes().decode()
        content = json.loads(text)
        if content["format"] not in READABLE:
            raise UsageError(
                f"{path}: of format {content['format']}, this Headstart reads {FORMAT}; give another --run-dir"
            )
        digested = content["format"] == FORMAT or "digest" in content
        if digested and text != _with_digest({k: value for k, value in content.items() if k != "digest"}):
            raise UsageError(f"{path}: damaged, {STATE_FILE} differs from what was written; {GO_BACK}")
        for name, size in content["files"].items():
            found = (path / name).stat().st_size
            if found != size:
                raise UsageError(f"{path}: damaged, {name} has {found:,} bytes instead of {size:,}; {GO_BACK}")
        position = _position(content["position"])
        if path.name != name_of(position.step):
            raise UsageError(f"{path}: damaged, its {STATE_FILE} is that of step {position.step}; {GO_BACK}")
        return State(position, str(content["model"]), dict(content["files"]), dict(content.get("sha256", {})))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path}: not a whole checkpoint ({error}); {GO_BACK}") from error


def name_of(step: int) -> str:
    """Return the name of the folder of a checkpoint."""
    return f"step-{step:08d}"


def _with_digest(content: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(content, indent=2).encode()).hexdigest()
    return json.dumps({**content, "digest": digest}, indent=2) + "\n"


def _position(values: dict[str, Any]) -> Position:
    """Return the position. Raise ValueError or TypeError if a value has a wrong type."""
    position = Position(**values)
    history = LossHistory(**position.history)
    counts = [position.step, position.tokens, position.skipped, position.skipped_in_a_row, history.count]
    counts += [position.planned, position.extended, position.samples_since_best, *position.data.values()]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("a count of its position is no whole number")
    numbers = (history.mean, history.variance, position.lr, position.seconds, position.best_tokens_per_pass)
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in numbers):
        raise ValueError("the mean loss, the learning rate, the duration or the tokens per pass is no number")
    names = sorted(position.data)
    if names not in ([], ["epoch", "row"], ["row", *(n for n in names if re.fullmatch(r"source\d+", n))]):
        raise ValueError(f"no position in the data is called {', '.join(names)}")
    if not all(isinstance(value, str) for source in position.sources for value in dict(source).values()):
        raise ValueError("the digests of its data are no text")
    return position
