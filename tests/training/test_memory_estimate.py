"""The estimate of a dry run against bytes counted in real steps."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from live_tensors import LiveTensors

sys.path.insert(0, str(Path(__file__).parent))

import distributed

from headstart.data.batches import Batch
from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.model.presets import preset
from headstart.objective.walk import walk_step
from headstart.training.config import BatchConfig, DataConfig, RunConfig
from headstart.training.memory import estimate, layout
from headstart.training.new_model import NewModel
from headstart.training.optimizer import OptimizerConfig
from headstart.training.parallel import ParallelConfig
from headstart.training.processes import Processes
from headstart.training.step import Learner, Walk

ALONE = Processes(torch.device("cpu"))
# Those whose logits or weights or activations, in turn, are the most of it.
BYTES = ModelConfig(dim=64, layers=4, attention_heads=4, context=128, heads=8, head_kind="replicated")
TOKENS = ModelConfig(vocab_size=8192, dim=64, layers=6, attention_heads=4, context=128, heads=4)
LONG = ModelConfig(dim=64, layers=6, attention_heads=4, kv_heads=2, context=300, heads=2)
MUON = ModelConfig(dim=64, layers=4, attention_heads=4, kv_heads=2, context=32, heads=2)
WIDE = ModelConfig(dim=256, layers=6, attention_heads=4, kv_heads=2, context=64, heads=2)


def run(model: ModelConfig, rows: int = 4, accumulate: int = 1, **settings: object) -> RunConfig:
    batch = BatchConfig(rows=rows, accumulate=accumulate)
    settings = {"dtype": "bfloat16"} | settings
    return RunConfig(steps=2, device="cpu", model=model, batch=batch, **settings)  # type: ignore[arg-type]


def measured(config: RunConfig, walk: Walk = walk_step) -> int:
    """Peak bytes of the second step: weights, gradients, optimizer state, batches and everything made on the way."""
    shape, rows = config.model, config.batch.rows
    generator = torch.Generator().manual_seed(0)

    def batch() -> Batch:
        draw = partial(torch.randint, 0, shape.vocab_size, generator=generator)
        return Batch(
            draw((rows, config.length)),
            draw((rows, config.length, shape.heads)),
            torch.zeros(rows, config.length).long(),
            draw((rows, shape.heads)),
        )

    with LiveTensors() as live:
        learner = Learner(NewModel.build(config, ALONE), config, ALONE, walk=walk)
        for _ in range(2):
            live.peak = live.now
            batches = [batch() for _ in range(config.batch.accumulate)]
            learner.update([learner.inputs(each, 0) for each in batches], [1.0] * shape.heads, 1e-3)
    return live.peak


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(run(BYTES), id="bytes, 8 replicated heads"),
        pytest.param(run(TOKENS, dtype="float32"), id="8k tokens, 4 transformer heads, float32"),
        pytest.param(run(LONG, dtype="float32"), id="attention in blocks, float32"),
        pytest.param(run(TOKENS, rows=2, accumulate=3, dtype="float32"), id="accumulation, float32"),
        pytest.param(run(replace(TOKENS, wiring="causal"), dtype="float32"), id="a chain, float32"),
        pytest.param(run(replace(TOKENS, heads=2, tied=True, head_kind="linear")), id="tied, linear heads"),
        pytest.param(
            run(replace(TOKENS, head_kind="medusa", shared=False, tied=True), dtype="float32"),
            id="medusa heads, float32",
        ),
        pytest.param(run(replace(BYTES, head_kind="stern"), rows=2), id="bytes, 8 stern heads"),
        pytest.param(
            run(replace(BYTES, head_kind="sequential", wiring="causal"), rows=2), id="bytes, 8 sequential heads"
        ),
        pytest.param(
            run(replace(TOKENS, head_kind="eagle3", wiring="causal"), dtype="float32"), id="4 eagle3 heads, float32"
        ),
        pytest.param(run(replace(WIDE, layers=4), rows=1), id="mostly weights"),
        pytest.param(run(MUON, rows=1, accumulate=2, optimizer=OptimizerConfig(kind="muon")), id="muon"),
        pytest.param(
            run(WIDE, data=DataConfig(attention_within_documents=True), dtype="float32"), id="documents, float32"
        ),
    ],
)
def test_it_is_what_a_step_takes(config: RunConfig) -> None:
    assert estimate(config, layout(config, 1), "cpu").peak == pytest.approx(measured(config), rel=0.1)


@pytest.mark.slow
def test_a_chunk_of_logits_is_what_a_step_takes() -> None:
    config = run(replace(TOKENS, vocab_size=16384, dim=32), rows=6)
    budget = 2 * 16384 * 64  # 64 of 768 rows at once

    def walk(model, inputs, counts, objective):  # type: ignore[no-untyped-def]
        return walk_step(model, inputs, counts, replace(objective, budget=budget))

    chunked = estimate(config, layout(config, 1), "cpu", budget).peak
    assert chunked < 0.7 * estimate(config, layout(config, 1), "cpu").peak
    assert chunked == pytest.approx(measured(config, walk), rel=0.1)


def test_checkpointing_is_what_a_step_takes() -> None:
    config = run(replace(BYTES, layers=8))
    recomputed = replace(config, parallel=ParallelConfig(activation_checkpointing=True))
    plain = estimate(config, layout(config, 1), "cpu")
    with_checkpoints = estimate(recomputed, layout(recomputed, 1), "cpu")
    assert with_checkpoints.peak < 0.5 * plain.peak
    assert with_checkpoints.peak == pytest.approx(measured(recomputed), rel=0.1)
    # One block is computed again, then differentiated: what the last one of a plain backward holds.
    again = with_checkpoints.moments["the start of the trunk's backward"]["activations computed again"]
    assert again == plain.moments["the end of the trunk's backward"]["activations of the trunk"]


def paper(**changes: object) -> RunConfig:
    return RunConfig(steps=1, dtype="bfloat16", model=preset("6.7B", heads=4), batch=BatchConfig(2, 1024), **changes)  # type: ignore[arg-type]


def test_processes_share_weights_gradients_and_state() -> None:
    config = paper()
    parameters = config.model.parameters()["total"]
    for processes in (8, 64):
        held = estimate(config, layout(config, processes), "gpu").at_peak
        assert held["weights (float32)"] == pytest.approx(4 * parameters / processes, rel=1e-3)
        assert held["optimizer state"] == pytest.approx(8 * parameters / processes, rel=1e-3)
        assert held["gradients before they are shared out (float32)"] == 4 * parameters
    spread = replace(layout(config, 64), reduce_each_micro_batch=True)
    assert estimate(config, spread, "gpu").peak < estimate(config, layout(config, 64), "gpu").peak - 3 * parameters
    copies = replace(layout(config, 64), sharers=1, reshard_after_forward=False)
    assert estimate(config, copies, "gpu").at_peak["weights (float32)"] == 4 * parameters


def test_memory_does_not_grow_with_parallel_heads_but_with_a_chain() -> None:
    def peak(heads: int, wiring: str) -> int:
        # Head layers on top, so that every model has the same trunk; one head has no sums of gradients yet.
        model = replace(TOKENS, layers=4, heads=heads, extra_layers=heads - 1, wiring=wiring)
        held = estimate(run(model), layout(run(model), 1), "gpu").moments["the loss of the last head"]
        return sum(size for name, size in held.items() if "activations" in name or "loss" in name or "logits" in name)

    assert peak(2, "parallel") == peak(8, "parallel")
    assert peak(8, "causal") > peak(2, "causal") + 5 * 4 * 128 * 64


def test_a_step_is_shared_out_evenly() -> None:
    config = paper()
    assert (layout(config, 1).rows, layout(config, 1).micro_batches) == (2, 1024)
    assert (layout(config, 64).rows, layout(config, 64).micro_batches) == (2, 16)
    assert (layout(config, 2048).rows, layout(config, 2048).micro_batches) == (1, 1)
    with pytest.raises(UsageError, match=r"2048 rows a step cannot be shared by 3 processes"):
        layout(config, 3)
    with pytest.raises(UsageError, match="--processes is 0; it must be at least 1"):
        layout(config, 0)


@pytest.mark.slow
def test_it_is_what_a_step_of_two_processes_takes() -> None:
    (status, out, errors), _ = distributed.run([str(Path(__file__).parent / "memory_worker.py")])
    assert status == 0, errors[-2000:]
    found = [json.loads(line) for line in out.splitlines()]
    assert len(found) == 5
    for case in found:
        assert case["estimate"] == pytest.approx(case["counted"], rel=0.1), case
