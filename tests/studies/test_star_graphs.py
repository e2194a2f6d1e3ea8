"""Path-star graphs: sequences that say what the graph is, and how the study reads them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from headstart.data.batches import IGNORE
from headstart.errors import UsageError
from headstart.objective.inputs import StepInputs
from headstart.training.new_model import build_model
from headstart.training.processes import joined
from studies.path_star import STUDY, batches_of, config_of, right_of
from studies.star_graphs import StarGraphs
from studies.study import Case, Findings, Result

SETTINGS = STUDY.scales["smoke"]


@pytest.mark.parametrize("graphs", [StarGraphs(2, 3, 8), StarGraphs(3, 4, 10), StarGraphs(1, 2, 2)])
def test_the_text_is_the_graph_and_its_path(graphs: StarGraphs) -> None:
    goals = []
    for text in graphs.draw(60, np.random.default_rng(0)).tolist():
        bar, equals, slash = range(graphs.labels, graphs.labels + 3)
        cut, given, path = text.index(slash), text.index(equals), text[graphs.prompt :]
        edges = [tuple(text[i : i + 2]) for i in range(0, cut, 3)]
        assert all(text[i] == bar for i in range(2, cut, 3)) and given == graphs.prompt - 1
        assert len(set(edges)) == graphs.edges == len(edges) and len({v for _, v in edges}) == graphs.edges
        assert text[cut + 1 : given] == [path[0], path[-1]] and len(path) == graphs.length
        assert all(step in edges for step in pairwise(path))
        assert sum(u == path[0] for u, _ in edges) == graphs.degree
        goals.append(edges.index((path[-2], path[-1])))
    assert len(set(goals)) == graphs.edges  # edges stand in any order


def test_every_arm_is_asked_for_alike_and_a_seed_gives_the_same_graphs() -> None:
    graphs = StarGraphs(2, 3, 5)
    sequences = graphs.draw(2000, np.random.default_rng(1))
    arms = sequences[:, 1 : 3 * graphs.edges : 3]  # where edges lead to, in the order of the text
    at = (arms == sequences[:, graphs.prompt + 1 : graphs.prompt + 2]).argmax(1)
    assert np.bincount(at, minlength=4) == pytest.approx(np.full(4, 500), rel=0.2)  # the arm's place tells nothing
    assert np.array_equal(sequences, graphs.draw(2000, np.random.default_rng(1)))
    with pytest.raises(UsageError, match="labels is 4; a graph of 5 nodes needs as many"):
        StarGraphs(2, 3, 4)


@pytest.mark.parametrize("method", [*SETTINGS.methods, "3 heads"])
def test_what_a_method_reads_and_learns(method: str) -> None:
    graphs = StarGraphs(2, 3, 8)
    config = config_of(SETTINGS, graphs, method, seed=0)
    batch = next(batches_of(graphs, config, method))
    P, rows = graphs.prompt, config.batch.rows
    assert (batch.targets[:, : P - 1] == IGNORE).all()  # the graph is chance
    path = graphs.draw(rows, np.random.default_rng(0))[:, P:]
    if method == "reversed":
        path = path[:, ::-1]
    assert np.array_equal(batch.targets[:, P - 1 :, 0].numpy(), path)
    inputs = StepInputs.of_batch(batch, attention_within_documents=False)
    for auxiliary in config.auxiliaries:
        inputs = auxiliary.inputs(inputs, 0)
    if method == "teacherless":
        assert (inputs.tokens[:, P:] == graphs.spare).all()
    else:
        assert np.array_equal(inputs.tokens[:, P:].numpy(), path[:, :-1])
    if method == "3 heads":
        assert np.array_equal(batch.targets[:, P - 1, 2].numpy(), path[:, 2])  # the goal, from "=" on
        assert (batch.targets[:, P:, 2] == IGNORE).all()
    if method == "registers":
        assert inputs.registers is not None and (inputs.registers.targets != IGNORE).any(1).all()


def test_teacherless_decoding_reads_no_answer() -> None:
    graphs = StarGraphs(2, 3, 8)
    config = config_of(SETTINGS, graphs, "teacherless", seed=0)
    with joined("cpu") as processes:
        model, _ = build_model(config, processes)
    sequences = graphs.draw(50, np.random.default_rng(3))
    other = sequences.copy()
    other[:, graphs.prompt :] = 0
    found = right_of(model, graphs, sequences, "teacherless")
    masked = np.pad(sequences[:, : graphs.prompt], ((0, 0), (0, 2)), constant_values=graphs.spare)
    chosen = model(torch.from_numpy(masked)).argmax(-1)[:, graphs.prompt - 1 :].numpy()
    assert found.shape == (50, 3) and np.array_equal(found, chosen == sequences[:, graphs.prompt :])
    assert np.array_equal(right_of(model, graphs, other, "teacherless"), chosen == 0)


def found_by(method: str, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Return what the study finds at its scale cpu with `changes`."""
    return STUDY.run(replace(STUDY.scales["cpu"], **changes), Case({"method": method}, seed), lambda **_: None)


def test_the_next_token_alone_learns_all_but_the_arm() -> None:
    training = replace(SETTINGS.training, steps=40, rows=32, optimizer="muon", lr=2e-2, warmup_steps=20)
    changes = {"degree": 2, "length": 3, "labels": 6, "dim": 32, "head_kind": "linear"}
    found = found_by("next token", **changes, tests=300, watched=100, training=training)
    start, arm, goal = found["places"]
    assert start > 0.9 < goal and arm < 0.65 and found["exact"] < 0.65


@pytest.mark.slow  # three minutes of one core at most, idle
@pytest.mark.parametrize("seed", [0, 1])
def test_the_next_token_guesses_the_arm_and_three_heads_find_it(seed: int) -> None:
    assert found_by("next token", seed)["exact"] <= 0.65
    assert found_by("3 heads", seed)["exact"] >= 0.95


def test_every_method_is_judged_if_the_control_is_solved() -> None:
    methods = ("next token", "2 heads", "reversed", "registers")
    settings = replace(SETTINGS, seeds=3, methods=methods, tests=1000, degree=2)
    exact = {"next token": 0.5, "2 heads": 1.0, "reversed": 1.0, "registers": 1.0}

    def found(**changes: float) -> Findings:
        given = exact | {name.replace("_", " "): value for name, value in changes.items()}
        numbers = {"places": [1.0, 0.5, 1.0], "steps": 4}
        cases = STUDY.cases(settings)
        return STUDY.findings(
            settings, [Result(case, numbers | {"exact": given[str(case.conditions["method"])]}, 1.0) for case in cases]
        )

    assert found().verdict == "reproduced"
    assert found(registers=0.5).verdict == "direction only"
    assert found(reversed=0.5).verdict == "out of reach"
    assert found(next_token=0.8).verdict == "null"  # it does not guess


def test_the_next_token_gets_more_steps() -> None:
    settings = STUDY.scales["cpu"]
    graphs = StarGraphs(settings.degree, settings.length, settings.labels)
    steps = {method: config_of(settings, graphs, method, 10).steps for method in ("next token", "reversed")}
    assert steps == {"next token": 4500, "reversed": 1500}
