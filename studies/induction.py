"""Study induction, "A B ... A" -> "B" (paper section 4.1 and appendix J)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from headstart.model.transformer import Transformer
from studies.stories import Name, Stories
from studies.study import Case, Findings, Result, Scale, Study, StudySettings, Tell, spread, values
from studies.training import (
    DEPTH_NOTE,
    SHALLOW,
    TrainingSettings,
    at_depth,
    in_memory,
    run_config,
    stream_of,
    train_model,
    with_depths,
    written_right,
)
from studies.verdicts import Contrast, Control, contrast, in_words, judge

FORMED = 0.1
"""Accuracy above guessing that some model must reach: else no model formed induction, and nothing is compared."""


IN_BOOKS = 0.5
"""Accuracy that next-token training must reach with books: they leave nothing else to learn."""


@dataclass(frozen=True)
class InductionSettings(StudySettings):
    """Settings of the study."""

    sizes: tuple[str, ...] = ("1M", "3M", "10M", "30M", "100M", "300M", "1B")
    heads: tuple[int, ...] = (1, 2)
    depths: tuple[str, ...] = SHALLOW
    """Parameter matching, and its control of depth (`at_depth`)."""
    data: tuple[str, ...] = ("stories", "books")
    """stories alone, or books and stories 9:1 (appendix J)."""
    names: int = 120
    """Number of names in the training stories; people in books have other names."""
    first: int = 24
    """Number of tokens with which names begin."""
    second: int = 24
    """Number of tokens with which names end."""
    stories: int = 4000
    tests: int = 100
    """Number of test stories, with names that no training story has."""
    every: int = 50
    """Steps between evaluations, of which the best counts, as in the paper."""
    training: TrainingSettings = field(default_factory=TrainingSettings)


class InductionStudy(Study[InductionSettings]):
    """The study."""

    name = "induction"
    claim = (
        "Predicting two tokens makes small models form induction, which next-token models of their size do not; "
        "with better data both form it, and the difference goes."
    )
    section = "section 4.1, figure 7, appendix J"
    cannot_show = "Where the advantage ends: the paper's crossover lies at 100M parameters."
    published = "curves only, no numbers: n=2 vastly better up to 30M, no gain from 100M on; none with books 9:1"
    scales: ClassVar[dict[Scale, Any]] = {
        "smoke": InductionSettings(
            sizes=("0.06M",), data=("stories",), names=20, first=6, second=6, stories=60, tests=10, every=5,
            training=TrainingSettings(steps=10, rows=8, length=48),
        ),
        "cpu": InductionSettings(
            seeds=3, sizes=("0.06M", "0.25M"), training=TrainingSettings(
                steps=250, rows=16, length=96, lr=3e-3, warmup_steps=25,
            ),
        ),
        "gpu": InductionSettings(
            seeds=2, sizes=("0.25M", "1M", "3M", "10M", "30M"), names=2000, first=200, second=200, stories=200_000,
            every=200,
            training=TrainingSettings(steps=4000, rows=128, length=512, lr=3e-4, warmup_steps=200, dtype="bfloat16"),
        ),
        "paper": InductionSettings(
            seeds=2, names=5000, first=400, second=400, stories=2_000_000, every=2000,
            training=TrainingSettings(
                steps=100_000, rows=128, length=2048, lr=1e-4, warmup_steps=2000, dtype="bfloat16",
            ),
        ),
    }  # fmt: skip

    def cases(self, settings: InductionSettings) -> list[Case]:
        """Return the cases of all conditions and seeds."""
        return with_depths(
            settings.chosen_seeds, settings.depths, settings.heads, data=settings.data, size=settings.sizes
        )

    def run(self, settings: InductionSettings, case: Case, tell: Tell) -> dict[str, Any]:
        """Train and measure one case."""
        stories, training = Stories(settings.first, settings.second), settings.training
        model = at_depth(
            str(case.conditions["depth"]), str(case.conditions["size"]), int(case.conditions["n"]),
            vocab_size=stories.vocab_size, context=max(256, training.length),
        )  # fmt: skip
        config = run_config(training, model, case.seed, settings.device)
        rng = np.random.default_rng([case.seed, 0])
        known = stories.names(settings.names, rng)
        sources = [in_memory([stories.story(_two(known, rng), rng)[0] for _ in range(settings.stories)])]
        weights = [1.0]
        if case.conditions["data"] == "books":
            others = stories.names(stories.first * stories.second, rng)
            sources.append(in_memory([stories.book(_two(others, rng), rng)[0] for _ in range(settings.stories)]))
            weights = [1.0, 9.0]
        tests = _tests(stories, settings.tests, set(known))
        beginnings, rest = [tokens[:1] for tokens, _ in tests], [tokens[1:] for tokens, _ in tests]

        def watch(done: int, model: Transformer, found: list[float]) -> None:
            if done % settings.every == 0 or done == training.steps:
                right = written_right(model.eval(), beginnings, rest)
                scored = [story[at - 1] for story, (_, again) in zip(right, tests) for at in again]
                found.append(sum(scored) / len(scored))
                model.train()
                tell(induction=f"{found[-1]:.3f}")

        trained = train_model(config, stream_of(sources, config, weights), tell, watch=watch)
        found = trained.seen
        return {
            "best": max(found), "last": found[-1], "curve": found, "losses": trained.losses, "clipped": trained.clipped,
        }  # fmt: skip

    def findings(self, settings: InductionSettings, results: Sequence[Result]) -> Findings:
        """Judge the claim by the results."""
        rows = []
        for data in settings.data:
            for size in settings.sizes:
                conditions = with_depths([0], settings.depths, settings.heads)
                for n, depth in (case.conditions.values() for case in conditions):
                    where = {"data": data, "size": size, "n": n, "depth": depth}
                    cells = (values(results, lambda r, key=key: r.numbers[key], **where) for key in ("best", "last"))  # type: ignore[misc]
                    loss = values(results, lambda r: r.numbers["losses"][0], **where)
                    rows.append(
                        [
                            data,
                            size,
                            f"{n}" if depth == "matched" else f"1, as {depth} as n={n}",
                            *map(spread, cells),
                            spread(loss),
                        ]
                    )
        chance = 1 / settings.second
        best = max(result.numbers["best"] for result in results)
        contrasts, deep = self._contrasts(settings, results), self._contrasts(settings, results, "shallow")
        controls = [Control("best accuracy of any model", best, chance + FORMED)]
        if "books" in settings.data:
            known = max(values(results, lambda r: r.numbers["best"], data="books", n=1))
            controls.append(Control("best accuracy of n=1 with books", known, IN_BOOKS))
        sentence = (
            "Accuracy on the second token of new names, at mentions after the first, best of all evaluations "
            f"(guessing: {chance:.3f}): {in_words(contrasts)}. "
            f"Controls of depth: {in_words(deep)}."
        )
        if not controls[0].passed:
            sentence += " No model formed induction at all."
        ours = "; ".join(f"{each.what} {each.median:+.3f}" for each in contrasts if each.what.startswith("n=2"))
        notes = [
            DEPTH_NOTE,
            "Stories and books are made from templates; the names of test stories occur in no training story, their "
            "tokens do, and in books the names may. In books people have other names each time, so that only induction "
            "predicts them.",
            f"Each model read {settings.training.steps * settings.training.rows * settings.training.length:,} tokens. "
            "Induction is published to appear after about 10^5.7 sqrt(batch x context) tokens, whatever the size "
            f"(arXiv 2511.16893): {10**5.7 * (settings.training.rows * settings.training.length) ** 0.5:,.0f} here.",
        ]
        return Findings(
            ["data", "size", "n", "best", "last", "loss of head 1"], rows,
            judge(contrasts, controls=controls, whole=all(each.leans for each in deep)),
            sentence, ours, notes, controls, contrasts,
        )  # fmt: skip

    def _contrasts(
        self, settings: InductionSettings, results: Sequence[Result], depth: str = "matched"
    ) -> list[Contrast]:
        """Return the contrasts of several heads over one head, of equal parameters or of equal depth ("shallow")."""
        if depth not in settings.depths:
            return []

        def best(data: str, size: str, n: int) -> list[float]:
            where = {"n": last, "depth": depth} if n == 1 and depth != "matched" else {"n": n, "depth": "matched"}
            return values(results, lambda r: r.numbers["best"], data=data, size=size, **where)

        last, margin = max(settings.heads), 0.02
        one = "n=1" if depth == "matched" else f"n=1 as {depth}"
        found = []
        for size in settings.sizes:
            more, less = best("stories", size, last), best("stories", size, 1)
            found.append(contrast(f"n={last} over {one} on stories ({size})", more, less, margin))
            if "books" in settings.data:
                found.append(contrast(f"books over stories at {one} ({size})", best("books", size, 1), less, margin))
                gap = [a - b for a, b in zip(more, less)]
                with_books = [a - b for a, b in zip(best("books", size, last), best("books", size, 1))]
                found.append(contrast(f"that gap on stories over the one with books ({size})", gap, with_books, margin))
        return found

    def draw(self, figure: Any, settings: InductionSettings, results: Sequence[Result]) -> None:
        """Draw the results next to the paper's."""
        grid = figure.subplots(1, len(settings.data), squeeze=False, sharey=True)[0]
        for axes, data in zip(grid, settings.data):
            for i, n in enumerate(settings.heads):
                found = [
                    values(results, lambda r: r.numbers["best"], data=data, size=s, n=n, depth="matched")
                    for s in settings.sizes
                ]
                axes.plot(settings.sizes, [statistics.median(x) for x in found], color=f"C{i}", label=f"n = {n}")
                for size, accuracies in zip(settings.sizes, found):
                    axes.plot([size] * len(accuracies), accuracies, "o", color=f"C{i}", alpha=0.5, markersize=5)
            axes.axhline(1 / settings.second, color="0.5", linestyle="--", linewidth=0.9, label="guessing")
            title = "stories" if data == "stories" else "books and stories, 9:1"
            axes.set(xlabel="size (non-embedding)", title=title, ylim=(0, 1))
        grid[0].set_ylabel("second token of new names right")
        grid[0].legend()
        figure.suptitle("The paper gives curves without numbers: n = 2 far above n = 1 up to 30M", fontsize=10)


def _two(names: list[Name], rng: np.random.Generator) -> tuple[Name, Name]:
    first, second = rng.choice(len(names), size=2, replace=False)
    return names[first], names[second]


def _tests(stories: Stories, count: int, known: set[Name]) -> list[tuple[list[int], list[int]]]:
    """Return stories with new names, and the places of the tokens that count."""
    rng = np.random.default_rng(1)
    names = stories.names(2 * count, rng, known)
    return [stories.story(_two(names, rng), rng) for _ in range(count)]


STUDY = InductionStudy()
