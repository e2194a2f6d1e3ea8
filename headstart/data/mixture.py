"""Mix several shards folders by weight."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from headstart.data.shards import TokenShards
from headstart.data.tokenizers import TOKENIZER_FILE
from headstart.errors import UsageError
from headstart.fileio import regular


@dataclass(frozen=True, repr=False)
class MixturePart:
    """A folder of a mixture and its weight."""

    path: Path
    """A folder that `headstart prepare` wrote."""
    weight: float = 1.0
    """Weight of the folder: its share of the rows is this over the sum of all weights."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise UsageError(
                f"data.mixture: {self.path} has weight {self.weight}; it must be a finite number above 0 "
                f"(leave the folder out to read nothing of it)"
            )

    def __repr__(self) -> str:
        return f"{self.path}: {self.weight}"


@dataclass(frozen=True, eq=False)
class Source:
    """An opened shards folder. `name` distinguishes it from others of its mixture in metrics and messages."""

    name: str
    weight: float
    train: TokenShards
    validation: TokenShards | None  # None if no document is held out


def open_sources(parts: Sequence[MixturePart]) -> list[Source]:
    """Open every folder of a mixture. Raise UsageError if one cannot be opened or two were encoded differently."""
    splits = [TokenShards.open(part.path, "train") for part in parts]
    for other in splits[1:]:
        _check_same_tokenizer(splits[0], other)
    sources = []
    for part, name, train in zip(parts, _names([part.path for part in parts]), splits):
        held_out = train.manifest["splits"].get("validation", {}).get("tokens")
        validation = TokenShards.open(part.path, "validation") if held_out else None
        sources.append(Source(name, part.weight, train, validation))
    return sources


class Turns:
    """Choose which part gives each row: after N rows, part i has given N * w_i / sum(w), to less than one row.

    Row k (from 0) of a part with share s has a window: it may not come before row floor(k / s) of the mixture and must
    not come after row ceil((k + 1) / s) - 1. Among the parts whose window is open, the one whose window closes first is
    taken. This meets every window, as in proportionate fair scheduling (Baruah et al. 1996); taking the largest deficit
    first would not, with many parts. All numbers are whole, made from the weights as they are written (0.1 is 1/10), so
    nothing drifts. The next turn depends only on the number of rows that each part has given.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(repr(float(weight))) for weight in weights]
        total = sum(exact)
        # Time is counted in units in which a row of the mixture and a window of every part have whole lengths.
        self._row = math.lcm(*((weight / total).numerator for weight in exact))
        self._windows = [int(self._row * total / weight) for weight in exact]

    def take(self, given: Sequence[int], count: int) -> list[int]:
        """Return the parts (from 0) of the next `count` rows, if part i has given `given[i]` rows so far."""
        windows = self._windows
        if len(windows) == 1:
            return [0] * count
        opens = [rows * window for rows, window in zip(given, windows)]
        now, turns = sum(given) * self._row, []
        for _ in range(count):
            now += self._row
            _, part = min((begin + window, i) for i, (begin, window) in enumerate(zip(opens, windows)) if begin < now)
            opens[part] += windows[part]
            turns.append(part)
        return turns

    def fits(self, given: Sequence[int]) -> bool:
        """Return whether these weights can lead to `given`: every part lies within one row of its share."""
        now = sum(given) * self._row
        return len(given) == len(self._windows) and all(
            rows >= 0 and abs(rows * window - now) < window for rows, window in zip(given, self._windows)
        )


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the folders' names, each with as many of its parents as it takes to make all names different."""
    above = [Path(os.path.abspath(path)).parts for path in paths]
    for depth in range(1, max(map(len, above)) + 1):
        names = ["-".join(parts[-depth:]) for parts in above]
        if len(set(names)) == len(names):
            return names
    raise UsageError(
        f"data.mixture: {', '.join(map(str, paths))} name a folder twice; name it once with the sum of its weights"
    )


def _check_same_tokenizer(first: TokenShards, other: TokenShards) -> None:
    both = f"{first.directory} and {other.directory}"
    fix = "prepare one of them again with the other's tokenizer (--tokenizer FOLDER/tokenizer)"
    for key, what in (("vocab_size", "vocabulary sizes"), ("end_id", "end tokens")):
        a, b = first.manifest.get(key), other.manifest.get(key)
        if a != b:
            raise UsageError(f"{both}: cannot be mixed, their {what} are {a} and {b}; {fix}")
    if _tokenizer_bytes(first) != _tokenizer_bytes(other):
        names = [shards.manifest.get("tokenizer") for shards in (first, other)]
        raise UsageError(
            f"{both}: cannot be mixed, their {TOKENIZER_FILE} differ (tokenizers {names[0]!r} and {names[1]!r}); {fix}"
        )


def _tokenizer_bytes(shards: TokenShards) -> bytes:
    file = shards.directory / "tokenizer" / TOKENIZER_FILE
    try:
        return regular(file).read_bytes()
    except OSError as error:
        raise UsageError(
            f"{file}: cannot be read ({error.strerror}); copy the folder again or run prepare again"
        ) from error
