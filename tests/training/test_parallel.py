"""Two processes compute what one computes, and send no more than they must."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import distributed
from parallel_worker import HEADS, RARE, ROUNDED, USUAL

from headstart.errors import UsageError
from headstart.training.parallel import ParallelConfig

WORKER = str(Path(__file__).with_name("parallel_worker.py"))


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    slow = any(item.get_closest_marker("slow") for item in request.session.items if item.path.samefile(__file__))
    answers = distributed.run([WORKER, "compile", *(["rare"] if slow else [])])
    for status, _, errors in answers:
        assert status == 0, errors[-3000:]
    lines = [json.loads(line) for line in answers[0][1].splitlines()]
    return {line.pop("name"): line for line in lines}


@pytest.mark.parametrize(
    "kind, wiring, tied, accumulate", [*USUAL, *(pytest.param(*case, marks=pytest.mark.slow) for case in RARE)]
)
def test_gradients_and_losses_are_those_of_one_process(results, kind, wiring, tied, accumulate) -> None:
    result = results[f"{kind}-{wiring}{'-tied' if tied else ''}-{accumulate}"]
    assert result["error"] < 2e-6
    assert result["same_first_weights"]
    # Blocks of the trunk; the heads that have weights; the embedding, which is the unembedding's where they are tied.
    blocks = 2
    heads = {
        "transformer": HEADS,
        "linear": HEADS if wiring == "anticausal" else HEADS - 1,
        "sequential-own": HEADS - 1,
    }
    embedding, shared = 0 if tied else 1, kind in ("sequential", "eagle3")
    assert result["collectives"] == {
        # A block is gathered for the forward and for the backward, the unembedding once a step for all its losses, and
        # so is a module that heads share.
        "_allgather_base_": (2 * blocks + heads.get(kind, 0) + embedding) * accumulate + 1 + shared,
        # Gradients are summed once a step, whatever the number of heads, losses and micro-batches.
        "_reduce_scatter_base_": blocks + heads.get(kind, 0) + embedding + 1 + shared,
    }


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["replicate", "gathered", "checkpointing", "each"])
def test_every_way_of_spreading_gives_the_same(results, name, tied) -> None:
    result = results[f"{name}-tied" if tied else name]
    assert result["error"] < 2e-6
    groups = 6 if tied else 7
    if name == "replicate":  # one process a copy: nothing to gather, gradients summed over copies
        assert result["collectives"] == {"allreduce_": groups}
    else:
        gathers = groups - 1 if name == "gathered" else groups + 1
        assert result["collectives"]["_allgather_base_"] == 2 * gathers + 1
        assert result["collectives"]["_reduce_scatter_base_"] == groups * (2 if name == "each" else 1)


@pytest.mark.parametrize("kind, wiring, tied", ROUNDED)
def test_bfloat16_is_as_near_as_its_rounding(results, kind, wiring, tied) -> None:
    # Rounding turns some of the hidden layer of stern heads off or on; joint autograd alone is off by as much.
    bound = 0.1 if kind == "stern" else 0.03
    assert 1e-6 < results[f"bfloat16-{kind}-{wiring}{'-tied' if tied else ''}"]["error"] < bound


def test_compiled_blocks_inside_checkpointing_inside_sharding(results) -> None:
    assert results["compile"]["error"] < 5e-6 and results["compile"]["graphs"] == 1


def test_token_order_and_registers_cost_no_collective(results) -> None:
    assert results["methods"]["error"] < 2e-6
    # As without them: the matrix of token order lies with the unembedding's.
    assert results["methods"]["collectives"] == results["transformer-parallel-tied-2"]["collectives"]


@pytest.mark.parametrize("name", ["muon-shares", "muon-copies"])
def test_muon_over_shares_is_torchs_muon(results, name) -> None:
    assert results[name]["error"] < 1e-3 < 0.1 < results[name]["moved"]


@pytest.mark.slow
def test_two_copies_each_shared_by_two() -> None:
    answers = distributed.run([WORKER], count=4)
    assert [status for status, _, _ in answers] == [0] * 4, answers[0][2][-3000:]
    hybrid, muon = map(json.loads, answers[0][1].splitlines())
    assert hybrid["error"] < 2e-6 and hybrid["same_first_weights"]
    # As with one copy, and each sum goes over the copies too.
    assert hybrid["collectives"] == {"_allgather_base_": 15, "_reduce_scatter_base_": 6, "allreduce_": 6}
    assert muon["error"] < 1e-3 < 0.1 < muon["moved"]


@pytest.mark.parametrize(
    "config, processes, per_node, shape",
    [
        (ParallelConfig(), 8, 4, (1, 8)),
        (ParallelConfig(sharding="replicate"), 8, 4, (8, 1)),
        (ParallelConfig(sharding="hybrid"), 8, 4, (2, 4)),
        (ParallelConfig(sharding="hybrid", processes_per_copy=2), 8, 4, (4, 2)),
    ],
)
def test_the_mesh(config, processes, per_node, shape) -> None:
    assert config.mesh_shape(processes, per_node) == shape


def test_a_mesh_that_does_not_divide_is_refused() -> None:
    config = ParallelConfig(sharding="hybrid", processes_per_copy=3)
    with pytest.raises(
        UsageError, match=r"parallel.processes_per_copy 3 does not divide the 8 processes; take a divis"
    ):
        config.mesh_shape(8, 4)
    with pytest.raises(UsageError, match=r"processes_per_copy is for parallel.sharding hybrid, not full"):
        ParallelConfig(processes_per_copy=2)
    with pytest.raises(UsageError, match="processes_per_copy is 0; it must be at least 1"):
        ParallelConfig(sharding="hybrid", processes_per_copy=0)
    with pytest.raises(UsageError, match=r"parallel.sharding 'some' is unknown; take one of full, hybrid, replicate"):
        ParallelConfig(sharding="some")
