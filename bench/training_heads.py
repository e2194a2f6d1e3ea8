"""How much slower is a step with more heads, at the same number of parameters?"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bench.report import Bar, measurement
from bench.training_steps import flop_ratio, measure, run_config
from headstart.console import say
from headstart.decoding.policy.timing import ratios
from headstart.model.config import ModelConfig

if TYPE_CHECKING:
    from bench.train import TrainSettings

SPEED_BAR = Bar(">=", 0.95)
FLOP_BAR = Bar("<=", 1.05)


def measure_heads(settings: TrainSettings, part: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and notes of the part "bytes" or "large-vocabulary"."""
    large = part == "large-vocabulary"
    vocab_size, batch_rows = (settings.large_vocabulary, settings.large_rows) if large else (256, settings.rows)
    one = replace(settings.model(), vocab_size=vocab_size)
    models = {str(n): replace(one, heads=n) for n in settings.heads}
    configs = {name: run_config(model, batch_rows, **settings.run_fields()) for name, model in models.items()}
    speeds = measure(configs, settings.repetitions, settings.steps, settings.threads)["speeds"]
    rows = []
    for name, model in models.items():
        rows.append(measurement(part, f"n = {name}", speeds[name], "tokens/s", heads=model.heads))
        say(f"{part}: n = {name}: {rows[-1]['median']:,.0f} tokens/s")
    for name, model in models.items():
        if "1" in models and name != "1":
            rows += _over_one_head(part, model, ratios(speeds[name], speeds["1"]), large)
    notes = [
        f"{part}: V = {vocab_size:,}, batches of {batch_rows} x {settings.length}. Transformer heads, parallel, taken "
        "from the trunk, so every model has the same number of parameters."
    ]
    if large:
        notes.append(
            f"{part}: FLOP ratio: matrix products of a token, 12 L d^2 + V d + 2 T d L and (n-1) V d more, over those "
            "of n = 1; the slowdowns of the paper's Table S5 follow it up to 3B parameters."
        )
    return rows, notes


def _over_one_head(part: str, model: ModelConfig, faster: list[float], large: bool) -> list[dict[str, Any]]:
    n, predicted = model.heads, flop_ratio(model)
    what = f"n = {n} / n = 1 (by products alone: {1 / predicted:.2f})"
    bar = SPEED_BAR if n == 4 and not large else None
    rows = [measurement(part, what, faster, bar=bar, heads=n)]
    if large:
        over = [1 / ratio / predicted for ratio in faster]
        bar = FLOP_BAR if n == 4 else None
        rows.append(measurement(part, f"n = {n}: step time over its FLOP ratio", over, bar=bar, heads=n))
    return rows
