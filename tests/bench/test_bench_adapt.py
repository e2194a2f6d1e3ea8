from __future__ import annotations

from pathlib import Path

from bench.adapt import Settings, run


def test_it_measures_every_way(tmp_path: Path) -> None:
    found = run(
        Settings(
            head_kinds=("sequential",), heads=2, layers=2, dim=32, vocab_size=64, rows=1, length=8, repetitions=1,
            out=tmp_path,
        )
    )  # fmt: skip
    ways = ["everything", "trunk runs", "states are read"]
    whats = [row["what"] for row in found["measurements"]]
    assert whats == [f"{way}: a step" for way in ways] + ["trunk runs / states are read"]
    assert all(row["median"] > 0 for row in found["measurements"])
