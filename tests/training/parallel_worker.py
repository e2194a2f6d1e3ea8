"""Results of several processes compared with those of one: JSON lines, read by test_parallel.py."""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partialmethod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headstart.data.batches import Batch
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.objective.inputs import Registers, StepInputs, count_targets
from headstart.objective.objective import Objective
from headstart.objective.walk import walk_step
from headstart.training.auxiliary.base import StepAuxiliaries
from headstart.training.auxiliary.registers import RegisterConfig
from headstart.training.auxiliary.token_order import TokenOrderConfig
from headstart.training.config import RunConfig
from headstart.training.muon import Muon
from headstart.training.parallel import ParallelConfig, materialize, parallelize, whole_model
from headstart.training.processes import Processes, joined
from tests.models import WIRINGS
from tests.reference import joint_step

HEADS, LENGTH, ROWS = 3, 12, 4
KINDS = [wiring for wiring in WIRINGS if wiring[0] != "medusa-own"]
SPREAD = [(False, 1), (True, 2)]
"""(tied, micro-batches): a case takes a second."""
USUAL = [(*kind, *SPREAD[1 - i % 2]) for i, kind in enumerate(KINDS)]
RARE = [(*kind, *SPREAD[i % 2]) for i, kind in enumerate(KINDS)]
"""Cases of slow tests: every head kind and wiring with the other way of spreading."""
ROUNDED = [
    ("transformer", "causal", False), ("transformer", "causal", True), ("linear", "anticausal", False),
    ("replicated", "parallel", False), ("replicated", "parallel", True), ("medusa", "parallel", False),
    ("stern", "parallel", True), ("sequential", "causal", True),
]  # fmt: skip
"""Those in bfloat16, and tied: dtypes are a matter of where parameters lie, not of what hangs on what."""


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
    processes: Processes, kind: str, wiring: str, tied: bool, accumulate: int, parallel: ParallelConfig,
    dtype: str = "float32", compile: bool = False, methods: bool = False, first_weights: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The largest relative error of any parameter's gradient against one process's joint autograd, and the collectives.

    Twice in a row, since a second step meets the state that the first one leaves. With `methods`, token order and
    registers are learnt too, and the reference is one process's walk.
    """
    config = ModelConfig(
        vocab_size=37, dim=16, layers=2 + HEADS * (kind == "transformer"), attention_heads=2, context=LENGTH,
        heads=HEADS, head_kind=kind.removesuffix("-own"), shared="-own" not in kind, wiring=wiring, tied=tied,
    )  # fmt: skip
    weight = 0.5 if methods else 0.0
    run = RunConfig(1, model=config, token_order=TokenOrderConfig(weight), registers=RegisterConfig(weight, share=0.5))
    with torch.device("meta"):
        model, alone = Transformer(config), Transformer(config)
        for auxiliary in run.auxiliaries:
            auxiliary.add_parameters(model)
            auxiliary.add_parameters(alone)
    mesh = processes.mesh(parallel.mesh_shape(processes.count, processes.per_node))
    sums = parallelize(model, mesh, parallel, compile=compile, dtype=dtype)
    materialize(model, processes.device, seed=0)
    materialize(alone, processes.device, seed=0)
    worst, counts = 0.0, {}
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        text = torch.randint(37, (ROWS * accumulate, LENGTH + HEADS), generator=generator)
        targets = torch.stack([text[:, k : k + LENGTH] for k in range(1, HEADS + 1)], -1)
        targets[torch.rand(targets.shape, generator=generator) < 0.3] = -100  # ragged counts over processes
        places = torch.arange(2 * len(text)).view(-1, 2)
        batch = Batch(text[:, :LENGTH], targets, torch.zeros_like(text[:, :LENGTH]), text[:, LENGTH:], places)
        whole = StepInputs.of_batch(batch, config.ahead, attention_within_documents=False)
        for auxiliary in run.auxiliaries:
            whole = auxiliary.inputs(whole, step)
        mine = torch.arange(len(text)).view(accumulate, processes.count, -1)[:, processes.rank]
        batches = [rows_of(whole, rows).to(processes.device) for rows in mine]
        whole = whole.to(processes.device)
        valid = count_targets(whole.targets)
        model.zero_grad()
        alone.zero_grad()
        autocast = torch.autocast(processes.device.type, torch.bfloat16, enabled=dtype == "bfloat16")
        both = StepAuxiliaries(run.auxiliaries, alone, [whole], valid[0], Processes(processes.device))
        with autocast:
            step_alone = walk_step if methods else joint_step
            reference = step_alone(alone, whole, valid, Objective(auxiliaries=both.losses)).sums
        spread = StepAuxiliaries(run.auxiliaries, model, batches, valid[0], processes)
        total = torch.zeros(HEADS, device=processes.device)
        # What is compiled is not, under a mode that watches it.
        with nullcontext(Collectives()) if compile else Collectives() as collectives:
            for i, batch in enumerate(batches):
                with autocast, sums.micro_batch(last=i == accumulate - 1, losses=HEADS):
                    total += walk_step(model, batch, valid, Objective(auxiliaries=spread.losses)).sums
        counts = dict(collectives.counts)
        squares = []
        expected = dict(alone.named_parameters())
        assert expected.keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor) and parameter.grad is not None, name
            assert parameter.grad.dtype == torch.float32
            share = distribute_tensor(
                expected[name].grad, parameter.device_mesh, parameter.placements, src_data_rank=None
            )
            theirs = share.to_local()
            squares.append(torch.stack([(parameter.grad.to_local() - theirs).square().sum(), theirs.square().sum()]))
        error, size = processes.sum(torch.stack(squares)).T
        losses = [(processes.sum(total) - reference).abs() / reference]
        losses += [torch.tensor([abs(ours / both.means()[name] - 1)]) for name, ours in spread.means().items()]
        worst = max(worst, (error / size).sqrt().max().item())
        worst = max(worst, torch.cat(losses).max().item() if dtype == "float32" else 0.0)
    result = {"error": worst, "collectives": counts}
    if compile:
        result["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if first_weights:
        copy, first = whole_model(model, torch.float32, keep=True), alone.state_dict()
        assert copy is not None
        same = [torch.equal(value, first[name].cpu()) for name, value in copy.state_dict().items()]
        result["same_first_weights"] = all(same) and len(same) == len(first)
    return result


def rows_of(batch: StepInputs, rows: torch.Tensor) -> StepInputs:
    registers = None if batch.registers is None else Registers(*(each[rows] for each in vars(batch.registers).values()))
    parts = {name: value[rows] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return replace(batch, **parts, registers=registers)


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
            show("hybrid", gradients(processes, "transformer", "causal", True, 2, shared, first_weights=True))
            show("muon", muon(processes, (2, 2)))
            return
        full = ParallelConfig()
        for kind, wiring, tied, accumulate in [*USUAL, *(RARE if "rare" in sys.argv else [])]:
            name = f"{kind}-{wiring}{'-tied' if tied else ''}-{accumulate}"
            show(name, gradients(processes, kind, wiring, tied, accumulate, full, first_weights=True))
        others = {
            "replicate": ParallelConfig(sharding="replicate"),
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
        for kind, wiring, tied in ROUNDED:
            name = f"bfloat16-{kind}-{wiring}{'-tied' if tied else ''}"
            show(name, gradients(processes, kind, wiring, tied, 2, full, dtype="bfloat16"))
        show("methods", gradients(processes, "transformer", "parallel", True, 2, full, methods=True))
        show("muon-shares", muon(processes, (1, processes.count)))
        show("muon-copies", muon(processes, (processes.count, 1)))
        if "compile" in sys.argv:
            if processes.device.type == "cpu":
                # Traced and differentiated, but not made C++ of, which takes 40 s; test_training_loop.py does that.
                torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="aot_eager")
            checkpointing = ParallelConfig(activation_checkpointing=True)
            show("compile", gradients(processes, "transformer", "causal", True, 2, checkpointing, compile=True))
        dist.barrier()


if __name__ == "__main__":
    main()
