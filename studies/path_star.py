"""Study path-star graphs, on which next-token prediction fails, and objectives that do not (arXiv 2403.06963)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch

from headstart.data.batches import IGNORE, Batch, targets_of
from headstart.model.config import HeadKindName, ModelConfig
from headstart.model.heads import HEAD_KINDS
from headstart.model.transformer import Transformer
from headstart.training.auxiliary.masked_inputs import MaskConfig
from headstart.training.auxiliary.registers import RegisterConfig
from headstart.training.auxiliary.token_order import TokenOrderConfig
from headstart.training.config import RunConfig
from studies.star_graphs import StarGraphs
from studies.study import Case, Findings, Result, Scale, Study, StudySettings, Tell, crossed, spread, values
from studies.training import StopTraining, TrainingSettings, run_config, train_model, written_right
from studies.verdicts import Contrast, Control, contrast, in_words, judge

TEST_SEED = 1_000_000
NEXT = "next token"
SOLVED = 0.99
"""Training ends when this share of the graphs is right in two consecutive tests during training."""
SHOWN = ("teacherless", "reversed", "token order", "registers")
"""Methods without further heads."""
SOLVABLE = 0.95
"""Exact match that reversed paths must reach."""


@dataclass(frozen=True)
class PathStarSettings(StudySettings):
    """Settings of the study."""

    degree: int = 2
    """Arms d of a graph; a guess is right with probability 1/d."""
    length: int = 3
    """Nodes of an arm with the start: the length of the path to write."""
    labels: int = 8
    """Number of node labels."""
    dim: int = 64
    layers: int = 3
    """Blocks between a token and its prediction."""
    head_kind: HeadKindName = "transformer"
    """Kind of several heads. Transformer heads have a block each and can know the arm while the trunk does not; linear
    heads know nothing that is not in the trunk, where head 1 finds it."""
    tied: bool = False
    """True: the unembedding is the embedding matrix, which makes copying easy to learn."""
    methods: tuple[str, ...] = (NEXT, "3 heads", *SHOWN)
    next_token_factor: int = 3
    """Steps of next-token training as a multiple of the others': it must fail with more of them too."""
    tests: int = 1000
    """Graphs of the test; those of training are drawn anew at each step."""
    watched: int = 50
    """Steps between tests during training."""
    training: TrainingSettings = field(default_factory=TrainingSettings)


class PathStarStudy(Study[PathStarSettings]):
    """The study."""

    name = "path-star"
    claim = (
        "Trained on the next token alone, a model that must write the path of a path-star graph guesses the arm, for "
        "what follows can be read off the tokens before; objectives that look further ahead find the arm."
    )
    section = "arXiv 2403.06963, section 5; arXiv 2508.19228, table of star graphs; arXiv 2505.10518"
    cannot_show = "Whether language has such traps: every path here is decided by one token."
    published = "G(3,3), exact match: next token 33.8 %, 2 and 4 heads 100 %, token order 100 % (arXiv 2508.19228)"
    scales: ClassVar[dict[Scale, Any]] = {
        "smoke": PathStarSettings(
            dim=32, tests=20, watched=4, methods=(NEXT, "2 heads", *SHOWN),
            training=TrainingSettings(steps=4, rows=8, warmup_steps=2),
        ),
        "cpu": PathStarSettings(
            seeds=3, degree=3, length=4, labels=12, methods=(NEXT, "2 heads", "4 heads", *SHOWN),
            training=TrainingSettings(steps=1500, rows=256, lr=3e-3, warmup_steps=100, final_lr_ratio=0.1),
        ),
        "gpu": PathStarSettings(
            seeds=3, degree=5, length=5, labels=30, dim=384, layers=8,
            methods=(NEXT, "2 heads", "4 heads", "5 heads", *SHOWN), tests=10_000, watched=1000,
            training=TrainingSettings(steps=30_000, rows=1024, lr=5e-4, warmup_steps=500, dtype="bfloat16"),
        ),
        "paper": PathStarSettings(
            seeds=3, degree=5, length=5, labels=30, dim=384, layers=8,
            methods=(NEXT, "2 heads", "4 heads", "5 heads", *SHOWN), tests=20_000, watched=1000,
            training=TrainingSettings(steps=80_000, rows=1024, lr=3e-4, warmup_steps=1000, dtype="bfloat16"),
        ),
    }  # fmt: skip

    def cases(self, settings: PathStarSettings) -> list[Case]:
        """Return the cases of all conditions and seeds."""
        return sorted(crossed(settings.chosen_seeds, method=settings.methods), key=lambda case: case.seed)

    def run(self, settings: PathStarSettings, case: Case, tell: Tell) -> dict[str, Any]:
        """Train and measure one case."""
        graphs = StarGraphs(settings.degree, settings.length, settings.labels)
        method = str(case.conditions["method"])
        config = config_of(settings, graphs, method, case.seed)
        tests = graphs.draw(settings.tests, np.random.default_rng(TEST_SEED))

        def watch(step: int, model: Transformer, on_the_way: list[tuple[int, float]]) -> None:
            if step % settings.watched == 0:
                right = right_of(model.eval(), graphs, tests[:250], method)
                model.train()
                on_the_way.append((step, float(right.all(1).mean())))
                if min(exact for _, exact in [(0, 0.0), *on_the_way][-2:]) >= SOLVED:
                    raise StopTraining

        trained = train_model(config, batches_of(graphs, config, method), tell, watch=watch)
        right, on_the_way = right_of(trained.model, graphs, tests, method), trained.seen
        return {
            "exact": float(right.all(1).mean()),
            "places": right.mean(0).tolist(),
            "steps": on_the_way[-1][0] if on_the_way else config.steps,
            "on_the_way": on_the_way,
            "clipped": trained.clipped,
        }

    def findings(self, settings: PathStarSettings, results: Sequence[Result]) -> Findings:
        """Judge the claim by the results."""
        rows = []
        for method in settings.methods:
            row = [method, spread(values(results, exact_of, method=method))]
            row += [spread(values(results, place_of(at), method=method)) for at in range(settings.length)]
            steps = spread(values(results, lambda r: float(r.numbers["steps"]), method=method), ".0f")
            rows.append([*row, steps, spread(values(results, lambda r: r.seconds, method=method), ".0f")])
        contrasts, controls = self._contrasts(settings, results), self._controls(settings, results)
        chance = 1 / settings.degree
        plain = values(results, exact_of, method=NEXT)
        sentence = (
            f"Exact match in G({settings.degree},{settings.length}) with {settings.labels} labels, next token "
            f"{spread(plain)} where guessing the arm gives {chance:.3f}; over it: {in_words(contrasts)}."
        )
        if not controls[0].passed:
            sentence += " Next-token prediction did not learn to write a path at all: too short a training."
        solved = [m for m in settings.methods if min(values(results, exact_of, method=m)) >= 0.95]
        ours = f"next token {spread(plain)}; solved with every seed: {', '.join(solved) or 'by none'}"
        places = [f"token {at + 1}" for at in range(settings.length)]
        headers = ["method", "exact match", *places, "steps", "seconds"]
        notes = [
            "Exact match of greedy decoding that runs freely; of teacherless training, of all tokens at once. By "
            "place: head 1 after the true tokens, in which all but token 2 can be copied or read off an edge "
            "(reversed: all).",
            f"Next-token training may take {settings.next_token_factor} times the steps.",
            "Losses are of positions from '=' on, for every head. Graphs of training are drawn anew, so none is seen "
            f"twice; at most {settings.training.steps} steps, fewer where {SOLVED:.0%} of 250 graphs are right at two "
            f"tests in a row. Models of equal depth from token to prediction; heads 2..n are {settings.head_kind}.",
        ]
        return Findings(headers, rows, judge(contrasts, controls=controls), sentence, ours, notes, controls, contrasts)

    def _controls(self, settings: PathStarSettings, results: Sequence[Result]) -> list[Control]:
        """Return the controls: the next token writes some path, and reversed paths, without a trap, are solved."""
        found = [
            Control(
                "next token, exact match over half of guessing",
                statistics.median(values(results, exact_of, method=NEXT)),
                0.5 / settings.degree,
            )
        ]
        if "reversed" in settings.methods:
            backwards = min(values(results, exact_of, method="reversed"))
            found.append(Control("reversed paths, exact match of the worst seed", backwards, SOLVABLE))
        return found

    def _contrasts(self, settings: PathStarSettings, results: Sequence[Result]) -> list[Contrast]:
        """Return the contrasts: every method finds the arm more often than the next token, which guesses it."""
        plain = values(results, exact_of, method=NEXT)
        margin = 2 / settings.tests**0.5  # two standard errors of a difference, and more
        guess = [1 / settings.degree + 0.05] * len(plain)
        others = [method for method in settings.methods if method not in (NEXT, "reversed")]
        found = [contrast(m, values(results, exact_of, method=m), plain, margin) for m in others]
        return [contrast("guessing the arm over next token", guess, plain, essential=True), *found]

    def draw(self, figure: Any, settings: PathStarSettings, results: Sequence[Result]) -> None:
        """Draw the results next to the paper's."""
        left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [3, 2]})
        for i, method in enumerate(settings.methods):
            curves = values(results, lambda r: r.numbers["on_the_way"], method=method)
            for j, curve in enumerate(curves):
                steps, exact = zip(*curve) if curve else ((), ())
                left.plot(steps, exact, color=f"C{i}", linewidth=1.2, label=method if j == 0 else None)
            for exact in values(results, exact_of, method=method):
                right.plot(exact, i, "o", color=f"C{i}", alpha=0.7)
        for axes, line in ((left, left.axhline), (right, right.axvline)):
            line(1 / settings.degree, color="0.5", linestyle="--", linewidth=0.9)
            axes.set_title(f"G({settings.degree},{settings.length}), {settings.labels} labels", fontsize=10)
        left.set(xlabel="steps", ylabel="exact match, free running (250 graphs)", ylim=(-0.02, 1.05))
        left.legend(fontsize=8)
        right.set(xlabel="exact match at the end, a point a seed", xlim=(-0.02, 1.05))
        right.set_yticks(range(len(settings.methods)), settings.methods)
        right.invert_yaxis()
        figure.suptitle(
            "Published, G(3,3): next token 34 %, 2 and 4 heads and token order 100 %. Dashed: guessing the arm",
            fontsize=10,
        )


def exact_of(result: Result) -> float:
    """Return the exact match of a result."""
    return float(result.numbers["exact"])


def place_of(at: int) -> Callable[[Result], float]:
    """Return the function that gives the share of right tokens at a place of the path."""
    return lambda result: float(result.numbers["places"][at])


def config_of(settings: PathStarSettings, graphs: StarGraphs, method: str, seed: int) -> RunConfig:
    """Return the run that trains by `method`: the same model except for its heads."""
    heads = int(method.split()[0]) if method.endswith(" heads") else 1
    length = graphs.prompt + graphs.length - 1
    model = ModelConfig(
        vocab_size=graphs.vocab_size,
        dim=settings.dim,
        layers=settings.layers,
        extra_layers=heads - 1 if HEAD_KINDS[settings.head_kind].takes_layers else 0,
        attention_heads=max(1, settings.dim // 16),
        context=length + graphs.length,
        heads=heads,
        head_kind=settings.head_kind,
        tied=settings.tied,
    )
    steps = settings.training.steps * (settings.next_token_factor if method == NEXT else 1)
    config = run_config(replace(settings.training, length=length, steps=steps), model, seed, settings.device)
    if method == "teacherless":
        return replace(config, masked_inputs=MaskConfig("teacherless", token=graphs.spare))
    if method == "token order":
        return replace(config, token_order=TokenOrderConfig(weight=1.0))
    if method == "registers":
        last = graphs.length - 1
        share = graphs.length / length
        registers = RegisterConfig(weight=1.0, offsets=(min(2, last), last), share=share, token=graphs.spare)
        return replace(config, registers=registers)
    return config


def batches_of(graphs: StarGraphs, config: RunConfig, method: str) -> Iterator[Batch]:
    """Yield batches of new graphs for every step of the run."""
    rng = np.random.default_rng(config.seed)
    T, heads, rows = config.length, config.model.heads, config.batch.rows
    for step in range(config.steps * config.batch.accumulate):
        sequences = sequences_of(graphs, graphs.draw(rows, rng), method)
        tokens = torch.from_numpy(np.pad(sequences, ((0, 0), (0, heads - 1))))
        documents = (torch.arange(T + heads) > T).long().expand(rows, -1)
        targets = targets_of(tokens, documents, heads)
        targets[:, : graphs.prompt - 1] = IGNORE  # the graph itself is random
        places = torch.stack(
            [torch.zeros(rows, dtype=torch.int64), torch.arange(rows) + step % config.batch.accumulate * rows], 1
        )
        yield Batch(tokens[:, :T], targets, documents[:, :T], places=places)


def sequences_of(graphs: StarGraphs, sequences: np.ndarray, method: str) -> np.ndarray:
    """Return the sequences that a method learns: from the goal back, if reversed."""
    if method != "reversed":
        return sequences
    return np.concatenate([sequences[:, : graphs.prompt], sequences[:, : graphs.prompt - 1 : -1]], 1)


@torch.no_grad()
def right_of(model: Transformer, graphs: StarGraphs, sequences: np.ndarray, method: str) -> np.ndarray:
    """Return which tokens of each path are right after the true ones (teacherless: masks), (tests, length) bool."""
    sequences, first = sequences_of(graphs, sequences, method), graphs.prompt
    if method != "teacherless":
        return np.array(written_right(model, sequences[:, :first].tolist(), sequences[:, first:].tolist()))
    given = sequences[:, :-1].copy()
    given[:, first:] = graphs.spare
    chosen = model(torch.from_numpy(given).to(model.trunk.embedding.weight.device)).argmax(-1).cpu().numpy()
    right: np.ndarray = chosen[:, first - 1 :] == sequences[:, first:]
    return right


STUDY = PathStarStudy()
