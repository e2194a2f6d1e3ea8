"""The progress line of a run."""

from __future__ import annotations

import math

from headstart.training.metrics import in_short
from headstart.training.step import StepResult


def test_a_frozen_head_has_no_loss_to_show() -> None:
    def shown(losses: list[float], finite: bool = True) -> dict[str, object]:
        return in_short(StepResult(losses, [], 1.0, finite, lr=0.1), 5.0)

    assert shown([math.nan, 2.0, 3.0]) == {"loss of heads 2, 3": "2.000 3.000", "tokens/s": "5"}
    assert shown([1.0, 2.0]) == {"loss": "1.000 2.000", "tokens/s": "5"}
    assert shown([math.nan, 2.0], finite=False)["loss"] == "nan 2.000"  # diverged, and says so
    assert shown([math.nan, *map(float, range(6))])["loss of heads 2, 3, 4, 5, 6, 7"] == "0.000 .. 5.000"
