"""Measure a trained model: tokens per second and per pass by number of heads, as in the paper's Table S3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench import fresh_process, report
from bench.decode_settings import DecodeSettings
from bench.report import NONE, Bar, Findings, count
from headstart.console import say
from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.kernels.pack import pack
from headstart.decoding.policy.calibration import read_tuning
from headstart.decoding.policy.timing import DTYPES, Decoded, decode, first_difference, interleave, ratios
from headstart.decoding.settings import Request, Sampling
from headstart.errors import UsageError
from headstart.evaluation.free_running import repeated
from headstart.fileio import replacing_file
from headstart.formats.registry import load_config, load_model
from headstart.model.config import ModelConfig
from headstart.reports.html import COLOURS, SERIES, need_matplotlib

EFFICIENCY_BAR = Bar(">=", 0.88)
PAPER = {1: (1.00, 1.00), 2: (1.94, 1.98), 4: (3.67, 3.84), 8: (6.39, 7.04)}
"""Table S3, byte-level code model with n = 8: k -> (relative speed-up, bytes per forward)."""
POLICY = "policy"
"""Variant that chooses the rows of each pass, if `headstart tune` has measured this model on this machine."""
PLAIN = "plain"
"""Variant K = 1, exact=False: the fastest ordinary decoding, over which speed-ups are measured."""
FIGURE = "decode-model.png"
HEADERS = (
    "", "tokens/s", "speed-up over plain", "over K = 1, exact", "tokens per pass", "efficiency", "paper, n = 8",
    "acceptance of heads 2..K", "rows fed",
)  # fmt: skip


def model(settings: DecodeSettings) -> Findings:
    """Measure every number of heads and the policy, greedily and sampled, and draw the figure."""
    assert settings.model is not None
    config, prompts = load_config(settings.model), settings.load_prompts()
    found, drawn = Findings("model"), {}
    ks = sorted(k for k in settings.heads if k <= config.heads)
    for temperature in settings.temperatures:
        case = settings.case(
            config,
            model=str(settings.model),
            prompts=prompts,
            new_tokens=settings.new_tokens,
            heads=ks,
            temperature=temperature,
            batch=settings.batch,
            quantize=settings.quantize,
        )
        answer = fresh_process.call(model_case, case, threads=settings.threads[-1])
        name = "greedy" if temperature == 0 else f"temperature {temperature}"
        table, drawn[name] = _report_temperature(found, name, ks, answer)
        title = f"{settings.model}, {name}; {answer['repeated_8_grams']:.0%} of the 8-grams repeat themselves"
        found.tables.append(report.table(title, HEADERS, table))
    found.note(_note(settings, config, len(prompts)))
    _draw(drawn, settings)
    return found


def model_case(case: dict[str, Any]) -> dict[str, Any]:
    """Return the speeds of all variants of one temperature, which take turns, and what they decoded."""
    dtype = "float32" if case["quantize"] else case["dtype"]
    model = load_model(case["model"], dtype=DTYPES[dtype], device=case["device"])
    pack(model, quantize=case["quantize"])
    tuning = read_tuning(case["model"], model)
    last: dict[str, Decoded] = {}

    def measure(name: str, heads: int | None, exact: bool) -> float:
        requests = [
            Request(tuple(p), case["new_tokens"], Sampling(case["temperature"], seed=seed), heads)
            for seed, p in enumerate(case["prompts"])
        ]
        last[name] = decode(model, requests, case["batch"], exact, tuning if heads is None else None)
        return last[name].tokens_per_second

    ks = [k for k in case["heads"] if k <= model.config.heads]
    variants: dict[str, Callable[[], float]] = {PLAIN: partial(measure, PLAIN, 1, False)}
    variants |= {str(k): partial(measure, str(k), k, True) for k in ks}
    if tuning is not None and backend_of(model).row_exact:
        variants[POLICY] = partial(measure, POLICY, None, True)
    speeds = interleave(variants, case["repetitions"])
    reference = last[str(ks[0])].tokens
    return {
        "tokens_per_second": speeds,
        "tokens_per_pass": {name: d.stats.tokens_per_pass for name, d in last.items()},
        "rows_per_pass": {name: d.stats.rows_per_pass for name, d in last.items()},
        "acceptance": {name: d.stats.acceptance for name, d in last.items()},
        "repeated_8_grams": repeated(reference),
        # The output of exact=False is only equal up to rounding, so it is reported and not required.
        "first_difference": {name: first_difference(reference, d.tokens) for name, d in last.items()},
    }


Drawn = list[tuple[str, float, float]]
"""Bars of the figure: variant, speed-up over plain, tokens per pass."""


def _report_temperature(
    found: Findings, name: str, ks: Sequence[int], answer: dict[str, Any]
) -> tuple[list[list[object]], Drawn]:
    """Add the measurements of one temperature, and return its table and its bars."""
    speeds, per_pass = answer["tokens_per_second"], answer["tokens_per_pass"]
    plain, what = speeds[PLAIN], f"{name}, plain (K = 1, exact=False)"
    speed = found.measure(what, plain, "tokens/s", tokens_per_pass=per_pass[PLAIN])["median"]
    lines: list[list[object]] = [[what, speed, 1.0, None, 1.0, 1.0, "", "", "1.00"]]
    labels = {str(k): f"K = {k}" for k in ks} | ({POLICY: POLICY} if POLICY in speeds else {})
    drawn: Drawn = []
    for k, label in labels.items():
        shares, fed = answer["acceptance"][k], answer["rows_per_pass"][k]
        details = {"tokens_per_pass": per_pass[k], "acceptance": shares, "rows_per_pass": fed}
        speed = found.measure(f"{name}, {label}", speeds[k], "tokens/s", **details)["median"]
        gain = found.ratio(f"{name}, {label} / plain", speeds[k], plain)["median"]
        exact = found.ratio(f"{name}, {label} / K = 1", speeds[k], speeds["1"])["median"]
        paper = " / ".join(f"{x:.2f}" for x in PAPER.get(int(k) if k.isdigit() else 0, ()))
        acceptance = " ".join(f"{share:.2f}" for share in shares)
        efficiency = gain / per_pass[k]
        lines.append([label, speed, gain, exact, per_pass[k], efficiency, paper, acceptance, f"{fed:.2f}"])
        drawn.append((k, gain, per_pass[k]))
    if name == "greedy" and ks[-1] > 1:
        for k in [str(ks[-1]), *list(labels)[len(ks) :]]:
            kept = [gain / per_pass[k] for gain in ratios(speeds[k], speeds["1"])]
            found.measure(f"{name}, {labels[k]} / K = 1 over its tokens per pass", kept, bar=EFFICIENCY_BAR)
    differing = [k for k in labels if answer["first_difference"][k] is not None]
    # A count with a bar, so that a lossy run shows as missed and not as a remark.
    what = f"{name}: numbers of heads whose output differs from K = 1"
    found.measure(what, [len(differing)], bar=NONE, differing=differing)
    return lines, drawn


def _note(settings: DecodeSettings, config: ModelConfig, prompts: int) -> str:
    return (
        f"n = {config.heads} {config.head_kind} heads, {config.wiring}, {settings.quantize or settings.dtype}, "
        f"{count(settings.threads[-1], 'thread')}; {count(prompts, 'prompt')} of at most {settings.prompt_tokens} "
        f"tokens, {settings.new_tokens} new tokens, batch {settings.batch}; prompts are not timed, end tokens end no "
        "output. Efficiency = speed-up over plain / tokens per pass. Policy: rows of each pass chosen by what "
        "`headstart tune` measured. Paper, n = 8: Table S3, speed-up / bytes per forward of a 7B byte-level "
        "code model on GPUs."
    )


def _draw(drawn: dict[str, Drawn], settings: DecodeSettings) -> None:
    """Write the figure, or say that matplotlib is missing."""
    try:
        need_matplotlib(f"the figure {FIGURE}")
    except UsageError as error:
        say(f"model: {error}")
        return
    path = settings.out / FIGURE
    where = f"{count(settings.threads[-1], 'CPU thread')}" if settings.device == "cpu" else settings.device
    title = f"Same output, fewer passes: {Path(str(settings.model)).name}, {where} (white: tokens per pass)"
    draw_figure(drawn, title, path)
    say(f"model: figure {path}")


def draw_figure(drawn: dict[str, Drawn], title: str, path: Path) -> None:
    """Write a PNG with a bar for each variant: its height is the speed-up over plain decoding.

    The bar's foot holds the tokens per pass. `drawn` has a list of equal length for each temperature.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    axes = figure.add_subplot()
    width = 0.72 / len(drawn)
    for i, (name, bars) in enumerate(drawn.items()):
        places = [place + width * (i - (len(drawn) - 1) / 2) for place in range(len(bars))]
        axes.bar(places, [gain for _, gain, _ in bars], width, color=COLOURS[SERIES[i]][0], label=name)
        for place, (_, gain, tokens) in zip(places, bars):
            axes.text(place, gain, f"{gain:.2f}×", ha="center", va="bottom", fontweight="bold", fontsize=9)
            axes.text(place, 0.04, f"{tokens:.1f}", ha="center", va="bottom", color="white", fontsize=8)
    (names, *_) = drawn.values()
    axes.set_xticks(range(len(names)), ["chosen\nper pass" if k == POLICY else k for k, _, _ in names])
    axes.axhline(1, color="0.25", linestyle="--", linewidth=0.9)
    axes.set(xlabel="heads that decode", ylabel="speed over plain decoding")
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10)
    axes.legend(loc="upper left", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
