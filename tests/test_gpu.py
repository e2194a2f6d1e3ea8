"""The same promises on a GPU (on an H200, 2026-11-26: all but the one of two GPUs, which was not run)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.kernels.pack import pack
from headstart.decoding.settings import Request, Sampling
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.objective.inputs import StepInputs, count_targets
from headstart.objective.objective import Objective
from headstart.objective.walk import walk_step
from headstart.training.config import load_config
from headstart.training.loop import train
from tests.reference import joint_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
ROOT = Path(__file__).parent.parent


def model(dtype: torch.dtype) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=64, dim=64, layers=6, attention_heads=4, kv_heads=2, heads=4, context=640)
    made = Transformer(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return made.to("cuda", dtype)


def test_the_walk_gives_joint_gradients() -> None:
    made = model(torch.float64)
    tokens = torch.randint(0, 64, (2, 20), device="cuda")
    targets = torch.randint(0, 64, (2, 20, 4), device="cuda")
    joint_step(made, StepInputs(tokens, targets), count_targets(targets))
    wanted = [parameter.grad.clone() for parameter in made.parameters()]
    made.zero_grad()
    walk_step(made, StepInputs(tokens, targets), count_targets(targets), Objective(budget=64 * 4 * 7))
    for want, parameter in zip(wanted, made.parameters()):
        assert (parameter.grad - want).norm() <= 1e-12 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_exact_decoding_does_not_depend_on_the_number_of_heads(dtype: torch.dtype, temperature: float) -> None:
    packed = pack(model(dtype))
    prompt = tuple(range(60)) * 8  # crosses a block of 512 positions
    outputs = [
        generate_all(Engine(packed), [Request(prompt, 100, Sampling(temperature, seed=3), heads)])[0].tokens
        for heads in range(1, 5)
    ]
    assert all(output == outputs[0] for output in outputs)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("exact", [True, False])
def test_graphs_change_neither_output_nor_acceptance(temperature: float, exact: bool) -> None:
    packed = pack(model(torch.bfloat16))
    requests = [Request(tuple(range(20 + i)), 60, Sampling(temperature, seed=i)) for i in range(5)]
    eager, graphed = (
        generate_all(Engine(packed, EngineConfig(slots=3, exact=exact, graphs=graphs)), requests)
        for graphs in (False, True)
    )
    assert [g.tokens for g in graphed] == [g.tokens for g in eager]
    assert [g.stats.accepted for g in graphed] == [g.stats.accepted for g in eager]


def test_training_runs_and_resumes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text to learn from " * 400)
    (tmp_path / "b.txt").write_text("other text to learn from " * 400)
    flags = ["--run-dir", str(tmp_path / "run"), "--device", "cuda", "--data.sources", str(tmp_path)]
    for steps in (3, 6):
        train(load_config(ROOT / "configs" / "smoke.yaml", [*flags, "--steps", str(steps)]))
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs here")
def test_two_gpus_compute_what_one_does() -> None:
    sys.path.insert(0, str(ROOT / "tests" / "training"))
    import distributed

    answers = distributed.run([str(ROOT / "tests" / "training" / "parallel_worker.py"), "cuda", "compile", "rare"])
    assert [status for status, _, _ in answers] == [0, 0], answers[0][2][-3000:]
    for line in answers[0][1].splitlines():
        result = json.loads(line)
        assert result["error"] < (0.03 if "bfloat16" in result["name"] else 1e-3), result
