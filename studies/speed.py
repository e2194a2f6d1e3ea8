"""Study the speed of decoding with heads, and of training them (paper Tables S2, S3, S5)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from bench import processes
from bench.decode import KINDS, SIZES, Size, heads_case, random_prompts
from bench.train import flop_ratio, measure, run_config
from headstart.evaluation.inputs import load_prompts
from headstart.formats.bundled import boxed_model
from headstart.model.config import ModelConfig
from headstart.training.processes import pick_device
from studies.study import Case, Findings, Result, Scale, Study, StudySettings, Tell, spread, values
from studies.verdicts import Contrast, contrast, in_words, judge

PAPER: dict[str, dict[int, tuple[float, float]]] = {"S2": KINDS["tokens"].paper, "S3": KINDS["bytes"].paper}
"""Table -> heads used -> (speed-up, tokens per pass): code, n = 4; bytes, n = 8."""
PAPER_TRAINING = {"0.3B": (1.07, 1.22), "1.3B": (1.04, 1.12), "3B": (1.02, 1.07), "13B": (1.04, 1.09)}
"""Table S5: time of a training step with n = 2 and n = 4 over n = 1."""
MOST_ABOVE = 0.15
"""Share by which the time of a step may exceed that of its products."""
LEAST_SHARE = 0.7
"""Least speed-up over the tokens per pass; the paper's is 0.87 (S2) and 0.91 (S3)."""


@dataclass(frozen=True)
class SpeedSettings(StudySettings):
    """Settings of the study."""

    decoded: Size = "12M"
    """S2: size of the model, which has random weights and drafts that are right at the paper's rate."""
    prompts: int = 4
    """S3: prompts of the model in the box."""
    prompt_tokens: int = 128
    new_tokens: int = 128
    dtype: str = "float32"
    repetitions: int = 3
    """Rounds within a case; every case and seed is a process of its own."""
    dim: int = 256
    """S5: width of the model to train."""
    layers: int = 10
    length: int = 256
    vocab_size: int = 32_000
    heads: tuple[int, ...] = (1, 2, 4)
    threads: int = 1
    tables: tuple[str, ...] = ("S3", "S2", "S5")


class SpeedStudy(Study[SpeedSettings]):
    """The study."""

    name = "speed"
    claim = (
        "Decoding gets faster with every head used, close to the tokens that a pass commits; a training step gets "
        "slower only by the products of the further unembeddings."
    )
    section = "section 3.2 and appendix C, Tables S2, S3, S5"
    cannot_show = "The speed of large models on GPUs, where a pass waits for memory: processors compute."
    published = "decoding 3.05 times at 3.50 tokens per pass (code), 6.39 at 7.04 (bytes); training 1.07 to 1.22 at n=4"
    scales: ClassVar[dict[Scale, Any]] = {
        "smoke": SpeedSettings(
            prompts=1, prompt_tokens=8, new_tokens=8, repetitions=1, dim=32, layers=5, length=32, vocab_size=500,
            heads=(1, 4), tables=("S5",),
        ),
        "cpu": SpeedSettings(seeds=3, new_tokens=96, repetitions=2, length=128),
        "gpu": SpeedSettings(
            seeds=3, decoded="235M", prompts=40, prompt_tokens=512, new_tokens=512, dtype="bfloat16", dim=1024,
            layers=18, length=4096,
        ),
        "paper": SpeedSettings(
            seeds=3, decoded="235M", prompts=4200, prompt_tokens=512, new_tokens=512, dtype="bfloat16", dim=4096,
            layers=32, length=4096,
        ),
    }  # fmt: skip

    def cases(self, settings: SpeedSettings) -> list[Case]:
        """Return the cases of all conditions and seeds."""
        return [Case({"table": table}, seed) for table in settings.tables for seed in settings.chosen_seeds]

    def run(self, settings: SpeedSettings, case: Case, tell: Tell) -> dict[str, Any]:
        """Train and measure one case."""
        device = pick_device(settings.device).type
        if case.conditions["table"] == "S5":
            return self._training(settings, device)
        ks = sorted(PAPER[str(case.conditions["table"])])
        prompts: Sequence[Sequence[int]]
        case_of_heads: dict[str, Any] = {
            "dtype": settings.dtype, "device": device, "repetitions": settings.repetitions, "heads": ks, "batch": 1,
            "temperature": 0.0, "quantize": None, "new_tokens": settings.new_tokens, "tune_seconds": 0.05,
        }  # fmt: skip
        if case.conditions["table"] == "S3":
            model = boxed_model()
            prompts = load_prompts(
                model, prompts=None, data=None, count=settings.prompts, tokens=settings.prompt_tokens,
                room=settings.new_tokens,
            )  # fmt: skip
            case_of_heads |= {"model": str(model), "prompts": prompts, "tokens_per_pass": None}
        else:
            config = KINDS["tokens"].put_on(SIZES[settings.decoded])
            prompts = random_prompts(config.vocab_size, 1, settings.prompt_tokens)
            tokens_per_pass = KINDS["tokens"].tokens_per_pass
            case_of_heads |= {
                "model": None, "config": asdict(config), "prompts": prompts, "tokens_per_pass": tokens_per_pass,
            }  # fmt: skip
        found = processes.call(heads_case, case_of_heads, threads=settings.threads)
        plain = statistics.median(found["tokens_per_second"]["plain"])
        return {
            "speedup": {k: statistics.median(found["tokens_per_second"][str(k)]) / plain for k in ks},
            "tokens_per_pass": {k: found["details"][str(k)]["tokens_per_pass"] for k in ks},
            "plain, tokens per second": plain,
        }

    def _training(self, settings: SpeedSettings, device: str) -> dict[str, Any]:
        model = ModelConfig(
            vocab_size=settings.vocab_size, dim=settings.dim, layers=settings.layers, context=settings.length
        )
        models = {n: replace(model, heads=n) for n in settings.heads}
        configs = {str(n): run_config(each, 2, dtype=settings.dtype, device=device) for n, each in models.items()}
        speeds = measure(configs, settings.repetitions, 2, settings.threads, warmup=1)["speeds"]
        medians = {n: statistics.median(speeds[str(n)]) for n in models}
        return {
            "step time": {n: medians[1] / medians[n] for n in models},
            "by products": {n: flop_ratio(each) for n, each in models.items()},
        }

    def findings(self, settings: SpeedSettings, results: Sequence[Result]) -> Findings:
        """Judge the claim by the results."""
        rows, contrasts, ours = [], [], []
        for table in settings.tables:
            numbers = values(results, lambda r: r.numbers, table=table)
            if table == "S5":
                more, each, words = self._of_training(settings, numbers)
            else:
                more, each, words = self._of_decoding(table, numbers)
            rows += more
            contrasts += each
            ours.append(f"{table}: {words}")
        notes = [
            "S2: random weights, drafts made right at the paper's rate, so tokens per pass are given and the speed-up "
            "is measured. S3: the model in the box on prompts of its own. Speed-ups are over the fastest plain "
            "decoding.",
            f"S5: V = {settings.vocab_size:,}, d = {settings.dim}: the unembedding is a larger part of the whole than "
            "in the paper's models, so n = 4 costs more; only the time over that of the products can be compared.",
            f"{settings.dtype}, {settings.threads} CPU thread, where it runs on a CPU.",
        ]  # fmt: skip
        headers = ["table", "", "speed-up, or step time over n=1", "tokens per pass", "the paper"]
        return Findings(
            headers,
            rows,
            judge(contrasts),
            f"{in_words(contrasts, '+.2f')}.",
            "; ".join(ours),
            notes,
            contrasts=contrasts,
        )

    def _of_decoding(self, table: str, numbers: list[dict[str, Any]]) -> tuple[list[list[str]], list[Contrast], str]:
        rows = []
        for k, (paper_up, paper_pass) in PAPER[table].items():
            up, per_pass = ([x[key][str(k)] for x in numbers] for key in ("speedup", "tokens_per_pass"))
            rows.append(
                [table, f"k={k}", spread(up, ".2f"), spread(per_pass, ".2f"), f"{paper_up:.2f} / {paper_pass:.2f}"]
            )
        # The last k is the number of all heads.
        contrasts = [
            contrast(f"{table}: all heads over plain decoding", up, [1.0] * len(up), 0.05),
            contrast(
                f"{table}: speed-up over {LEAST_SHARE} of the tokens per pass", up, [LEAST_SHARE * x for x in per_pass]
            ),
        ]
        words = f"{statistics.median(up):.2f} times at {statistics.median(per_pass):.2f} tokens per pass"
        return rows, contrasts, words

    def _of_training(
        self, settings: SpeedSettings, numbers: list[dict[str, Any]]
    ) -> tuple[list[list[str]], list[Contrast], str]:
        rows, contrasts = [], []
        for n in settings.heads:
            time, product = [x["step time"][str(n)] for x in numbers], numbers[0]["by products"][str(n)]
            paper = {2: "1.02 to 1.07", 4: "1.07 to 1.22"}.get(n, "1.00")
            rows.append(["S5", f"n={n}", spread(time, ".2f"), f"by products {product:.2f}", paper])
            if n != 1:
                near = [MOST_ABOVE - (x / product - 1) for x in time]
                contrasts.append(
                    Contrast(f"S5: n={n} no slower than its products say, and {MOST_ABOVE:.0%}, with room", near)
                )
        return rows, contrasts, f"{statistics.median(time):.2f} at n={n}, by products {product:.2f}"

    def draw(self, figure: Any, settings: SpeedSettings, results: Sequence[Result]) -> None:
        """Draw the results next to the paper's."""
        grid = figure.subplots(1, len(settings.tables), squeeze=False)[0]
        for axes, table in zip(grid, settings.tables):
            numbers = values(results, lambda r: r.numbers, table=table)
            if table == "S5":
                _draw_training(axes, settings, numbers)
                continue
            ks = list(PAPER[table])
            for i, (key, name) in enumerate((("speedup", "speed-up"), ("tokens_per_pass", "tokens per pass"))):
                found = [statistics.median([x[key][str(k)] for x in numbers]) for k in ks]
                line = "o--" if i else "o-"
                axes.plot(ks, found, line, color="C0", label=f"ours: {name}")
                axes.plot(ks, [PAPER[table][k][i] for k in ks], line, color="0.5", label=f"the paper: {name}")
            axes.set(xlabel="heads used", title=f"Table {table}", xticks=ks)
        grid[0].legend()


def _draw_training(axes: Any, settings: SpeedSettings, numbers: list[dict[str, Any]]) -> None:
    ns = list(settings.heads)
    axes.plot(ns, [statistics.median([x["step time"][str(n)] for x in numbers]) for n in ns], "o-", label="ours")
    axes.plot(ns, [numbers[0]["by products"][str(n)] for n in ns], "o--", label="ours, by products alone")
    for size, (two, four) in PAPER_TRAINING.items():
        label = "the paper, 0.3B to 13B" if size == "0.3B" else None
        axes.plot([1, 2, 4], [1, two, four], "s-", color="0.5", linewidth=0.8, markersize=4, label=label)
    axes.set(xlabel="n", ylabel="time of a training step", title="Table S5", xticks=ns)
    axes.legend()


STUDY = SpeedStudy()
