"""Study kinds of heads and wirings at an equal budget (paper section B, Table S4)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from studies.code_models import CodeSettings, learned, next_byte, per_pass, train_on_code
from studies.study import Case, Findings, Result, Scale, Study, Tell, spread, values
from studies.training import TrainingSettings, at_depth, sized
from studies.verdicts import contrast, in_words, judge

KINDS: dict[str, dict[str, Any]] = {
    "next token alone": {"heads": 1},
    "transformer, parallel": {},
    "transformer, causal": {"wiring": "causal"},
    "transformer, anticausal": {"wiring": "anticausal"},
    "transformer, +layers": {"extra_layers": 3},
    "linear, parallel": {"head_kind": "linear"},
    "linear, causal": {"head_kind": "linear", "wiring": "causal"},
    "linear, anticausal": {"head_kind": "linear", "wiring": "anticausal"},
    "replicated": {"head_kind": "replicated"},
    "medusa": {"head_kind": "medusa"},
    "stern": {"head_kind": "stern"},
    "sequential": {"head_kind": "sequential", "wiring": "causal"},
    "next token, as shallow": {"heads": 1, "depth": "shallow"},
    "transformer, parallel, never clipped": {"clip": math.inf},
}
"""Differences from four parallel transformer heads. The last two are controls: of depth, and of clipping."""
CONTROLS = tuple(KINDS)[-2:]
PAPER = {
    "next token alone": (30.0, 22.8),
    "transformer, parallel": (33.8, 24.0),
    "transformer, causal": (31.9, 20.9),
    "transformer, anticausal": (30.8, 20.9),
    "transformer, +layers": (33.3, 22.4),
    "linear, parallel": (33.6, 21.9),
}
"""Table S4, 7B: pass@1 on MBPP and on HumanEval."""
HEADS = 4


@dataclass(frozen=True)
class HeadsSettings(CodeSettings):
    """Settings of the study."""

    size: str = "6.7B"
    kinds: tuple[str, ...] = tuple(KINDS)


class HeadsStudy(Study[HeadsSettings]):
    """The study."""

    name = "heads"
    claim = (
        "Of all kinds and wirings of heads, parallel transformer heads gain most consistently on next-token training."
    )
    section = "appendix B, Table S4"
    cannot_show = "What heads do for models of 1.3B parameters and more, or for whether a program is right."
    published = "MBPP pass@1, 7B: next token 30.0, parallel 33.8, linear 33.6, causal 31.9, anticausal 30.8"
    scales: ClassVar[dict[Scale, Any]] = {
        "smoke": HeadsSettings(
            size="0.06M", train_bytes=20_000, test_pieces=1, piece=100,
            training=TrainingSettings(steps=2, rows=2, length=24),
        ),
        "cpu": HeadsSettings(
            seeds=3, size="0.06M", test_pieces=4,
            training=TrainingSettings(steps=300, rows=4, length=128, optimizer="muon", lr=1e-2, warmup_steps=20),
        ),
        "gpu": HeadsSettings(
            seeds=2, size="30M", train_bytes=40_000_000, test_pieces=100,
            training=TrainingSettings(steps=5000, rows=64, length=1024, lr=1e-3, warmup_steps=500, dtype="bfloat16"),
        ),
        "paper": HeadsSettings(
            seeds=1, train_bytes=40_000_000, test_pieces=500,
            training=TrainingSettings(
                steps=25_000, rows=16, accumulate=128, length=4096, lr=3e-4, warmup_steps=2000, dtype="bfloat16",
            ),
        ),
    }  # fmt: skip

    def cases(self, settings: HeadsSettings) -> list[Case]:
        """Return the cases of all conditions and seeds."""
        return [Case({"kind": kind}, seed) for kind in settings.kinds for seed in settings.chosen_seeds]

    def run(self, settings: HeadsSettings, case: Case, tell: Tell) -> dict[str, Any]:
        """Train and measure one case."""
        changes = {"heads": HEADS} | KINDS[str(case.conditions["kind"])]
        depth, clip = changes.pop("depth", "matched"), changes.pop("clip", settings.training.clip)
        settings = replace(settings, training=replace(settings.training, clip=clip))
        changes |= {"vocab_size": 256, "context": settings.training.length}
        model = (
            at_depth(depth, settings.size, HEADS, **changes) if depth == "shallow" else sized(settings.size, **changes)
        )
        return train_on_code(settings, model, case.seed, tell) | {"parameters": model.parameters()["total"]}

    def findings(self, settings: HeadsSettings, results: Sequence[Result]) -> Findings:
        """Judge the claim by the results."""
        rows, contrasts = [], []
        alone = next_byte(results, kind="next token alone")
        for kind in settings.kinds:
            heads = KINDS[kind].get("heads", HEADS)
            of_all_heads = values(results, lambda r: r.numbers["bits_per_byte"], kind=kind)
            bits = [spread(of_one_head) for of_one_head in zip(*of_all_heads)]
            parameters = values(results, lambda r: r.numbers["parameters"], kind=kind)[0]
            paper = PAPER.get(kind)
            rows.append(
                [
                    kind, f"{parameters:,}", *bits, *[""] * (HEADS - heads),
                    spread(per_pass(results, heads, kind=kind), ".2f"),
                    "" if paper is None else f"{paper[0]} / {paper[1]}",
                ]
            )  # fmt: skip
            if kind != "next token alone":
                contrasts.append(contrast(f"{kind}:", alone, next_byte(results, kind=kind)))
        drafting = {
            kind: statistics.median(per_pass(results, HEADS, kind=kind))
            for kind in settings.kinds
            if KINDS[kind].get("heads", HEADS) == HEADS
        }
        best = max(drafting, key=lambda kind: drafting[kind])
        judged = self._improved_by_parallel(contrasts)
        sentence = (
            f"Bits per byte that head 1 gains over next-token training, at equal steps: {in_words(contrasts)}. "
            f"Most bytes per pass with {HEADS} heads: {best} ({drafting[best]:.2f})."
        )
        known = learned(settings, results)
        if not known.passed:
            sentence += " No model did better than always saying the most frequent byte: too short a training."
        notes = [
            "Transformer heads take their layers from the trunk, so that parameters are equal; all other kinds leave "
            "the trunk whole and add theirs.",
            "The paper measures pass@1 of 7B models, out of reach here; it says itself that small models do not gain.",
        ]
        headers = [
            "heads", "parameters", *(f"head {k}, bits per byte" for k in range(1, HEADS + 1)), "bytes per pass",
            "the paper: MBPP / HumanEval @1",
        ]  # fmt: skip
        parallel = next((each.median for each in contrasts if each.what.startswith("transformer, parallel")), 0.0)
        ours = f"head 1 {-parallel:+.3f} bits per byte with parallel heads; most bytes per pass: {best}"
        return Findings(headers, rows, judge(judged, controls=[known]), sentence, ours, notes, [known], judged)

    def _improved_by_parallel(self, contrasts: Sequence[Any]) -> list[Any]:
        """Return the contrasts of the claim: parallel transformer heads gain, and more than every other kind."""
        known = {each.what.rstrip(":"): each for each in contrasts}
        parallel = known.pop("transformer, parallel", None)
        if parallel is None:
            return []
        others = {kind: each for kind, each in known.items() if kind not in CONTROLS}
        gains = [contrast(f"parallel over {kind}", parallel.differences, o.differences) for kind, o in others.items()]
        return [replace(parallel, essential=True), *gains]

    def draw(self, figure: Any, settings: HeadsSettings, results: Sequence[Result]) -> None:
        """Draw the results next to the paper's."""
        left, middle, right = figure.subplots(1, 3, sharey=True)
        for place, kind in enumerate(settings.kinds):
            heads = KINDS[kind].get("heads", HEADS)
            for axes, found in ((left, next_byte(results, kind=kind)), (middle, per_pass(results, heads, kind=kind))):
                axes.plot(found, [place] * len(found), "o", color="C0" if heads == HEADS else "C1", alpha=0.6)
            if kind in PAPER:
                right.plot(PAPER[kind][0], place, "s", color="C2" if heads == HEADS else "C1")
        left.set_yticks(range(len(settings.kinds)), settings.kinds)
        left.invert_yaxis()
        left.set(xlabel="bits per byte (less is better)", title="head 1")
        middle.set(xlabel="with all heads", title="bytes per pass")
        right.set(xlabel="MBPP pass@1, 7B", title="the paper, Table S4")
        for axes in (left, middle, right):
            axes.grid(axis="x")


STUDY = HeadsStudy()
