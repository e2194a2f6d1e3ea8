"""Study heads on a frozen model, by kind of head and by loss, at equal training time (Medusa-1)."""

from __future__ import annotations

import importlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import headstart
from headstart.commands.adapt import AdaptSettings, run_config
from headstart.console import mute
from headstart.data.shards import TokenShards
from headstart.evaluation.free_running import FreeRunning, run_freely
from headstart.evaluation.heads import HeadScores, score_documents
from headstart.evaluation.inputs import cut_prompts
from headstart.formats.registry import load_model
from headstart.model.config import HeadKindName, ModelConfig
from headstart.objective.backends import HeadLoss
from headstart.training.config import BatchConfig, CheckpointConfig, DataConfig, RunConfig, ValidationConfig
from headstart.training.loop import train
from headstart.training.optimizer import OptimizerConfig
from headstart.training.trackers import WatchConfig
from studies.study import Case, Findings, Result, Scale, Study, StudySettings, Tell, spread, values
from studies.verdicts import contrast, in_words, judge

NEVER = 10**9


@dataclass(frozen=True)
class AdaptedHeadsSettings(StudySettings):
    """Settings of the study."""

    dim: int = 128
    """Width of the byte model that gets heads; it is trained here, with one head."""
    layers: int = 4
    context: int = 256
    base_steps: int = 1500
    rows: int = 8
    length: int = 128
    heads: int = 4
    kinds: tuple[HeadKindName, ...] = ("transformer", "linear", "medusa", "stern", "sequential", "replicated")
    losses: tuple[HeadLoss, ...] = ("cross-entropy", "kl", "total-variation")
    loss_kinds: tuple[HeadKindName, ...] = ("transformer", "medusa")
    """Kinds that are trained with every loss; the others are trained with the first."""
    seconds: float = 25.0
    """Seconds of processor time in which each condition makes as many steps as fit."""
    trial_steps: int = 12
    """Steps of the trial that measures the time of a step."""
    prompts: int = 16
    new_tokens: int = 128
    scored_tokens: int = 30_000
    """Tokens of held-out text to score."""
    package: str | None = None
    """Package of Python's library to read alone (None: the whole library)."""


class AdaptedHeadsStudy(Study[AdaptedHeadsSettings]):
    """The study."""

    name = "adapted-heads"
    claim = (
        "Heads put on a frozen model draft for it without changing its text; trained on the model's own next-token "
        "distribution (KL, total variation) more of their drafts are kept than trained on the text, at equal time."
    )
    section = "Medusa-1 (arXiv 2401.10774), and losses that aim at acceptance"
    compared_at = "processor time"
    cannot_show = "What the losses gain when drafts are sampled: only greedy and teacher-forced drafts are counted."
    published = "Medusa-1, Vicuna-7B, 4 residual heads and a tree: 2.18 times the speed; of losses at equal time none"
    scales: ClassVar[dict[Scale, Any]] = {
        "smoke": AdaptedHeadsSettings(
            dim=32, layers=2, context=64, base_steps=6, rows=2, length=32, heads=3, kinds=("linear", "medusa"),
            losses=("cross-entropy", "kl"), loss_kinds=("medusa",), seconds=0.05, trial_steps=2, prompts=2,
            new_tokens=8, scored_tokens=500, package="json",
        ),
        "cpu": AdaptedHeadsSettings(seeds=2),
        "gpu": AdaptedHeadsSettings(
            seeds=3, dim=1024, layers=16, context=2048, base_steps=20_000, rows=64, length=1024, seconds=900.0,
            trial_steps=40, prompts=64,
        ),
        "paper": AdaptedHeadsSettings(
            seeds=3, dim=4096, layers=32, context=2048, base_steps=200_000, rows=256, length=2048, seconds=18_000.0,
            trial_steps=40, prompts=80,
        ),
    }  # fmt: skip

    def cases(self, settings: AdaptedHeadsSettings) -> list[Case]:
        """Return the cases of all conditions and seeds."""
        pairs = [
            (kind, loss)
            for kind in settings.kinds
            for loss in (settings.losses if kind in settings.loss_kinds else settings.losses[:1])
        ]
        return [Case({"heads": kind, "loss": loss}, seed) for kind, loss in pairs for seed in settings.chosen_seeds]

    def run(self, settings: AdaptedHeadsSettings, case: Case, tell: Tell) -> dict[str, Any]:
        """Train and measure one case."""
        tell(step="the model below")
        base = _base(settings, case.seed)
        kind, loss = case.conditions["heads"], case.conditions["loss"]
        with tempfile.TemporaryDirectory(prefix="headstart-study-") as folder:
            trials = [_adapt(settings, case, base, Path(folder) / str(i), settings.trial_steps * i) for i in (1, 3)]
            # The longer trial includes the time to start; the difference alone may be noise.
            step = max((trials[1] - trials[0]) / 2, trials[1] / 9) / settings.trial_steps
            steps = max(settings.trial_steps, int(settings.seconds / step))
            tell(step=f"{steps} steps of {kind} heads, {loss}")
            spent = _adapt(settings, case, base, Path(folder) / "run", steps)
            model = Path(folder) / "run" / "model"
            scores = _scores(settings, model, base)
            free = _written(settings, model, base)
            unchanged = _outputs(settings, model, base) == _outputs(settings, base / "model", base)
        return {
            "steps": steps,
            "processor_seconds": spent,
            "acceptance": scores.prefix,
            "tokens_per_pass_of_text": scores.tokens_per_pass[-1],
            "free_acceptance": free.acceptance,
            "tokens_per_pass": free.tokens_per_pass,
            "unchanged": unchanged,
        }

    def findings(self, settings: AdaptedHeadsSettings, results: Sequence[Result]) -> Findings:
        """Judge the claim by the results."""
        rows = []
        for case in self.cases(settings):
            if case.seed != settings.first_seed:
                continue
            row = [str(case.conditions["heads"]), str(case.conditions["loss"])]
            row.append(spread(values(results, lambda r: r.numbers["steps"], **case.conditions), ".0f"))
            for k in range(settings.heads - 1):
                row.append(spread(values(results, lambda r, k=k: r.numbers["acceptance"][k], **case.conditions)))  # type: ignore[misc]
            for what in ("tokens_per_pass_of_text", "tokens_per_pass"):
                row.append(spread(values(results, lambda r, what=what: r.numbers[what], **case.conditions), ".2f"))  # type: ignore[misc]
            rows.append(row)
        contrasts = []
        for kind in settings.loss_kinds:
            text = values(results, _free, heads=kind, loss=settings.losses[0])
            for loss in settings.losses[1:]:
                own = values(results, _free, heads=kind, loss=loss)
                contrasts.append(contrast(f"{loss} over {settings.losses[0]}, {kind} heads", own, text, 0.01))
        best = max(rows, key=lambda row: float(row[-1].split()[0]))
        changed = sum(not result.numbers["unchanged"] for result in results)
        sentence = (
            f"Tokens per pass, writing greedily: {in_words(contrasts, '+.2f')}. The most of all: {best[0]} heads with "
            f"{best[1]}, {best[-1]}. The model's own text was {'' if changed else 'un'}changed"
            + (f" in all but {len(results) - changed} of {len(results)} cases." if changed else " in every case.")
        )
        headers = [
            "heads", "loss", "steps", *_right(settings.heads),
            "tokens per pass, held-out text", "greedy",
        ]  # fmt: skip
        notes = [
            f"Each condition trains for {settings.seconds:g} s of one processor's time (the trunk runs in every step; "
            "with hidden states kept on disk all would make more steps); so cheap heads make more steps.",
            "Shares are of all positions of held-out text, read with teacher forcing; greedy: in outputs of the model "
            "after held-out prompts.",
            "The model below is trained for this study, with one head, once for each seed.",
        ]
        kinds = ", ".join(f"{row[0]} {row[-1].split()[0]}" for row in rows if row[1] == settings.losses[0])
        ours = f"tokens per pass, greedy, n={settings.heads}: {kinds}; of losses {in_words(contrasts, '+.2f')}"
        return Findings(headers, rows, judge(contrasts), sentence, ours, notes, contrasts=contrasts)

    def draw(self, figure: Any, settings: AdaptedHeadsSettings, results: Sequence[Result]) -> None:
        """Draw the results next to the paper's."""
        conditions = [case.conditions for case in self.cases(settings) if not case.seed]
        left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1, 1.3)})
        for where in conditions:
            curves = values(results, lambda r: r.numbers["acceptance"], **where)
            style = {"cross-entropy": "-", "kl": "--", "total-variation": ":"}[str(where["loss"])]
            colour = f"C{settings.kinds.index(where['heads'])}"
            medians = [statistics.median(column) for column in zip(*curves)]
            left.plot(range(2, settings.heads + 1), medians, style, color=colour, marker="o", markersize=3)
        left.set(xlabel="head k", ylabel="heads 2 to k right, held-out text", xticks=range(2, settings.heads + 1))
        left.set_ylim(0, None)
        names = [f"{where['heads']}, {where['loss']}" for where in conditions]
        for place, where in enumerate(conditions):
            seen = values(results, _free, **where)
            colour = f"C{settings.kinds.index(where['heads'])}"
            right.barh(place, statistics.median(seen), color=colour, alpha=0.6)
            right.plot(seen, [place] * len(seen), "k.", markersize=4)
        right.set_yticks(range(len(names)), names, fontsize=8)
        right.invert_yaxis()
        right.grid(False, axis="y")
        right.set(xlabel="tokens per pass, writing greedily", xlim=(1, None))
        figure.suptitle(
            f"{settings.heads} heads on a frozen byte model, {settings.seconds:g} s of training each", fontsize=10
        )


def _right(heads: int) -> list[str]:
    return ["head 2 right", *(f"heads 2 to {k} right" for k in range(3, heads + 1))]


def _free(result: Result) -> float:
    return float(result.numbers["tokens_per_pass"])


@cache
def _base(settings: AdaptedHeadsSettings, seed: int) -> Path:
    """Return the run folder of the model below the heads, trained at the first case of its seed in this process."""
    folder = Path(tempfile.mkdtemp(prefix="headstart-study-base-"))
    _train_quietly(
        RunConfig(
            steps=settings.base_steps,
            run_dir=folder,
            seed=seed,
            device=settings.device,
            compile=False,
            model=ModelConfig(
                vocab_size=256, dim=settings.dim, layers=settings.layers, attention_heads=max(1, settings.dim // 64),
                context=settings.context,
            ),
            data=DataConfig(
                sources=(_source(settings.package),), validation_fraction=0.3 if settings.package else 0.02
            ),
            batch=BatchConfig(rows=settings.rows, length=settings.length),
            optimizer=OptimizerConfig(lr=3e-3, warmup_steps=min(100, settings.base_steps // 4), final_lr_ratio=0.05),
            validation=ValidationConfig(every=max(1, settings.base_steps // 3)),
            checkpoints=CheckpointConfig(every=NEVER),
            watch=WatchConfig(sample_tokens=0),
        )
    )  # fmt: skip
    return folder


def _adapt_settings(settings: AdaptedHeadsSettings, case: Case, base: Path, folder: Path, steps: int) -> AdaptSettings:
    return AdaptSettings(
        model=base / "model",
        data=(str(base / "data"),),
        run_dir=folder,
        heads=settings.heads,
        head_kind=case.conditions["heads"],  # type: ignore[arg-type]
        loss=case.conditions["loss"],  # type: ignore[arg-type]
        steps=steps,
        rows=settings.rows,
        length=settings.length,
        validation_every=NEVER,
        checkpoints_every=NEVER,
        seed=case.seed,
        device=settings.device,
        compile=False,
    )


def _adapt(settings: AdaptedHeadsSettings, case: Case, base: Path, folder: Path, steps: int) -> float:
    """Train heads and return the seconds of processor time."""
    began = time.process_time()
    _train_quietly(run_config(_adapt_settings(settings, case, base, folder, steps)))
    return time.process_time() - began


def _source(package: str | None) -> str:
    if package is None:
        return "python-stdlib"
    return str(Path(str(importlib.import_module(package).__file__)).parent)


def _held_out(base: Path) -> list[list[int]]:
    shards = TokenShards.open(base / "data", "validation")
    return [shards.document(i).tolist() for i in range(len(shards.documents))]


def _scores(settings: AdaptedHeadsSettings, model: Path, base: Path) -> HeadScores:
    """Return the scores of the begins of held-out documents, each with the same number of tokens."""
    documents = _held_out(base)
    share = max(2, settings.scored_tokens // len(documents))
    read = [document[:share] for document in documents if len(document) > 1]
    return score_documents(load_model(model).float(), read, sum(map(len, read)), length=settings.length)


def _train_quietly(config: RunConfig) -> None:
    """Train without output: the study shows its own progress."""
    mute()
    try:
        train(config)
    finally:
        mute(False)


def _prompts(settings: AdaptedHeadsSettings, base: Path) -> list[tuple[int, ...]]:
    room = settings.context - settings.new_tokens
    return cut_prompts(_held_out(base), settings.prompts, min(64, room), settings.new_tokens)


def _written(settings: AdaptedHeadsSettings, model: Path, base: Path) -> FreeRunning:
    engine = headstart.load(model, dtype="float32").engine(min(8, settings.prompts), settings.context)
    engine.policy, engine.tokenizer = None, None  # the engine feeds every draft, and an end token ends no output
    return run_freely(engine, _prompts(settings, base), settings.new_tokens, 0.0)


def _outputs(settings: AdaptedHeadsSettings, model: Path, base: Path) -> list[list[int]]:
    """Return the greedy outputs of head 1."""
    loaded = headstart.load(model, dtype="float32")
    outputs = loaded.generate(_prompts(settings, base)[:4], max_new_tokens=settings.new_tokens, heads=1)
    assert isinstance(outputs, list)
    return [output.tokens for output in outputs]


STUDY = AdaptedHeadsStudy()
