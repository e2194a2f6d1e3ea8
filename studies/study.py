"""Define a study: a claim of a paper, the cases that test it, and a judgement of their numbers."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

from studies.verdicts import Contrast, Control, Verdict

Scale = Literal["smoke", "cpu", "gpu", "paper"]
SCALES: tuple[Scale, ...] = get_args(Scale)
Tell = Callable[..., None]
"""Function that shows its keywords next to the progress of the study: `tell(step="20/60", loss="1.31")`."""


@dataclass(frozen=True)
class StudySettings:
    """Settings of every study. Each study has a dataclass with more, and one value of it for each scale."""

    seeds: int = 1
    """Number of seeds of every condition; a finished study can continue with more."""
    first_seed: int = 10
    """The seeds are this number and those that follow it. Those below 10 are for tuning, and judge nothing."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, ..."""

    @property
    def chosen_seeds(self) -> range:
        """The seeds of every condition."""
        return range(self.first_seed, self.first_seed + self.seeds)


@dataclass(frozen=True)
class Case:
    """A condition with a seed, whose result is one file."""

    conditions: dict[str, str | int | float]
    seed: int

    @property
    def arm(self) -> str:
        """Conditions in words, without the seed."""
        return ", ".join(f"{name} {value}" for name, value in self.conditions.items())

    @property
    def name(self) -> str:
        """Name of the case and of its file."""
        words = [f"{name}={value}" for name, value in {**self.conditions, "seed": self.seed}.items()]
        return ",".join(words).replace("/", "_").replace(" ", "_")


@dataclass(frozen=True)
class Result:
    """The result of a case."""

    case: Case
    numbers: dict[str, Any]
    seconds: float

    def of(self, **conditions: object) -> bool:
        """Return whether its case has all of `conditions`."""
        return all(self.case.conditions.get(name) == value for name, value in conditions.items())


def values(results: Sequence[Result], number: Callable[[Result], Any], **conditions: object) -> list[Any]:
    """Return `number` of the results with these conditions, in the order of their seeds."""
    found = sorted((result for result in results if result.of(**conditions)), key=lambda result: result.case.seed)
    return [number(result) for result in found]


def spread(numbers: Sequence[float], form: str = ".3f") -> str:
    """Return the median over seeds and the range of several, as "0.42 (0.40 to 0.47)"."""
    if not numbers:
        return ""
    middle = format(statistics.median(numbers), form)
    if len(numbers) == 1:
        return middle
    return f"{middle} ({min(numbers):{form}} to {max(numbers):{form}})"


@dataclass(frozen=True)
class Findings:
    """The judgement of a study's results."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The table: medians and ranges over seeds."""
    verdict: Verdict
    sentence: str
    """Sentence that the data support, nulls included."""
    ours: str
    """Our number to compare with the paper's, in a few words."""
    notes: Sequence[str] = field(default=())
    controls: Sequence[Control] = field(default=())
    """Positive controls; the verdict is "out of reach" if one failed."""
    contrasts: Sequence[Contrast] = field(default=())
    """Differences that were judged."""


Settings = TypeVar("Settings", bound=StudySettings)


class Study(ABC, Generic[Settings]):
    """A study. Its file ends with `STUDY = ...`, and `run.STUDIES` names it."""

    name: ClassVar[str]
    claim: ClassVar[str]
    """One sentence."""
    section: ClassVar[str]
    """The paper's section or table that makes the claim."""
    published: ClassVar[str]
    """The paper's own number in a few words, or that it gives none."""
    cannot_show: ClassVar[str]
    """One sentence: what the study cannot show, whatever its numbers."""
    compared_at: ClassVar[str] = "tokens"
    """Amount that all conditions have in common: "tokens", or "processor time"."""
    not_yet_run: ClassVar[tuple[Scale, ...]] = ("gpu", "paper")
    """Scales that were never run: only their settings were checked."""
    scales: ClassVar[dict[Scale, Any]]
    """Settings of each scale, in the study's own dataclass."""

    @abstractmethod
    def cases(self, settings: Settings) -> list[Case]:
        """Return the cases in order; cases to compare with one another stand close together."""

    @abstractmethod
    def run(self, settings: Settings, case: Case, tell: Tell) -> dict[str, Any]:
        """Run a case and return its numbers, as JSON holds them."""

    @abstractmethod
    def findings(self, settings: Settings, results: Sequence[Result]) -> Findings:
        """Judge the claim by the results of all cases."""

    @abstractmethod
    def draw(self, figure: Any, settings: Settings, results: Sequence[Result]) -> None:
        """Draw our numbers next to the paper's on a matplotlib figure."""


def crossed(seeds: Sequence[int], **conditions: Sequence[Any]) -> list[Case]:
    """Return every combination of conditions and seeds; the seed and then the last condition change fastest."""
    combinations: list[dict[str, Any]] = [{}]
    for name, choices in conditions.items():
        combinations = [{**before, name: choice} for before in combinations for choice in choices]
    return [Case(combination, seed) for combination in combinations for seed in seeds]
