"""Study how often a multi-token loss counts a choice point (paper sections 5.1 and L.3)."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from studies.study import Case, Findings, Result, Scale, Study, StudySettings, Tell, spread, values
from studies.training import TrainingSettings, in_memory, run_config, sized, stream_of, train_model
from studies.verdicts import SEEDS, Contrast, judge

LENGTH, INCONSEQUENTIAL, CHOICE = 24, 7, 15
"""Tokens of a sequence, and the places (from 0) of the token drawn without consequence, and of the one that decides all
later tokens."""
ALLOWED = 0.1
"""Share of the count by which a trained model's losses may differ from it. Enumerated losses must be exact."""


@dataclass(frozen=True)
class ChoicePointsSettings(StudySettings):
    """Settings of the study."""

    branches: int = 4
    """Equally probable tokens at both draws."""
    heads: tuple[int, ...] = (1, 2, 4)
    size: str = "0.06M"
    training: TrainingSettings = field(default_factory=TrainingSettings)


class ChoicePointsStudy(Study[ChoicePointsSettings]):
    """The study."""

    name = "choice-points"
    claim = (
        "Predicting n tokens ties n(n+1)/2 terms of the loss to a transition with consequences and n to one without: "
        "choice points count (n+1)/2 times more than in next-token training."
    )
    section = "sections 5.1 and L.3, figure 9"
    cannot_show = "Whether the larger weight makes a model better: terms are counted, not their effect."
    published = "n(n+1)/2 terms against n"
    not_yet_run = ()
    scales: ClassVar[dict[Scale, Any]] = {
        "smoke": ChoicePointsSettings(heads=(1, 2), training=TrainingSettings(steps=10, rows=8, length=24)),
        "cpu": ChoicePointsSettings(
            seeds=3, training=TrainingSettings(steps=200, rows=16, length=72, lr=3e-3, warmup_steps=30)
        ),
        "gpu": ChoicePointsSettings(
            seeds=5, heads=(1, 2, 4, 8), size="10M",
            training=TrainingSettings(steps=1000, rows=64, length=48, lr=1e-3, warmup_steps=100),
        ),
        "paper": ChoicePointsSettings(seeds=5, heads=(1, 2, 3, 4)),
    }  # fmt: skip

    def cases(self, settings: ChoicePointsSettings) -> list[Case]:
        """Return the cases of all conditions and seeds."""
        exact = [Case({"by": "enumeration", "n": n}, 0) for n in settings.heads]
        trained = [Case({"by": "training", "n": n}, seed) for n in settings.heads for seed in settings.chosen_seeds]
        return exact + trained

    def run(self, settings: ChoicePointsSettings, case: Case, tell: Tell) -> dict[str, Any]:
        """Train and measure one case."""
        sequences, n = sequences_of(settings.branches), int(case.conditions["n"])
        if case.conditions["by"] == "enumeration":
            losses_Tn = np.array([[_entropy(sequences, t, k) for k in range(1, n + 1)] for t in range(LENGTH)])
            return _terms(losses_Tn, settings.branches) | {"sigmas": sigmas(sequences)}
        rng = np.random.default_rng(case.seed)
        documents = [sequences[i] for i in rng.integers(len(sequences), size=2000)]
        vocabulary = 1 + max(map(max, sequences))
        model = sized(settings.size, vocab_size=vocabulary, heads=n, context=settings.training.length)
        config = run_config(settings.training, model, case.seed, settings.device)
        trained = train_model(config, stream_of(in_memory(documents), config), tell)
        return _terms(_losses(trained.model, sequences, n), settings.branches) | {"losses": trained.losses}

    def findings(self, settings: ChoicePointsSettings, results: Sequence[Result]) -> Findings:
        """Judge the claim by the results."""
        rows, contrasts = [], []
        for n in settings.heads:
            counts = {"with consequences": n * (n + 1) / 2, "without": float(n)}
            for by, allowed in (("enumeration", 1e-9), ("training", ALLOWED)):
                cells = []
                for kind, count in counts.items():
                    found = values(results, lambda r, kind=kind: r.numbers[kind], by=by, n=n)  # type: ignore[misc]
                    cells.append(spread(found))
                    if by == "enumeration":
                        found *= SEEDS  # it has no randomness
                    contrasts.append(Contrast(f"{by}, n={n}", [allowed * count - abs(x - count) for x in found]))
                rows.append([str(n), by, *cells, f"{counts['with consequences']:g} / {n}"])
        top = max(settings.heads)
        with_, without = (
            statistics.median(values(results, lambda r, kind=kind: r.numbers[kind], by="training", n=top))  # type: ignore[misc]
            for kind in ("with consequences", "without")
        )
        sigma = values(results, lambda r: r.numbers["sigmas"]["choice"], by="enumeration", n=top)[0]
        sentence = (
            f"By enumeration the counts are exact for n = {', '.join(map(str, settings.heads))}; the losses of trained "
            f"models, over the entropy of one draw, come to {with_:.2f} and {without:.2f} terms at n={top}, where "
            f"{top * (top + 1) / 2:g} and {top} are counted."
        )
        notes = [
            f"Sequences of {LENGTH} tokens: token {INCONSEQUENTIAL + 1} is drawn without consequence, token "
            f"{CHOICE + 1} decides all that follow; {settings.branches} equally probable tokens each.",
            f"If the reward is 1 for one branch and 0 for the others, sigma (section 5.1) is {sigma:.3f} at the "
            "choice point and 0 everywhere else.",
        ]
        headers = ["n", "by", "terms, with consequences", "terms, without", "the paper"]
        ours = f"{with_:.2f} against {without:.2f} at n={top}"
        return Findings(headers, rows, judge(contrasts), sentence, ours, notes, contrasts=contrasts)

    def draw(self, figure: Any, settings: ChoicePointsSettings, results: Sequence[Result]) -> None:
        """Draw the results next to the paper's."""
        axes = figure.add_subplot()
        ns = np.array(settings.heads)
        fine = np.linspace(1, max(ns), 50)
        axes.plot(fine, fine * (fine + 1) / 2, color="C1", linestyle="--", label="the paper: n(n+1)/2")
        axes.plot(fine, fine, color="C0", linestyle="--", label="the paper: n")
        for kind, colour in (("with consequences", "C1"), ("without", "C0")):
            for n in settings.heads:
                found = values(results, lambda r, kind=kind: r.numbers[kind], by="training", n=n)  # type: ignore[misc]
                label = f"trained models, a draw {kind}" if n == settings.heads[0] else None
                axes.plot([n] * len(found), found, "o", color=colour, alpha=0.6, label=label)
        axes.set(xlabel="n", ylabel="terms of the loss tied to one draw", xticks=settings.heads)
        axes.legend()


def sequences_of(branches: int) -> list[list[int]]:
    """Return all sequences, which are equally probable.

    Every token that is not drawn follows from its place and the branch taken.
    """
    sequences = []
    for free in range(branches):
        for branch in range(branches):
            text = list(range(LENGTH))
            text[INCONSEQUENTIAL] = LENGTH + free
            text[CHOICE:] = [LENGTH + branches + branch * LENGTH + t for t in range(CHOICE, LENGTH)]
            sequences.append(text)
    return sequences


def _entropy(sequences: list[list[int]], t: int, k: int) -> float:
    """Return H(x_{t+k} | x_0..x_t) in nats, by counting; 0 after the end of a sequence."""
    if t + k >= LENGTH:
        return 0.0
    groups: dict[tuple[int, ...], dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for text in sequences:
        groups[tuple(text[: t + 1])][text[t + k]] += 1
    total = 0.0
    for group in groups.values():
        whole = sum(group.values())
        total -= sum(count * math.log(count / whole) for count in group.values())
    return total / len(sequences)


def sigmas(sequences: list[list[int]]) -> dict[str, float]:
    """Return sigma = sqrt(Var over the next token of the expected reward), at the choice point and at most elsewhere.

    The reward of a sequence is 1 if its branch is the first, else 0; the policy is the distribution of the sequences.
    """
    first = sequences[0][CHOICE]

    def value(prefix: list[int]) -> float:
        rewards = [float(text[CHOICE] == first) for text in sequences if text[: len(prefix)] == prefix]
        return sum(rewards) / len(rewards)

    found = []
    for t in range(1, LENGTH):
        values_after = [[value(other[: t + 1]) for other in sequences if other[:t] == text[:t]] for text in sequences]
        found.append(math.sqrt(max(map(statistics.pvariance, values_after))))
    return {"choice": found[CHOICE - 1], "elsewhere": max(x for t, x in enumerate(found, start=1) if t != CHOICE)}


def _terms(losses_Tn: np.ndarray, branches: int) -> dict[str, Any]:
    """Return the losses tied to each of the two draws, in entropies of one draw.

    `losses_Tn[t, k-1]` is the loss of head k at position t.
    """
    count = {"with consequences": 0.0, "without": 0.0}
    for t, row in enumerate(losses_Tn):
        for k, loss in enumerate(row, start=1):
            if t < CHOICE <= t + k:
                count["with consequences"] += loss / math.log(branches)
            elif t < INCONSEQUENTIAL == t + k:
                count["without"] += loss / math.log(branches)
    return dict(count)


@torch.no_grad()
def _losses(model: torch.nn.Module, sequences: list[list[int]], n: int) -> np.ndarray:
    """Return the mean loss (T, n) of every head at every position, of all sequences behind another, as in training."""
    device = next(model.parameters()).device
    tokens_BT = torch.tensor([[*sequences[-1], *text] for text in sequences], device=device)
    log_BTnV = model(tokens_BT, heads=n)[:, LENGTH:].double().log_softmax(-1).cpu()
    losses_Tn = np.zeros((LENGTH, n))
    for k in range(1, n + 1):
        targets_BT = tokens_BT[:, LENGTH + k :].cpu()
        of_targets = log_BTnV[:, : LENGTH - k, k - 1].gather(-1, targets_BT[..., None])[..., 0]
        losses_Tn[: LENGTH - k, k - 1] = -of_targets.mean(0).numpy()
    return losses_Tn


STUDY = ChoicePointsStudy()
