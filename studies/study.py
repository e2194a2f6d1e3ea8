"""What a study is: a claim of a paper, cases that are run, and what their numbers say of the claim."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

Scale = Literal["smoke", "cpu", "gpu", "paper"]
SCALES: tuple[Scale, ...] = get_args(Scale)
Verdict = Literal["reproduced", "direction only", "null", "out of reach"]
Tell = Callable[..., None]
"""Shows its keywords beside the progress of the study: `tell(step="20/60", loss="1.31")`."""


@dataclass(frozen=True)
class StudySettings:
    """What every study is told; each has a dataclass of its own with more, one value of it for each scale."""

    seeds: int = 1
    """Every condition is run with this many seeds, 0, 1, ...; a finished study may go on with more."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, ..."""


@dataclass(frozen=True)
class Case:
    """A condition with a seed: what is run as one, and kept as one file."""

    conditions: dict[str, str | int | float]
    seed: int

    @property
    def name(self) -> str:
        """Of its file too."""
        words = [f"{name}={value}" for name, value in {**self.conditions, "seed": self.seed}.items()]
        return ",".join(words).replace("/", "_").replace(" ", "_")


@dataclass(frozen=True)
class Result:
    """What a case found."""

    case: Case
    numbers: dict[str, Any]
    seconds: float

    def of(self, **conditions: object) -> bool:
        """Whether its case has all of `conditions`."""
        return all(self.case.conditions.get(name) == value for name, value in conditions.items())


def values(results: Sequence[Result], number: Callable[[Result], Any], **conditions: object) -> list[Any]:
    """`number` of the results of these conditions, in the order of their seeds."""
    found = sorted((result for result in results if result.of(**conditions)), key=lambda result: result.case.seed)
    return [number(result) for result in found]


def spread(numbers: Sequence[float], form: str = ".3f") -> str:
    """Median over seeds and, of several, their range: "0.42 (0.40 to 0.47)"."""
    if not numbers:
        return ""
    middle = format(statistics.median(numbers), form)
    if len(numbers) == 1:
        return middle
    return f"{middle} ({min(numbers):{form}} to {max(numbers):{form}})"


@dataclass(frozen=True)
class Findings:
    """What the results say."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The table: medians and ranges over seeds."""
    verdict: Verdict
    sentence: str
    """What the data support, nulls included."""
    ours: str
    """The number of ours that stands beside the paper's, in a few words."""
    notes: Sequence[str] = field(default=())


Settings = TypeVar("Settings", bound=StudySettings)


class Study(ABC, Generic[Settings]):
    """One file of this folder; its module ends with `STUDY = ...`, and `catalogue.py` names it."""

    name: ClassVar[str]
    claim: ClassVar[str]
    """One sentence."""
    section: ClassVar[str]
    """Where the claim stands: the paper's section or table."""
    published: ClassVar[str]
    """The paper's own number in a few words, or that it gives none."""
    not_yet_run: ClassVar[tuple[Scale, ...]] = ("gpu", "paper")
    """Scales whose settings were only ever checked."""
    scales: ClassVar[dict[Scale, Any]]
    """Settings of its own dataclass."""

    @abstractmethod
    def cases(self, settings: Settings) -> list[Case]:
        """What is to be run, in order; cases that are in one another's comparison stand close together."""

    @abstractmethod
    def run(self, settings: Settings, case: Case, tell: Tell) -> dict[str, Any]:
        """The numbers of one case, as JSON has them."""

    @abstractmethod
    def findings(self, settings: Settings, results: Sequence[Result]) -> Findings:
        """Of the results of all cases."""

    @abstractmethod
    def draw(self, figure: Any, settings: Settings, results: Sequence[Result]) -> None:
        """Draws on a matplotlib figure, the paper's numbers beside ours."""


def crossed(seeds: int, **conditions: Sequence[Any]) -> list[Case]:
    """Every combination of the conditions with every seed; the last condition and then the seed change fastest."""
    combinations: list[dict[str, Any]] = [{}]
    for name, choices in conditions.items():
        combinations = [{**before, name: choice} for before in combinations for choice in choices]
    return [Case(combination, seed) for combination in combinations for seed in range(seeds)]
