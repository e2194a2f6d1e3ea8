"""The studies on code: what is held out, and the findings on made-up scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from studies.code_models import code_bytes
from studies.run import find_study
from studies.study import Case, Result


def test_what_is_scored_is_not_trained_on() -> None:
    training, pieces = code_bytes(200_000, 3, 500)
    assert sum(map(len, training)) == 200_000 and [len(piece) for piece in pieces] == [500] * 3
    assert not any(piece[:200] in content for piece in pieces for content in training)
    more, same = code_bytes(300_000, 3, 500)
    assert same == pieces and more[: len(training) - 1] == training[:-1]  # the files are the same, the last cut later


def scores(case: Case, bits: float, prefix: list[float], per_pass: list[float], top1: float = 0.9) -> Result:
    heads = len(per_pass)
    numbers = {"bits_per_byte": [bits] * heads, "prefix": prefix, "tokens_per_pass": per_pass, "parameters": 1}
    return Result(case, numbers | {"top1": [top1] * heads}, 1.0)


def of_bytes(case: Case) -> Result:
    n = int(case.conditions["n"])
    return scores(case, 2.0, [0.5**k for k in range(1, n)], [2 - 0.5 ** (k - 1) for k in range(1, n + 1)])


def of_bytes_flat(case: Case) -> Result:
    n = int(case.conditions["n"])
    return scores(case, 2.0, [0.1 * k for k in range(n - 1)], [1.0] * n)


def by_kind(bits: dict[str, float]) -> Callable[[Case], Result]:
    return lambda case: scores(
        case, bits.get(str(case.conditions["kind"]), 2.5), [0.5, 0.2, 0.1],
        [1.0] if "next token" in str(case.conditions["kind"]) else [1.0, 1.5, 1.7, 1.8],
    )  # fmt: skip


def by_size(costs: dict[str, float]) -> Callable[[Case], Result]:
    return lambda case: scores(
        case,
        2 + (case.conditions["n"] != 1 and case.conditions["depth"] == "matched") * costs[str(case.conditions["size"])],
        [0.5, 0.2, 0.1],
        [1.0] * 4,
    )


def by_schedule(bits: dict[str, float], drafts: dict[str, float]) -> Callable[[Case], Result]:
    def made_up(case: Case) -> Result:
        name = str(case.conditions["schedule"])
        heads = 1 if name == "next token alone" else 4
        return scores(case, bits.get(name, 2.0), [0.5] * (heads - 1), [drafts.get(name, 1.0)] * heads)

    return made_up


PARALLEL_BEST = {"next token alone": 2.2, "transformer, parallel": 2.0}
AS_THE_PAPER = {"constant": 2.2, "forward": 2.1, "reverse": 2.0}


@pytest.mark.parametrize(
    "name, made_up, verdict",
    [
        ("bytes", of_bytes, "reproduced"),
        ("bytes", of_bytes_flat, "null"),
        ("heads", by_kind(PARALLEL_BEST), "reproduced"),
        ("heads", by_kind({**PARALLEL_BEST, "linear, parallel": 1.9}), "direction only"),
        ("heads", by_kind({"next token alone": 1.9, "transformer, parallel": 2.6}), "null"),
        ("scaling", by_size({"0.06M": 0.2, "0.25M": 0.1}), "direction only"),
        ("scaling", by_size({"0.06M": -0.2, "0.25M": 0.3}), "null"),
        ("curriculum", by_schedule(AS_THE_PAPER, {"forward": 1.5, "reverse": 1.0}), "reproduced"),
        ("curriculum", by_schedule(AS_THE_PAPER, {"forward": 1.0, "reverse": 1.5}), "direction only"),
        ("curriculum", by_schedule(AS_THE_PAPER | {"forward": 2.21}, {"forward": 1.5, "reverse": 1.0}), "null"),
        ("curriculum", by_schedule({"constant": 1.9, "forward": 2.1, "reverse": 2.0}, {}), "null"),
    ],
)
def test_findings(name: str, made_up: Callable[[Case], Result], verdict: str) -> None:
    study = find_study(name)
    settings: Any = replace(study.scales["cpu"], seeds=3)
    results = [made_up(case) for case in study.cases(settings)]
    found = study.findings(settings, results)
    assert found.verdict == verdict and "too short" not in found.sentence
    assert found.ours and all(len(row) == len(found.headers) for row in found.rows)
    for result in results:  # as of models that always say the blank
        result.numbers["top1"] = [0.2] * len(result.numbers["top1"])
    found = study.findings(settings, results)
    assert found.verdict == "out of reach" and "too short a training" in found.sentence
