"""The folder of a run: its files, its lock, and the check that a configuration belongs to it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from headstart.console import Progress, say
from headstart.data.mixture import MixturePart, Source, open_sources
from headstart.data.prepare.pipeline import Preparation, prepare
from headstart.data.prepare.units import Selection
from headstart.errors import UsageError
from headstart.fileio import claimed, remove_unfinished, replacing_file, status_of, unwritable
from headstart.formats.registry import load_data_tokenizer
from headstart.training import checkpoints
from headstart.training.config import (
    FIXED,
    QUIET,
    RunConfig,
    check_vocab_size,
    differences,
    is_under,
    load_config,
    save_config,
)


class RunFolder:
    """A run folder: config.yaml, metrics.jsonl, data/, checkpoints/ and the result, model/ or heads/."""

    def __init__(self, path: Path, result: str = "model") -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.data = path / "data"
        self.checkpoints = path / "checkpoints"
        self.result = path / result

    @contextmanager
    def claimed(self, main: bool = True) -> Iterator[None]:
        """Make the folder, keep other runs out of it, and remove the unfinished files of a killed one.

        Of several processes of one run only the `main` one does it.
        """
        if not main:
            yield
            return
        taken = f"{self.path}: another process is training there; wait for it or give another --run-dir"
        with claimed(self.path / ".lock", taken, "give a --run-dir you may write to"):
            remove_unfinished(self.path, self.checkpoints)
            yield

    def check(self, config: RunConfig) -> tuple[RunConfig | None, dict[str, tuple[Any, Any]]]:
        """Return the stored configuration, and the settings of `config` that differ from it.

        Raises UsageError if the folder holds a run with another model or other data.
        """
        if not self.config.exists():
            return None, {}
        try:
            old = load_config(self.config)
        except UsageError as error:
            raise UsageError(f"{error} (the folder is not one of this Headstart's; give another --run-dir)") from error
        changed = differences(old, config)
        fixed = _fixed(changed)
        if fixed and self.started:
            before, now = changed[fixed[0]]
            raise UsageError(f"{self.path}: holds a run with {fixed[0]} {before}, not {now}; give another --run-dir")
        return old, changed

    @property
    def started(self) -> bool:
        """True if a checkpoint or a result exists."""
        return bool(checkpoints.all_steps(self.checkpoints)) or self.result.exists()

    def accept(self, config: RunConfig) -> RunConfig | None:
        """Write config.yaml and return the configuration before, if any. Raises UsageError like `check`."""
        old, changed = self.check(config)
        if old is not None:
            if any(is_under(name, ("data", "seed", "model.vocab_size")) for name in _fixed(changed)):
                shutil.rmtree(self.data, ignore_errors=True)  # prepared for the other settings, never trained on
            for name, (before, now) in changed.items():
                if self.started and not is_under(name, QUIET):
                    say(f"changed since the last start: {name} {before} -> {now}")
        once = replace(config, data=replace(config.data, allow_changed=False))
        save_config(once, self.config)
        return old

    def prepare_shards(self, config: RunConfig, progress: Callable[..., Progress]) -> None:
        """Prepare data/ unless `config` names prepared folders; once, so that a resumed run reads the same bytes."""
        if not config.data.prepared and not (self.data / "manifest.json").exists():
            say(f"preparing {', '.join(config.data.sources)} -> {self.data}")
            with progress("prepare", unit="bytes") as bar:
                prepare(
                    config.data.sources,
                    self.data,
                    load_data_tokenizer(config.data.tokenizer),
                    Preparation(
                        selection=Selection(conversations=config.data.conversations, texts=config.data.conversations),
                        validation_fraction=config.data.validation_fraction,
                        seed=config.seed,
                    ),
                    progress=bar.update,
                    report=say,
                )

    def open_sources(self, config: RunConfig) -> list[Source]:
        """Open the data of the run: `data.mixture`, `data.path`, or its own data/."""
        sources = open_sources(config.data.prepared or (MixturePart(self.data),))
        train = sources[0].train
        if config.adapt is None:  # an existing model has its own words for it
            tokenizer = f"{train.manifest['tokenizer']!r} of {train.directory}"
            check_vocab_size(config, int(train.manifest["vocab_size"]), tokenizer)
        return sources


def _fixed(changed: Iterable[str]) -> list[str]:
    return [name for name in changed if is_under(name, FIXED) and not is_under(name, QUIET)]


class RunLog:
    """metrics.jsonl: one JSON object per line, only appended; numbers that are not finite are null."""

    def __init__(self, path: Path, step: int) -> None:
        """Open the file and cut off the lines past `step`, which a run wrote after its last checkpoint."""
        self._path = path
        self._cut(step)
        try:
            # Unbuffered: a line that a full disk refused must not be written again when the file is closed.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise unwritable(path, error, "give another --run-dir") from error

    def write(self, record: dict[str, Any]) -> None:
        """Append a line."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise UsageError(
                f"{self._path}: cannot be written ({error.strerror}); fix that and run the command again",
                status=status_of(error),
            ) from error

    def sync(self) -> None:
        """Flush to disk before a checkpoint, which must not exist without the lines that lead to it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _cut(self, step: int) -> None:
        if not self._path.exists():
            return
        with (
            replacing_file(self._path) as temporary,
            temporary.open("w", encoding="utf-8") as kept,
            self._path.open(encoding="utf-8", errors="replace") as lines,
        ):
            for line in lines:
                try:
                    keep = line.endswith("\n") and int(json.loads(line)["step"]) <= step
                except (ValueError, KeyError, TypeError):
                    keep = False  # torn by a kill
                if keep:
                    kept.write(line)
