"""Passes by rows, in the dtype asked for and in int8: what a row more costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench import fresh_process
from bench.passes import Pass
from bench.report import count, measurement
from headstart.decoding.kernels.pack import pack
from headstart.decoding.policy.timing import DTYPES, PASSES_OF_A_BLOCK, interleave, random_model, ratios, timed
from headstart.formats.huggingface import load_model
from headstart.model.config import ModelConfig

ROWS = (1, 2, 4, 8, 16)


def run(
    model: Path | None, sizes: ModelConfig, threads: tuple[int, ...], dtype: str, passes: int, length: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Measurements, no tables, and a note: of the model directory, or (None) of random weights of those sizes."""
    path = None if model is None else str(model)
    case = {
        "model": path,
        "config": asdict(replace(sizes, heads=1)),
        "dtype": dtype,
        "passes": passes,
        "length": length,
    }
    rows: list[dict[str, Any]] = []
    for number in threads:
        answer = fresh_process.call("bench.row_speed:case", case, threads=number)
        for kind, seconds in answer.items():
            for width, values in seconds.items():
                what = f"{kind}, {count(int(width), 'row')}, {count(number, 'thread')}"
                rows.append(measurement("rows", what, [1e3 * s for s in values], "ms", threads=number))
                others = {dtype: answer[dtype][width]} if kind != dtype else {}
                others |= {"1 row": seconds["1"]} if width != "1" else {}
                for name, other in others.items():
                    over = ratios(values, other, PASSES_OF_A_BLOCK)
                    rows.append(measurement("rows", f"{what} / {name}", over, threads=number))
    return (
        rows,
        [],
        [
            f"rows: passes of head 1 over so many rows, no drafts, at {length} cached positions, each after one of its "
            f"like, of {path or f'{sizes.layers} layers of {sizes.dim}, random weights'}; "
            "int8: decoding/kernels/int8.py."
        ],
    )


def case(case: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Seconds of passes by dtype or int8, and by rows. Runs in a process of its own."""
    variants: dict[str, Callable[[], float]] = {}
    kinds = (case["dtype"], "int8")
    for kind in kinds:
        dtype = "float32" if kind == "int8" else kind
        if case["model"] is None:
            model = random_model(ModelConfig(**case["config"]), dtype, "cpu")
        else:
            model = load_model(case["model"], dtype=DTYPES[dtype])
        pack(model, quantize="int8" if kind == "int8" else None)
        variants |= {f"{kind} {rows}": _again(Pass(model, rows=rows, length=case["length"])) for rows in ROWS}
    seconds = interleave(variants, case["passes"], warmup=5)
    return {kind: {str(rows): seconds[f"{kind} {rows}"] for rows in ROWS} for kind in kinds}


def _again(one: Pass) -> Callable[[], float]:
    """The seconds of a pass that follows its like, as in decoding: after another model's, caches hold nothing of it."""
    measure = timed(one)

    def measured() -> float:
        one()
        return measure()

    return measured
