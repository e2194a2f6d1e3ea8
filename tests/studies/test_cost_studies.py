"""Speed, memory and finetuning: the findings on made-up numbers, and the model inside one with several heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from headstart.model.transformer import Transformer
from studies import finetune, memory, speed
from studies.study import Case, Result
from studies.training import sized


@pytest.mark.parametrize(
    "walk, joint, verdict",
    [
        (0.01, 1.2, "reproduced"),
        (0.5, 1.2, "null"),
        (0.01, 0.1, "direction only"),
    ],  # growth over n - 1, logits of a head
)
def test_findings_of_memory(walk: float, joint: float, verdict: str) -> None:
    settings = replace(memory.STUDY.scales["cpu"], seeds=3, heads=(1, 2, 4))
    logits = 4 * settings.vocab_size * settings.length / 2**20
    results = []
    for case in memory.STUDY.cases(settings):
        n, by_walk = int(case.conditions["n"]), case.conditions["step"] == "walk"
        mib = 500 * (1 + walk * (n > 1)) if by_walk else 600 + joint * logits * (n - 1)
        results.append(Result(case, {"mib": mib}, 1.0))
    assert memory.STUDY.findings(settings, results).verdict == verdict


def test_a_joint_step_that_does_not_fit_is_left_out() -> None:
    settings = replace(memory.STUDY.scales["cpu"], seeds=3, heads=(1, 2))
    results = [
        Result(case, {"mib": 500.0 if case.conditions["step"] == "walk" else None}, 1.0)
        for case in memory.STUDY.cases(settings)
    ]
    found = memory.STUDY.findings(settings, results)
    assert found.verdict == "reproduced" and [row[2] for row in found.rows] == ["-", "-"]


def of_speed(case: Case, up: float, slower: float) -> Result:
    table = str(case.conditions["table"])
    if table == "S5":
        products = {"1": 1.0, "2": 1.1, "4": 1.3}
        return Result(case, {"step time": {n: x * slower for n, x in products.items()}, "by products": products}, 1.0)
    passes = {str(k): float(k) for k in speed.PAPER[table]}
    return Result(case, {"speedup": {k: 1 + up * (x - 1) for k, x in passes.items()}, "tokens_per_pass": passes}, 1.0)


@pytest.mark.parametrize(
    "up, slower, verdict", [(0.9, 1.05, "reproduced"), (0.9, 1.5, "direction only"), (-0.1, 1.5, "null")]
)
def test_findings_of_speed(up: float, slower: float, verdict: str) -> None:
    settings = replace(speed.STUDY.scales["cpu"], seeds=3)
    results = [of_speed(case, up, slower) for case in speed.STUDY.cases(settings)]
    assert speed.STUDY.findings(settings, results).verdict == verdict


@pytest.mark.parametrize(
    "exact, verdict",
    [
        ((0.5, 0.5, 0.6, 0.7), "reproduced"),
        ((0.5, 0.7, 0.6, 0.7), "direction only"),  # a next-token model as shallow does as well
        ((0.5, 0.5, 0.7, 0.6), "direction only"),
        ((0.7, 0.7, 0.6, 0.5), "null"),
        ((0.1, 0.1, 0.1, 0.12), "out of reach"),
    ],
)
def test_findings_of_finetuning(exact: tuple[float, float, float, float], verdict: str) -> None:
    settings = replace(finetune.STUDY.scales["cpu"], seeds=3)
    results = []
    for case in finetune.STUDY.cases(settings):
        numbers: dict[str, Any] = {"before": 0.1, "guessed": 0.1}
        n, depth = case.conditions.values()
        several = {"then 4": exact[2], "then 1": exact[3]}
        numbers |= several if (n, depth) == (4, "matched") else {"then 1": exact[depth == "shallow"]}
        results.append(Result(case, numbers, 1.0))
    found = finetune.STUDY.findings(settings, results)
    assert found.verdict == verdict and ("too short" in found.sentence) == (verdict == "out of reach")


def test_the_model_inside_one_with_several_heads_is_its_head_1() -> None:
    torch.manual_seed(0)
    model = Transformer(sized("0.06M", vocab_size=20, heads=4, context=32)).eval()
    inside = finetune.without_further_heads(model)
    tokens = torch.randint(20, (2, 9))
    assert torch.equal(inside(tokens), model(tokens))
    assert inside.config.heads == 1 and inside.config.layers == 2  # of 5 blocks 1 is left to the trunk, and head 1's
    before = model(tokens)
    with torch.no_grad():
        for parameter in inside.parameters():
            parameter.add_(1)
    assert torch.equal(model(tokens), before)
