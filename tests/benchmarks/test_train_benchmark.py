from __future__ import annotations

import pytest

from headstart.benchmarks import train
from headstart.benchmarks.train import TrainSettings, predicted_speed
from headstart.model.config import preset


def test_speeds_and_ratios(in_process):
    settings = TrainSettings(
        heads=(1, 4), dim=16, layers=5, length=8, rows=1, large_vocabulary=500, large_rows=1, repetitions=2, steps=1
    )
    result = train.run(settings)
    for part in ("bytes", "large-vocabulary"):
        rows = [row for row in result["measurements"] if row["part"] == part]
        assert [row["unit"] for row in rows] == ["tokens/s", "tokens/s", ""]
        assert all(row["repetitions"] == 2 and row["median"] > 0 for row in rows)
        assert (rows[2]["bar"] is not None) == (part == "bytes")


@pytest.mark.parametrize(
    ("size", "heads", "slower"),
    [("0.3B", 2, 1.08), ("0.3B", 4, 1.24), ("1.3B", 4, 1.12), ("3B", 4, 1.07), ("6.7B", 4, 1.05), ("13B", 2, 1.01)],
)
def test_prediction_is_that_of_the_paper_reference(size, heads, slower):
    assert 1 / predicted_speed(preset(size, heads=heads)) == pytest.approx(slower, abs=0.006)
