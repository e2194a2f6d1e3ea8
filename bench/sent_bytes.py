"""How much a step of several processes sends, counted from its collectives."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class SentBytes(TorchDispatchMode):
    """Adds up what this process has to send to the others for gathers and sums, if they form a ring."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.sent, self._count = 0, count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.sent += self._bytes(func._schema.name.split("::")[1], args)
        return func(*args, **(kwargs or {}))

    def _bytes(self, name: str, args: Any) -> int:
        if name in ("_allgather_base_", "_reduce_scatter_base_"):
            # Each process sends every other one a share: the whole less its own.
            whole, share = sorted((_size(args[0]), _size(args[1])), reverse=True)
            return whole - share
        if name in ("allreduce_", "all_reduce"):
            return 2 * (self._count - 1) * _size(args[0]) // self._count
        return 0


def _size(tensors: Any) -> int:
    """Bytes of a tensor or of a list of them."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_size, tensors))
