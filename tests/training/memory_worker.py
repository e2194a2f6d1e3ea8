"""Peak bytes of a process among several, counted and estimated: JSON lines, read by test_memory_estimate.py."""

from __future__ import annotations

import json
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headstart.data.batches import Batch
from headstart.model.config import ModelConfig
from headstart.training.config import BatchConfig, RunConfig
from headstart.training.memory import estimate, layout
from headstart.training.new_model import NewModel
from headstart.training.parallel import ParallelConfig
from headstart.training.processes import Processes, joined
from headstart.training.step import Learner

# Mostly weights, so that an error in what is shared and gathered shows.
MODEL = ModelConfig(vocab_size=256, dim=160, layers=5, attention_heads=4, context=32, heads=2)
CASES = {
    "shared": (1, ParallelConfig()),
    "shared, accumulated": (3, ParallelConfig()),
    "shared, reduced each time": (3, ParallelConfig(reduce_each_micro_batch=True)),
    "kept gathered": (1, ParallelConfig(reshard_after_forward=False)),
    "replicated": (1, ParallelConfig(sharding="replicate")),
}


class LiveStorages(TorchDispatchMode):
    """A counter like `LiveTensors` that reads every size at each operation, because FSDP frees weights by resizing."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, weakref.ref[Any]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((out, args)):
            tensor = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
            if type(tensor) in (torch.Tensor, torch.nn.Parameter):
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = weakref.ref(storage)
        alive = {key: storage for key, reference in self.live.items() if (storage := reference()) is not None}
        self.live = {key: self.live[key] for key in alive}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive.values()))
        return out


def counted(config: RunConfig, processes: Processes) -> int:
    micro_batches, rows = config.micro_batches(processes.count)
    text = torch.randint(MODEL.vocab_size, (rows, config.length, MODEL.heads))
    batch = Batch(text[..., 0], text, torch.zeros(rows, config.length).long())
    with LiveStorages() as live:
        learner = Learner(NewModel.build(config, processes), config, processes)
        for _ in range(2):
            live.peak = 0
            learner.update([learner.inputs(batch, 0)] * micro_batches, [1.0] * MODEL.heads, 1e-3)
    return live.peak


with joined("cpu") as here:
    for name, (accumulate, parallel) in CASES.items():
        batch = BatchConfig(rows=4, accumulate=accumulate)
        config = RunConfig(steps=2, dtype="bfloat16", model=MODEL, batch=batch, parallel=parallel)
        peak = counted(config, here)
        if here.main:
            expected = estimate(config, layout(config, here.count), "cpu").peak
            print(json.dumps({"case": name, "counted": peak, "estimate": expected}), flush=True)
