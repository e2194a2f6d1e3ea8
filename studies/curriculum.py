"""Study heads taken in one by one, or left out one by one (arXiv 2505.22757)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from headstart.objective.head_weights import HeadWeights
from studies.code_models import CodeSettings, learned, next_byte, per_pass, train_on_code
from studies.study import Case, Findings, Result, Scale, Study, Tell, spread
from studies.training import TrainingSettings, sized
from studies.verdicts import contrast, in_words, judge

SCHEDULES = {
    "constant": HeadWeights(),
    "forward": HeadWeights(curriculum="forward"),
    "reverse": HeadWeights(curriculum="reverse"),
}
ALONE = "next token alone"


@dataclass(frozen=True)
class CurriculumSettings(CodeSettings):
    """Settings of the study."""

    size: str = "1.3B"
    heads: int = 4


class CurriculumStudy(Study[CurriculumSettings]):
    """The study."""

    name = "curriculum"
    claim = (
        "For small models a forward curriculum (heads join one by one) has a better next token than all heads from the "
        "start and still drafts; a reverse one has the best next token, and useless drafts."
    )
    section = "arXiv 2505.22757, of the method's family"
    cannot_show = "What schedules do for models that are trained to the end, or at the sizes of their paper."
    published = "1.3B and 3B: the direction, from a summary; no number at hand"
    scales: ClassVar[dict[Scale, Any]] = {
        "smoke": CurriculumSettings(
            size="0.06M", heads=2, train_bytes=20_000, test_pieces=1, piece=100,
            training=TrainingSettings(steps=4, rows=4, length=32),
        ),
        "cpu": CurriculumSettings(
            seeds=3, size="0.06M", test_pieces=4,
            training=TrainingSettings(steps=800, rows=4, length=128, optimizer="muon", lr=1e-2, warmup_steps=20),
        ),
        "gpu": CurriculumSettings(
            seeds=2, size="30M", train_bytes=40_000_000, test_pieces=100,
            training=TrainingSettings(steps=5000, rows=64, length=1024, lr=1e-3, warmup_steps=500, dtype="bfloat16"),
        ),
        "paper": CurriculumSettings(
            seeds=1, train_bytes=40_000_000, test_pieces=500,
            training=TrainingSettings(
                steps=10_000, rows=16, accumulate=16, length=2048, lr=3e-4, warmup_steps=500, dtype="bfloat16",
            ),
        ),
    }  # fmt: skip

    def cases(self, settings: CurriculumSettings) -> list[Case]:
        """Return the cases of all conditions and seeds."""
        return [Case({"schedule": name}, seed) for name in (ALONE, *SCHEDULES) for seed in settings.chosen_seeds]

    def run(self, settings: CurriculumSettings, case: Case, tell: Tell) -> dict[str, Any]:
        """Train and measure one case."""
        schedule = str(case.conditions["schedule"])
        heads = 1 if schedule == ALONE else settings.heads
        model = sized(settings.size, vocab_size=256, heads=heads, context=settings.training.length)
        return train_on_code(settings, model, case.seed, tell, SCHEDULES.get(schedule))

    def findings(self, settings: CurriculumSettings, results: Sequence[Result]) -> Findings:
        """Judge the claim by the results."""
        bits = {name: next_byte(results, schedule=name) for name in (ALONE, *SCHEDULES)}
        drafts = {name: per_pass(results, settings.heads, schedule=name) for name in SCHEDULES}
        rows = [[name, spread(bits[name]), spread(drafts[name], ".2f") if name in drafts else "1.00"] for name in bits]
        contrasts = [
            contrast("forward: bits gained on constant", bits["constant"], bits["forward"], essential=True),
            contrast("reverse: bits gained on constant", bits["constant"], bits["reverse"]),
            contrast("reverse: bits gained on forward", bits["forward"], bits["reverse"]),
            contrast("forward over reverse, bytes per pass", drafts["forward"], drafts["reverse"]),
            contrast(
                "forward's drafts over twice those of reverse",
                [x - 1 for x in drafts["forward"]],
                [2 * (x - 1) for x in drafts["reverse"]],
            ),
        ]
        sentence = f"{in_words(contrasts)}."
        known = learned(settings, results)
        if not known.passed:
            sentence += " No model did better than always saying the most frequent byte: too short a training."
        ours = "; ".join(f"{each.what} {each.median:+.3f}" for each in contrasts[::3])
        headers = ["schedule", "head 1, bits per byte", f"bytes per pass with {settings.heads} heads"]
        notes = ["Equal steps and parameters; a step with fewer heads is also a cheaper one, which is not counted."]
        return Findings(headers, rows, judge(contrasts, controls=[known]), sentence, ours, notes, [known], contrasts)

    def draw(self, figure: Any, settings: CurriculumSettings, results: Sequence[Result]) -> None:
        """Draw the results next to the paper's."""
        left, right = figure.subplots(1, 2)
        for place, name in enumerate((ALONE, *SCHEDULES)):
            found = next_byte(results, schedule=name)
            left.plot([place] * len(found), found, "o", color=f"C{place}", alpha=0.7)
            if name in SCHEDULES:
                found = per_pass(results, settings.heads, schedule=name)
                right.plot([place] * len(found), found, "o", color=f"C{place}", alpha=0.7)
        left.set_xticks(range(1 + len(SCHEDULES)), [ALONE.replace(" ", "\n", 1), *SCHEDULES])
        right.set_xticks(range(1, 1 + len(SCHEDULES)), list(SCHEDULES))
        left.set(ylabel="bits per byte of head 1 (less is better)")
        right.set(ylabel=f"bytes per pass with {settings.heads} heads")
        figure.suptitle(
            "The paper's order: next token reverse < forward < constant; drafts of reverse useless", fontsize=10
        )


STUDY = CurriculumStudy()
