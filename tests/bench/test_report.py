from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from bench import processes, report
from bench.decode import heads_case
from bench.report import Bar, BenchSettings, Findings, spread
from headstart.decoding.policy.timing import interleave, ratios
from headstart.errors import UsageError


@dataclass(frozen=True)
class Settings(BenchSettings):
    sizes: tuple[int, ...] = (1, 2)


def test_variants_take_turns_and_warmup_is_not_counted():
    order: list[str] = []

    def variant(name):
        return lambda: order.append(name) or float(len(order))

    values = interleave({"a": variant("a"), "b": variant("b")}, repetitions=2, warmup=1)
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert values == {"a": [3, 5], "b": [4, 6]}


def test_ratios_are_of_medians_of_blocks():
    assert ratios([2, 4], [1, 2]) == [2, 2]
    # One disturbed pass in a block does not reach the ratio.
    assert ratios([2, 2, 99, 2, 2, 2], [1, 1, 1, 1, 50, 1], block=3) == [2, 2]
    assert ratios([2, 2], [1, 1], block=6) == [2]


def test_spread_is_quartiles_of_many_and_range_of_few():
    few, many = spread([3, 1, 2]), spread(range(1, 10))
    assert (few["median"], few["low"], few["high"], few["spread"]) == (2, 1, 3, "range")
    assert (many["median"], many["spread"], many["repetitions"]) == (5, "quartiles", 9)
    assert 1 < many["low"] < 5 < many["high"] < 9


@pytest.mark.parametrize(
    ("bar", "value", "met"),
    [(Bar("<", 1), 1, False), (Bar("<=", 1), 1, True), (Bar(">=", 1), 1, True), (Bar(">=", 1), 0.9, False)],
)
def test_bars(bar, value, met):
    assert bar.met(value) is met


def test_report_files(tmp_path):
    found = Findings("part", notes=["a note"])
    found.measure("fast", [2.0, 3.0, 4.0], "x", Bar(">=", 1.5), threads=2, share=[0.5, 0.25])
    found.measure("slow", [1.0], "x", Bar(">=", 1.5))
    found.times("seen", [0.007])
    result = report.result("demo", Settings(date="2026-11-23"), found)
    paths = report.write(result, tmp_path / "deep")
    assert [path.name for path in paths] == ["demo.json", "demo.md"]
    read = json.loads(paths[0].read_text())
    assert read["date"] == "2026-11-23" and read["settings"] == {"sizes": [1, 2]}
    assert [row["met"] for row in read["measurements"]] == [True, False, None] and read["met"] is False
    assert read["measurements"][0]["details"] == {"threads": 2, "share": [0.5, 0.25]} and read["machine"]["torch"]
    page = paths[1].read_text()
    assert "| part | fast | 3 x | 2 to 4 (range of 3) | >= 1.5 | met | threads 2; share 0.5/0.25 |" in page
    assert "| part | slow | 1 x |  | >= 1.5 | **missed** |  |" in page
    assert "| part | seen | 7 ms |  |  |  |  |" in page
    assert "- a note" in page
    assert list(paths[0].parent.iterdir()) and len(list(paths[0].parent.iterdir())) == 2  # nothing half-written


def test_a_process_of_its_own_answers_and_passes_usage_errors_on():
    case = {"model": "/nowhere", "dtype": "float32", "device": "cpu", "quantize": None}
    with pytest.raises(UsageError, match="/nowhere"):
        processes.call(heads_case, case, threads=1)
