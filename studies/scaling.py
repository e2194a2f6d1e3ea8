"""Study the effect of more heads on the next token, by size (paper section 3.1, Table S7)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from studies.code_models import CodeSettings, learned, next_byte, train_on_code
from studies.study import Case, Findings, Result, Scale, Study, Tell, spread
from studies.training import DEPTH_NOTE, SHALLOW, TrainingSettings, at_depth, with_depths
from studies.verdicts import contrast, in_words, judge

PAPER = {"0.3B": -0.8, "0.6B": -1.7, "1.3B": 0.6, "3B": 1.6, "6.7B": 2.1, "13B": 4.5}
"""Table S7: MBPP pass@1 of n=4 minus n=1, in points."""


@dataclass(frozen=True)
class ScalingSettings(CodeSettings):
    """Settings of the study."""

    sizes: tuple[str, ...] = tuple(PAPER)
    heads: tuple[int, ...] = (1, 2, 4)
    depths: tuple[str, ...] = SHALLOW
    """Parameter matching, and its control of depth (`at_depth`)."""


class ScalingStudy(Study[ScalingSettings]):
    """The study."""

    name = "scaling"
    claim = "Several heads cost small models quality at an equal budget, larger ones less, and large ones gain by them."
    section = "section 3.1, figure 3, Table S7"
    cannot_show = "Whether large models gain: the paper's curve crosses zero near 1.3B parameters."
    published = "MBPP pass@1, n=4 minus n=1: -0.8 at 0.3B, -1.7, +0.6 at 1.3B, +1.6, +2.1, +4.5 at 13B"
    scales: ClassVar[dict[Scale, Any]] = {
        "smoke": ScalingSettings(
            sizes=("0.06M",), heads=(1, 4), train_bytes=20_000, test_pieces=1, piece=100,
            training=TrainingSettings(steps=4, rows=4, length=32),
        ),
        "cpu": ScalingSettings(
            seeds=3, sizes=("0.06M", "0.25M"), heads=(1, 4), test_pieces=4,
            training=TrainingSettings(steps=800, rows=4, length=128, optimizer="muon", lr=1e-2, warmup_steps=20),
        ),
        "gpu": ScalingSettings(
            seeds=2, sizes=("1M", "10M", "30M", "100M"), train_bytes=40_000_000, test_pieces=100,
            training=TrainingSettings(steps=5000, rows=64, length=1024, lr=1e-3, warmup_steps=500, dtype="bfloat16"),
        ),
        "paper": ScalingSettings(
            seeds=1, train_bytes=40_000_000, test_pieces=500,
            training=TrainingSettings(
                steps=10_850, rows=16, accumulate=128, length=4096, lr=3e-4, warmup_steps=1000, dtype="bfloat16",
            ),
        ),
    }  # fmt: skip

    def cases(self, settings: ScalingSettings) -> list[Case]:
        """Return the cases of all conditions and seeds."""
        return with_depths(settings.chosen_seeds, settings.depths, settings.heads, size=settings.sizes)

    def run(self, settings: ScalingSettings, case: Case, tell: Tell) -> dict[str, Any]:
        """Train and measure one case."""
        model = at_depth(
            str(case.conditions["depth"]), str(case.conditions["size"]), int(case.conditions["n"]),
            vocab_size=256, context=settings.training.length,
        )  # fmt: skip
        return train_on_code(settings, model, case.seed, tell)

    def findings(self, settings: ScalingSettings, results: Sequence[Result]) -> Findings:
        """Judge the claim by the results."""
        rows, contrasts, deep = [], [], []
        losses: dict[tuple[str, int], list[float]] = {}
        more = max(settings.heads)
        for size in settings.sizes:
            for n in settings.heads:
                losses[size, n] = next_byte(results, size=size, n=n, depth="matched")
            for n in settings.heads:
                worse = [a - b for a, b in zip(losses[size, n], losses[size, 1])]
                relative = [100 * a / b for a, b in zip(worse, losses[size, 1])]
                rows.append([size, str(n), spread(losses[size, n]), "" if n == 1 else spread(relative, "+.2f") + " %"])
                for depth in settings.depths[1:] if n > 1 else ():
                    alone = next_byte(results, size=size, n=n, depth=depth)
                    rows.append([size, f"1, as {depth} as n={n}", spread(alone), ""])
                    deep.append(contrast(f"n={n} over n=1 as {depth} at {size}", losses[size, n], alone))
        small, large = settings.sizes[0], settings.sizes[-1]
        contrasts.append(contrast(f"n={more} costs bits at {small}:", losses[small, more], losses[small, 1]))
        if small != large:
            first, last = (
                [100 * (a - b) / b for a, b in zip(losses[size, more], losses[size, 1])] for size in (small, large)
            )
            contrasts.append(contrast(f"the cost in percent falls from {small} to {large} by", first, last))
        costs = [
            (size, statistics.median([100 * (a / b - 1) for a, b in zip(losses[size, more], losses[size, 1])]))
            for size in settings.sizes
        ]
        ours = f"bits per byte of head 1, n={more} over n=1: " + ", ".join(f"{c:+.1f} % at {size}" for size, c in costs)
        sentence = (
            f"{in_words(contrasts)}. Bits that n costs at equal depth: {in_words(deep)}. That models "
            "of 1.3B and more gain is out of reach here; sizes this small lie on the side of the "
            "paper's curve where heads cost."
        )
        known = learned(settings, results)
        if not known.passed:
            sentence += " No model did better than always saying the most frequent byte: too short a training."
        headers = ["size", "n", "head 1, bits per byte", "over n=1"]
        notes = [
            "The same number of parameters and the same bytes for every n; held-out code of Python's own library.",
            DEPTH_NOTE,
        ]
        # 1.3B is the smallest size that gains in the paper.
        whole = "1.3B" in settings.sizes and all(each.leans for each in deep)
        verdict = judge(contrasts, controls=[known], whole=whole)
        return Findings(headers, rows, verdict, sentence, ours, notes, [known], contrasts)

    def draw(self, figure: Any, settings: ScalingSettings, results: Sequence[Result]) -> None:
        """Draw the results next to the paper's."""
        left, right = figure.subplots(1, 2)
        one = {size: next_byte(results, size=size, n=1, depth="matched") for size in settings.sizes}
        for i, n in enumerate(n for n in settings.heads if n > 1):
            found = [
                [100 * (a / b - 1) for a, b in zip(next_byte(results, size=size, n=n, depth="matched"), one[size])]
                for size in settings.sizes
            ]
            left.plot(settings.sizes, [statistics.median(x) for x in found], color=f"C{i}", label=f"n = {n}")
            for size, costs in zip(settings.sizes, found):
                left.plot([size] * len(costs), costs, "o", color=f"C{i}", alpha=0.5)
        left.axhline(0, color="0.5", linewidth=0.9)
        left.set(xlabel="size (non-embedding)", ylabel="bits per byte of head 1 over n = 1, %", title="ours")
        left.legend()
        right.bar(list(PAPER), list(PAPER.values()), color=["C1" if gain < 0 else "C2" for gain in PAPER.values()])
        right.axhline(0, color="0.5", linewidth=0.9)
        right.set(xlabel="size", ylabel="MBPP pass@1, n = 4 minus n = 1, points", title="the paper, Table S7")


STUDY = ScalingStudy()
