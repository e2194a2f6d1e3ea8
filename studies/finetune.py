"""Study finetuning a model with four heads, with and without them (paper section 3.6, on polynomial arithmetic)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from headstart.model.transformer import Transformer
from headstart.training.adapt.new_heads import with_heads
from studies.polynomial_ring import RingSettings
from studies.study import Case, Findings, Result, Scale, Study, Tell, spread, values
from studies.training import (
    DEPTH_NOTE,
    SHALLOW,
    TrainingSettings,
    at_depth,
    run_config,
    stream_of,
    train_model,
    with_depths,
    written_right,
)
from studies.verdicts import contrast, in_words, judge

HEADS = 4
_SEVERAL = {"n": HEADS, "depth": "matched"}
ARMS: dict[str, tuple[dict[str, Any], str]] = {
    "n=1, then 1": ({"n": 1}, "then 1"),
    "n=1 as shallow, then 1": ({"n": HEADS, "depth": "shallow"}, "then 1"),
    f"n={HEADS}, then {HEADS}": (_SEVERAL, f"then {HEADS}"),
    f"n={HEADS}, then 1": (_SEVERAL, "then 1"),
}
"""Conditions of each arm's case, and its number: pretrained and finetuned heads."""


@dataclass(frozen=True)
class FinetuneSettings(RingSettings):
    """Settings of the study; finetuning has exactly one operation more than pretraining."""

    finetuning_problems: int = 10_000
    size: str = "30M"
    finetuning: TrainingSettings = field(default_factory=TrainingSettings)


class FinetuneStudy(Study[FinetuneSettings]):
    """The study."""

    name = "finetune"
    claim = (
        "A model pretrained with four heads is the better one to finetune, and best where the further heads are left "
        "out of the finetuning."
    )
    section = "section 3.6, figure 4"
    cannot_show = "What finetuning does to models of code: problems here have one short answer."
    published = "curves only (CodeContests, 7B): n=4 then n'=1 above n=4 then n'=4, both above n=1, at every k"
    scales: ClassVar[dict[Scale, Any]] = {
        "smoke": FinetuneSettings(
            p=3, d=2, operations=1, problems=200, finetuning_problems=50, tests=20, size="0.06M",
            training=TrainingSettings(steps=5, rows=8, length=48),
            finetuning=TrainingSettings(steps=3, rows=8, length=48),
        ),
        "cpu": FinetuneSettings(
            seeds=3, p=3, d=2, operations=1, problems=40_000, finetuning_problems=4000, tests=500, size="0.25M",
            answers_only=True,
            training=TrainingSettings(steps=350, rows=24, length=64, lr=4e-3, warmup_steps=40),
            finetuning=TrainingSettings(steps=100, rows=24, length=64, lr=1e-3, warmup_steps=10),
        ),
        "gpu": FinetuneSettings(
            seeds=2, operations=4, problems=4_000_000, finetuning_problems=200_000, size="10M",
            training=TrainingSettings(steps=6000, rows=128, length=1024, lr=3e-4, warmup_steps=500, dtype="bfloat16"),
            finetuning=TrainingSettings(steps=1000, rows=64, length=1024, lr=5e-5, warmup_steps=50, dtype="bfloat16"),
        ),
        "paper": FinetuneSettings(
            seeds=2, problems=20_000_000, finetuning_problems=1_000_000, size="100M",
            training=TrainingSettings(
                steps=100_000, rows=128, length=2048, lr=1e-4, warmup_steps=2000, dtype="bfloat16",
            ),
            finetuning=TrainingSettings(
                steps=13_000, rows=64, length=4096, lr=5e-5, warmup_steps=400, final_lr_ratio=0.004, dtype="bfloat16",
            ),
        ),
    }  # fmt: skip

    def cases(self, settings: FinetuneSettings) -> list[Case]:
        """Return the cases of all conditions and seeds."""
        return with_depths(settings.chosen_seeds, SHALLOW, (1, HEADS))

    def run(self, settings: FinetuneSettings, case: Case, tell: Tell) -> dict[str, Any]:
        """Pretrain, then finetune with all heads and, from the same weights, with head 1 alone."""
        ring, depth = settings.ring, str(case.conditions["depth"])
        context = max(settings.training.length, settings.finetuning.length, ring.longest(settings.operations + 1, 0))
        model = at_depth(depth, settings.size, int(case.conditions["n"]), vocab_size=ring.vocab_size, context=context)
        n = model.heads
        config = run_config(settings.training, model, case.seed, settings.device)
        problems = ring.documents(settings.problems, settings.operations, 0, case.seed)
        trained = train_model(config, stream_of(settings.shards(problems), config), tell)
        pretrained = trained.model
        numbers: dict[str, Any] = {"before": self._exact(settings, pretrained), "clipped": trained.clipped}
        harder = ring.documents(
            settings.finetuning_problems, settings.operations + 1, 0, case.seed + 1000, least=settings.operations + 1
        )
        shards = settings.shards(harder)
        for heads in {n: (n,), HEADS: (HEADS, 1)}[n]:
            begun = pretrained if heads == n else without_further_heads(pretrained)
            again = run_config(settings.finetuning, begun.config, case.seed, settings.device)
            copy = Transformer(begun.config)
            copy.load_state_dict(begun.state_dict())
            tuned = train_model(again, stream_of(shards, again), tell, model=copy)
            numbers[f"then {heads}"] = self._exact(settings, tuned.model)
        _, answers = ring.tests(settings.tests, settings.operations + 1, 0)
        numbers["guessed"] = max(answers.count(answer) for answer in set(answers)) / len(answers)
        return numbers

    def _exact(self, settings: FinetuneSettings, model: Transformer) -> float:
        questions, answers = settings.ring.tests(settings.tests, settings.operations + 1, 0)
        right = written_right(model, questions, answers)
        return sum(map(all, right)) / len(right)

    def findings(self, settings: FinetuneSettings, results: Sequence[Result]) -> Findings:
        """Judge the claim by the results."""
        arms = {
            name: values(results, lambda r, after=after: r.numbers[after], **where)  # type: ignore[misc]
            for name, (where, after) in ARMS.items()
        }
        one, shallow, four, stripped = arms.values()
        rows = [
            [name, spread(values(results, lambda r: r.numbers["before"], **where)), spread(arms[name])]
            for name, (where, _) in ARMS.items()
        ]
        margin = 0.5 / settings.tests**0.5
        contrasts = [
            contrast(f"n={HEADS} then {HEADS} over n=1", four, one, margin),
            contrast(f"n={HEADS} then 1 over n=1", stripped, one, margin),
            contrast(f"n={HEADS} then 1 over then {HEADS}", stripped, four, margin),
        ]
        deep = [contrast(f"n={HEADS} then 1 over n=1 as shallow", stripped, shallow, margin)]
        floor = results[0].numbers["guessed"]
        learned = settings.learned("exact match of the best arm", max(map(max, arms.values())), floor)
        sentence = (
            f"Exact match on {settings.operations + 1} operations after finetuning on them: {in_words(contrasts)}. "
            f"Control of depth: {in_words(deep)}."
        )
        if not learned.passed:
            sentence += f" No arm was above the most frequent answer ({floor:.3f}): too short a training to compare."
        ours = "; ".join(f"{name} {statistics.median(found):.3f}" for name, found in arms.items())
        notes = [
            f"Pretrained on m = 1..{settings.operations} in F_{settings.p}[X]/(X^{settings.d}), finetuned on "
            f"{settings.finetuning_problems:,} problems of m = {settings.operations + 1}; the most frequent answer is "
            f"right in {floor:.3f}.",
            DEPTH_NOTE,
            "The paper's data, CodeContests' programs with their rewards: `headstart prepare --rewards`.",
        ]  # fmt: skip
        headers = ["pretrained, then finetuned with", "exact match before", "exact match after"]
        verdict = judge(contrasts, controls=[learned], whole=all(each.leans for each in deep))
        return Findings(headers, rows, verdict, sentence, ours, notes, [learned], contrasts)

    def draw(self, figure: Any, settings: FinetuneSettings, results: Sequence[Result]) -> None:
        """Draw the results next to the paper's."""
        axes = figure.add_subplot()
        for place, (where, key) in enumerate(ARMS.values()):
            before = values(results, lambda r: r.numbers["before"], **where)
            after = values(results, lambda r, key=key: r.numbers[key], **where)  # type: ignore[misc]
            axes.plot(
                [place - 0.1] * len(before), before, "o", color="0.6", label=None if place else "before finetuning"
            )
            axes.plot([place + 0.1] * len(after), after, "o", color="C0", label=None if place else "after")
        axes.axhline(results[0].numbers["guessed"], color="0.5", linestyle="--", label="most frequent answer")
        axes.set_xticks(range(len(ARMS)), list(ARMS))
        axes.set(ylabel="exact match", ylim=(0, None))
        axes.set_title(
            "The paper's order (CodeContests, curves without numbers): n=1 < n=4 then 4 < n=4 then 1", fontsize=10
        )
        axes.legend()


def without_further_heads(model: Transformer) -> Transformer:
    """Return the next-token model inside one with several heads, as a copy: the trunk and the path to head 1."""
    config = replace(model.config, heads=1, layers=model.config.next_token_layers, extra_layers=0)
    copy = Transformer(model.config)
    copy.load_state_dict(model.state_dict())
    return with_heads(copy, config)


STUDY = FinetuneStudy()
