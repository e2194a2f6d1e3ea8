"""What several processes compute together, beside what one computes alone: JSON lines, read by test_parallel.py."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.objective.step import count_targets, joint_step, walk_step
from headstart.training.muon import Muon
from headstart.training.parallel import ParallelConfig, materialize, parallelize, whole_model
from headstart.training.processes import Processes, joined

HEADS, LENGTH, ROWS = 3, 12, 4
KINDS = [
    ("transformer", "parallel"),
    ("transformer", "causal"),
    ("transformer", "anticausal"),
    ("linear", "parallel"),
    ("linear", "causal"),
    ("linear", "anticausal"),
    ("replicated", "parallel"),
    ("medusa", "parallel"),
    ("stern", "parallel"),
    ("sequential", "causal"),
    ("sequential-own", "causal"),
]
SPREAD = [(False, 1), (True, 3)]
"""(tied, micro-batches): a case takes a second."""
ROUNDED = {
    "transformer": [False, True], "linear": [False], "replicated": [False, True], "medusa": [False], "stern": [True],
    "sequential": [True], "sequential-own": [],
}  # fmt: skip
"""tied, by kind of head, in bfloat16."""


class Collectives(TorchDispatchMode):
    """Counts what is sent between processes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def gradients(
    processes: Processes, kind: str, wiring: str, tied: bool, accumulate: int, parallel: ParallelConfig, **options: Any
) -> dict[str, Any]:
    """The largest relative error of any parameter's gradient against one process's joint autograd, and the collectives.

    Twice in a row, since a second step meets the state that the first one leaves.
    """
    config = ModelConfig(
        vocab_size=37, dim=16, layers=5, attention_heads=2, context=LENGTH, heads=HEADS,
        head_kind=kind.removesuffix("-own"), shared="-own" not in kind, wiring=wiring, tied=tied,
    )  # fmt: skip
    dtype, compiled = options.get("dtype", "float32"), options.get("compile", False)
    with torch.device("meta"):
        model, alone = Transformer(config), Transformer(config)
    mesh = processes.mesh(parallel.mesh_shape(processes.count, processes.per_node))
    sums = parallelize(model, mesh, parallel, compile=compiled, dtype=dtype)
    materialize(model, processes.device, seed=0)
    materialize(alone, processes.device, seed=0)
    worst, counts = 0.0, {}
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        text = torch.randint(37, (ROWS * accumulate, LENGTH + HEADS), generator=generator)
        tokens = text[:, : LENGTH + config.ahead]
        targets = torch.stack([text[:, k : k + LENGTH] for k in range(1, HEADS + 1)], -1)
        targets[torch.rand(targets.shape, generator=generator) < 0.3] = -100  # ragged counts over processes
        tokens, targets = tokens.to(processes.device), targets.to(processes.device)
        valid = count_targets(targets)
        weights = options.get("weights", [1.0] * HEADS)
        model.zero_grad()
        alone.zero_grad()
        autocast = torch.autocast(processes.device.type, torch.bfloat16, enabled=dtype == "bfloat16")
        with autocast:
            reference = joint_step(alone, tokens, targets, valid, weights).sums
        mine = torch.arange(len(text)).view(accumulate, processes.count, -1)[:, processes.rank]
        total = torch.zeros(HEADS, device=processes.device)
        with Collectives() as collectives:
            for i, rows in enumerate(mine):
                with autocast, sums.micro_batch(last=i == accumulate - 1, losses=HEADS):
                    total += walk_step(model, tokens[rows], targets[rows], valid, weights).sums
        counts = dict(collectives.counts)
        expected = dict(alone.named_parameters())
        assert expected.keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor) and parameter.grad is not None, name
            assert parameter.grad.dtype == torch.float32
            error = (parameter.grad.full_tensor() - expected[name].grad).norm() / expected[name].grad.norm()
            worst = max(worst, error.item())
        worst_loss = ((processes.sum(total) - reference).abs() / reference).max().item()
        worst = max(worst, worst_loss if dtype == "float32" else 0.0)
    copy = whole_model(model, torch.float32, keep=True)
    assert copy is not None
    same = all(torch.equal(a, b.cpu()) for a, b in zip(copy.state_dict().values(), alone.state_dict().values()))
    return {"error": worst, "collectives": counts, "same_first_weights": same}


def muon(processes: Processes, shape: tuple[int, int]) -> dict[str, Any]:
    """The largest difference between torch's Muon on whole matrices and ours on shares, after some steps."""
    mesh = processes.mesh(shape)
    generator = torch.Generator().manual_seed(0)
    sizes = [(8, 12), (8, 12), (8, 12), (7, 3), (20, 6), (1, 4)]
    values = [torch.randn(size, generator=generator) for size in sizes]

    def spread(value: torch.Tensor) -> DTensor:
        return distribute_tensor(value.clone(), mesh, [Replicate(), Shard(0)])

    whole = [torch.nn.Parameter(value.clone()) for value in values]
    shares = [torch.nn.Parameter(spread(value)) for value in values]
    theirs = torch.optim.Muon(whole, lr=0.1, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    ours = Muon([{"params": shares, "weight_decay": 0.1, "lr": 0.1}], 0.9, torch.bfloat16)
    optimizers = theirs, ours
    for _ in range(4):
        for a, b in zip(whole, shares):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = spread(a.grad)
        for optimizer in optimizers:
            optimizer.step()
    moved = max((a - value).abs().max().item() for a, value in zip(whole, values))
    error = max((b.full_tensor() - a).abs().max().item() for a, b in zip(whole, shares))
    return {"error": error, "moved": moved}


def main() -> None:
    torch.set_num_threads(1)
    with joined("cuda" if "cuda" in sys.argv else "cpu") as processes:

        def show(name: str, result: dict[str, Any]) -> None:
            if processes.main:
                print(json.dumps({"name": name, **result}), flush=True)

        if processes.count == 4:
            shared = ParallelConfig(sharding="hybrid", processes_per_copy=2)
            show("hybrid", gradients(processes, "transformer", "causal", True, 2, shared))
            show("muon", muon(processes, (2, 2)))
            return
        full = ParallelConfig()
        for kind, wiring in KINDS:
            for tied, accumulate in SPREAD:
                name = f"{kind}-{wiring}{'-tied' if tied else ''}-{accumulate}"
                show(name, gradients(processes, kind, wiring, tied, accumulate, full))
        others = {
            "replicate": ParallelConfig(sharding="replicate"),
            "hybrid": ParallelConfig(sharding="hybrid", processes_per_copy=1),
            "gathered": ParallelConfig(reshard_after_forward=False),
            "checkpointing": ParallelConfig(activation_checkpointing=True),
            "each": ParallelConfig(reduce_each_micro_batch=True),
        }
        for name, parallel in others.items():
            for tied in (False, True):
                show(
                    f"{name}{'-tied' if tied else ''}",
                    gradients(processes, "transformer", "causal", tied, 2, parallel),
                )
        for kind, wiring in KINDS:
            for tied in ROUNDED[kind]:
                name = f"bfloat16-{kind}-{wiring}{'-tied' if tied else ''}"
                show(name, gradients(processes, kind, wiring, tied, 2, full, dtype="bfloat16"))
        show("muon-shares", muon(processes, (1, processes.count)))
        show("muon-copies", muon(processes, (processes.count, 1)))
        if "compile" in sys.argv:
            checkpointing = ParallelConfig(activation_checkpointing=True)
            show("compile", gradients(processes, "transformer", "causal", True, 2, checkpointing, compile=True))
        dist.barrier()


if __name__ == "__main__":
    main()
