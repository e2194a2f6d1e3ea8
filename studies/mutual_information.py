"""Study how a two-token loss counts the mutual information of neighbouring tokens (paper sections 5.2 and L.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from studies.study import Case, Findings, Result, Scale, Study, StudySettings, Tell, spread, values
from studies.training import TrainingSettings, in_memory, run_config, sized, stream_of, train_model
from studies.verdicts import Contrast, judge

TOLERANCE = 1e-9
"""Largest error in nats: the identities are exact, the arithmetic is float64."""


@dataclass(frozen=True)
class MutualInformationSettings(StudySettings):
    """Settings of the study."""

    alphabets: tuple[int, ...] = (2, 8, 32)
    draws: int = 200
    """Pairs of random distributions for each alphabet and seed."""
    symbols: int = 8
    """Symbols of the Markov chain that a model learns."""
    size: str = "0.06M"
    documents: int = 400
    training: TrainingSettings = field(default_factory=TrainingSettings)


class MutualInformationStudy(Study[MutualInformationSettings]):
    """The study."""

    name = "mutual-information"
    claim = (
        "The loss on two tokens is H(X|Y) + 2 I(X;Y) + H(Y|X): compared with next-token prediction it doubles the "
        "weight of what the tokens say of one another, and so too for a model q of the data p."
    )
    section = "sections 5.2 and L.2"
    cannot_show = "Whether the weight of mutual information makes a model better: these are identities."
    published = "identities, exact"
    not_yet_run = ()
    scales: ClassVar[dict[Scale, Any]] = {
        "smoke": MutualInformationSettings(
            alphabets=(2, 8), draws=20, documents=40, training=TrainingSettings(steps=10, rows=8, length=32)
        ),
        "cpu": MutualInformationSettings(
            seeds=3, training=TrainingSettings(steps=200, rows=16, length=64, lr=3e-3, warmup_steps=30)
        ),
        "gpu": MutualInformationSettings(
            seeds=5, draws=2000, documents=4000, size="1M",
            training=TrainingSettings(steps=2000, rows=64, length=128, lr=1e-3, warmup_steps=100),
        ),
        "paper": MutualInformationSettings(seeds=5, draws=2000),
    }  # fmt: skip

    def cases(self, settings: MutualInformationSettings) -> list[Case]:
        """Return the cases of all conditions and seeds."""
        conditions: list[dict[str, str | int | float]] = [
            {"of": "random", "alphabet": size} for size in settings.alphabets
        ]
        conditions.append({"of": "a trained model", "alphabet": settings.symbols})
        return [Case(condition, seed) for condition in conditions for seed in settings.chosen_seeds]

    def run(self, settings: MutualInformationSettings, case: Case, tell: Tell) -> dict[str, Any]:
        """Train and measure one case."""
        rng = np.random.default_rng(case.seed)
        if case.conditions["of"] == "random":
            worst: dict[str, float] = {}
            negative = 0
            for _ in range(settings.draws):
                size = int(case.conditions["alphabet"])
                p, q = (rng.dirichlet(np.full(size * size, 0.5)).reshape(size, size) + 1e-12 for _ in range(2))
                p, q = p / p.sum(), q / q.sum()
                negative += relative_information(p, q) < 0
                worst = {name: max(worst.get(name, 0.0), e) for name, e in identity_errors(p, q).items()}
            return {"errors": worst, "negative": negative / settings.draws}
        return self._of_a_model(settings, case, rng, tell)

    def _of_a_model(
        self, settings: MutualInformationSettings, case: Case, rng: np.random.Generator, tell: Tell
    ) -> dict[str, Any]:
        """Train a model with two heads on a Markov chain, and enumerate its distributions after each symbol."""
        symbols = settings.symbols
        chain = rng.dirichlet(np.full(symbols, 0.5), size=symbols)
        length = settings.training.length
        documents = []
        for _ in range(settings.documents):
            text = [int(rng.integers(symbols))]
            while len(text) < length:
                text.append(int(rng.choice(symbols, p=chain[text[-1]])))
            documents.append(text)
        model = sized(settings.size, vocab_size=symbols, heads=2, context=length)
        config = run_config(settings.training, model, case.seed, settings.device)
        trained = train_model(config, stream_of(in_memory(documents), config), tell)
        worst: dict[str, float] = {}
        kept, whole, apart = [], [], []
        for symbol in range(symbols):
            p_XY = chain[symbol][:, None] * chain
            q_XY, head_2 = _distributions_after(trained.model, documents[0][: length // 2], symbol, symbols)
            worst = {name: max(worst.get(name, 0.0), e) for name, e in identity_errors(p_XY, q_XY).items()}
            whole.append(relative_information(p_XY, p_XY))
            kept.append(relative_information(p_XY, q_XY))
            apart.append(divergence(q_XY.sum(0), head_2))
        return {
            "errors": worst,
            "information": float(np.mean(whole)),
            "relative information": float(np.mean(kept)),
            "head 2 from the chained head 1": float(np.mean(apart)),
            "entropy": float(np.mean([cross_entropy(row, row) for row in chain])),
            "losses": trained.losses,
        }

    def findings(self, settings: MutualInformationSettings, results: Sequence[Result]) -> Findings:
        """Judge the claim by the results."""
        rows, contrasts = [], []
        conditions = [case.conditions for case in self.cases(settings) if case.seed == settings.first_seed]
        for condition in conditions:
            errors = values(results, lambda r: max(r.numbers["errors"].values()), **condition)
            rows.append([str(condition["of"]), str(condition["alphabet"]), spread(errors, ".1e")])
            contrasts.append(Contrast(f"{condition['of']}", [TOLERANCE - error for error in errors]))
        model = {"of": "a trained model"}
        own, kept, apart, largest = (
            values(results, lambda r, key=key: r.numbers.get(key, 0.0), **model)  # type: ignore[misc]
            for key in ("information", "relative information", "head 2 from the chained head 1", "entropy")
        )
        worst = max(max(result.numbers["errors"].values()) for result in results)
        notes = [
            f"Trained on a Markov chain: I(X;Y) of the data {spread(own)} nats, I(p||q) by the model {spread(kept)}, "
            f"entropy of a next symbol {spread(largest)}.",
            f"Head 2's own distribution is {spread(apart, '.4f')} nats from the one that head 1 gives by way of its "
            "first token; the identities speak of the latter.",
        ]
        sentence = (
            f"All identities hold to {worst:.0e} nats, on random distributions and on what a trained model says; the "
            "relative information is negative for some pairs of them, as the paper says it may be."
        )
        verdict = judge(contrasts)
        if verdict != "reproduced":
            sentence = f"The largest error is {worst:.0e} nats, where {TOLERANCE:.0e} was allowed or more seeds needed."
        headers = ["distributions", "alphabet", "largest error, nats"]
        return Findings(headers, rows, verdict, sentence, f"errors up to {worst:.0e} nats", notes, contrasts=contrasts)

    def draw(self, figure: Any, settings: MutualInformationSettings, results: Sequence[Result]) -> None:
        """Draw the results next to the paper's."""
        left, right = figure.subplots(1, 2)
        names = list(results[0].numbers["errors"])
        for i, name in enumerate(names):
            errors = [max(result.numbers["errors"][name], 1e-17) for result in results]
            left.semilogy([i] * len(errors), errors, "o", color="C0", alpha=0.5)
        left.axhline(TOLERANCE, color="0.5", linestyle="--", linewidth=0.9)
        left.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize=9)
        left.set(ylabel="error of the identity, nats", title="the paper: 0")
        models = [result for result in results if result.case.conditions["of"] == "a trained model"]
        for i, result in enumerate(models):
            numbers = result.numbers
            parts = [numbers["entropy"] - numbers["information"], 2 * numbers["information"]]
            label = ["H(X|Y)", "2 I(X;Y)"] if i == 0 else [None, None]
            bottom = 0.0
            for part, colour, name in zip(parts, ("C0", "C1"), label):
                right.bar(i, part, bottom=bottom, color=colour, label=name, width=0.6)
                bottom += part
        right.set_xticks(range(len(models)), [f"seed {result.case.seed}" for result in models])
        right.set(ylabel="nats", title="the first token's part of a two-token loss")
        right.legend()


def cross_entropy(p: np.ndarray, q: np.ndarray) -> float:
    """Return H(p, q) = -sum p log q in nats, of distributions of one shape; it is H(p) if q is p."""
    seen = p > 0
    return float(-(p[seen] * np.log(q[seen])).sum())


def conditional_cross_entropy(p_XY: np.ndarray, q_XY: np.ndarray) -> float:
    """Return H(p_{X|Y}, q_{X|Y}) = E_{y ~ p_Y} H(p(.|y), q(.|y)), by its definition; for Y given X, transpose both."""
    total = 0.0
    for p_X, q_X in zip(p_XY.T, q_XY.T):
        if p_X.sum() > 0:
            total += p_X.sum() * cross_entropy(p_X / p_X.sum(), q_X / q_X.sum())
    return total


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Return D(p || q)."""
    return cross_entropy(p, q) - cross_entropy(p, p)


def relative_information(p_XY: np.ndarray, q_XY: np.ndarray) -> float:
    """Return I_{p||q}(X;Y) = D(p || q_X (x) q_Y) - D(p || q), which is the mutual information if q is p."""
    return divergence(p_XY, np.outer(q_XY.sum(1), q_XY.sum(0))) - divergence(p_XY, q_XY)


def identity_errors(p_XY: np.ndarray, q_XY: np.ndarray) -> dict[str, float]:
    """Return the errors of the paper's identities: of entropies of p, of the lemma on cross-entropies, of their sums.

    The sums over both variables are a two-token loss.
    """
    errors = {}
    for name, q in (("entropy", p_XY), ("lemma", q_XY)):
        h_X = cross_entropy(p_XY.sum(1), q.sum(1))
        h_Y = cross_entropy(p_XY.sum(0), q.sum(0))
        shared = relative_information(p_XY, q)
        x_given_y, y_given_x = conditional_cross_entropy(p_XY, q), conditional_cross_entropy(p_XY.T, q.T)
        errors[name] = abs(h_X - (x_given_y + shared))
        errors[f"{name}, two tokens"] = abs(h_X + h_Y - (x_given_y + 2 * shared + y_given_x))
    return errors


@torch.no_grad()
def _distributions_after(
    model: torch.nn.Module, before: list[int], symbol: int, symbols: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (X, Y), the distribution of the two symbols after `symbol` by head 1, and (Y,), the second by head 2."""
    prefix = [*before, symbol]
    device = next(model.parameters()).device
    sequences = torch.tensor([[*prefix, x] for x in range(symbols)], device=device)
    logits_XTKV = model(sequences, heads=2).double().cpu()
    probabilities = logits_XTKV.softmax(-1).numpy()
    at = len(prefix) - 1
    q_XY = probabilities[0, at, 0][:, None] * probabilities[:, at + 1, 0]
    return q_XY, probabilities[0, at, 1]


STUDY = MutualInformationStudy()
