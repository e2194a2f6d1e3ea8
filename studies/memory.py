"""Study the memory of a training step by number of heads (paper section 2, "memory-efficient implementation")."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from bench import processes
from bench.loss import joint_step_fits
from bench.processes import ALLOCATOR, memory_meter
from bench.train import Steps, run_config
from headstart.model.config import ModelConfig
from headstart.objective.walk import walk_step
from headstart.settings_loader import load_settings
from headstart.training.config import RunConfig
from headstart.training.processes import joined, pick_device
from headstart.training.yaml_settings import to_plain
from studies.study import Case, Findings, Result, Scale, Study, StudySettings, Tell, crossed, values
from studies.verdicts import Contrast, in_words, judge
from tests.reference import joint_step

STEPS = {"walk": "one head at a time", "joint": "all heads at once"}


@dataclass(frozen=True)
class MemorySettings(StudySettings):
    """Settings of the study."""

    vocab_size: int = 32_000
    dim: int = 256
    layers: int = 10
    length: int = 1024
    heads: tuple[int, ...] = (1, 2, 4, 8)
    dtype: str = "float32"
    steps: tuple[str, ...] = tuple(STEPS)


class MemoryStudy(Study[MemorySettings]):
    """The study."""

    name = "memory"
    claim = (
        "With forward and backward of one head at a time, training n heads needs no more memory than one, where all at "
        "once need O(nV + d)."
    )
    section = "section 2, figure 2"
    cannot_show = "What a GPU's allocator does: the peak is that of a process on a CPU, unless the device is another."
    published = "O(V + d) against O(nV + d); no bytes given"
    scales: ClassVar[dict[Scale, Any]] = {
        "smoke": MemorySettings(vocab_size=4000, dim=32, layers=3, length=64, heads=(2,), steps=("walk",)),
        "cpu": MemorySettings(seeds=3, dim=128, layers=9, length=512, heads=(1, 4, 8)),
        "gpu": MemorySettings(seeds=2, dim=2048, layers=24, length=4096, dtype="bfloat16"),
        "paper": MemorySettings(seeds=1, dim=4096, layers=32, length=4096, dtype="bfloat16"),
    }

    def cases(self, settings: MemorySettings) -> list[Case]:
        """Return the cases of all conditions and seeds."""
        return crossed(settings.chosen_seeds, step=settings.steps, n=settings.heads)

    def run(self, settings: MemorySettings, case: Case, tell: Tell) -> dict[str, Any]:
        """Train and measure one case."""
        n, step = int(case.conditions["n"]), str(case.conditions["step"])
        device = pick_device(settings.device).type
        if step == "joint" and not joint_step_fits(device, n, settings.length, settings.vocab_size):
            return {"mib": None}
        model = ModelConfig(
            vocab_size=settings.vocab_size, dim=settings.dim, layers=settings.layers, heads=n, context=settings.length
        )
        config = to_plain(run_config(model, 1, dtype=settings.dtype, device=device, seed=case.seed))
        answer = processes.call(
            memory_case, {"config": config, "step": step, "steps": 1},
            threads=1, environment=ALLOCATOR,
        )  # fmt: skip
        return {"mib": answer["bytes"] / 2**20, "method": answer["method"]}

    def findings(self, settings: MemorySettings, results: Sequence[Result]) -> Findings:
        """Judge the claim by the results."""
        logits = 4 * settings.vocab_size * settings.length / 2**20
        mib = {(step, n): _known(results, step, n) for step in STEPS for n in settings.heads}
        rows = [[str(n), *(_cell(mib[step, n]) for step in STEPS), f"{logits * n:,.0f}"] for n in settings.heads]
        contrasts = []
        few, most = min(settings.heads), max(settings.heads)
        for n in settings.heads:
            if n != few and mib["walk", n]:
                over = [a / b - 1 for a, b in zip(mib["walk", n], mib["walk", few])]
                contrasts.append(Contrast(f"walk: n={n} within 5 % of n={few}, room", [0.05 - x for x in over]))
        if len(settings.heads) > 1 and mib["joint", most]:
            grown = [a - b for a, b in zip(mib["joint", most], mib["joint", few])]
            share = [g / (logits * (most - few)) - 0.8 for g in grown]
            contrasts.append(Contrast("all at once: grows by a head's logits or more for each head, room", share))
        walk, joint = (_cell(mib[step, most]) for step in STEPS)
        ours = f"n={most}: {walk} MiB, all at once {joint}; n={few}: {_cell(mib['walk', few])}"
        sentence = (
            f"A step with {most} heads took {walk} MiB one head at a time and {joint} MiB with all at once, where one "
            f"with {few} took {_cell(mib['walk', few])} and {_cell(mib['joint', few])}. {in_words(contrasts, '+.2f')}."
        )
        headers = ["n", *(f"{words}, MiB" for words in STEPS.values()), "the logits of all heads in fp32, MiB"]
        notes = [
            "Peak of a training run of two steps above the level before its model was built: weights, gradients, "
            "moments, activations, loss; each case in a process of its own (studies/memory.py).",
            "A dash: not run, or more than this machine has.",
            f"One row of {settings.length} tokens, V = {settings.vocab_size:,}, d = {settings.dim}, {settings.layers} "
            "layers for every n.",
        ]
        return Findings(headers, rows, judge(contrasts), sentence, ours, notes, contrasts=contrasts)

    def draw(self, figure: Any, settings: MemorySettings, results: Sequence[Result]) -> None:
        """Draw the results next to the paper's."""
        axes = figure.add_subplot()
        for i, (step, words) in enumerate(STEPS.items()):
            found = [(n, x) for n in settings.heads for x in _known(results, step, n)]
            axes.plot([n for n, _ in found], [x for _, x in found], "o-", color=f"C{i}", label=f"ours, {words}")
        start = _known(results, "joint", min(settings.heads))
        if start:
            logits = 4 * settings.vocab_size * settings.length / 2**20
            line = [start[0] + logits * (n - min(settings.heads)) for n in settings.heads]
            axes.plot(
                settings.heads, line, "--", color="0.5", label="the paper's O(nV + d): a head's logits for each head"
            )
        axes.set(xlabel="n", ylabel="MiB", ylim=(0, None), xticks=settings.heads)
        axes.legend()


def memory_case(case: dict[str, Any]) -> dict[str, Any]:
    """Return the peak memory of a training run of some steps, in bytes."""
    config = load_settings(RunConfig, case["config"], Path("benchmark"))
    walk = joint_step if case["step"] == "joint" else walk_step  # in the real training step, all else being the same
    with joined(config.device) as group:
        small = ModelConfig(dim=32, layers=5, heads=4, context=32)
        Steps(replace(config, model=small), group, walk).seconds(2)  # loads the code, which is not counted
        peak = memory_meter(config.device)
        peak.reset()
        Steps(config, group, walk).seconds(case["steps"] + 1)  # AdamW's moments exist from the first update on
        return {"bytes": peak.read(), "method": peak.method}


def _known(results: Sequence[Result], step: str, n: int) -> list[float]:
    return [x for x in values(results, lambda r: r.numbers["mib"], step=step, n=n) if x is not None]


def _cell(mib: Sequence[float]) -> str:
    return f"{statistics.median(mib):,.0f}" if mib else "-"


STUDY = MemoryStudy()
