"""Count the memory that a piece of code holds at once, tensor by tensor: the same on every machine."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors made inside it and still alive, and keeps the peak and the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[weakref.ref[Any], int] = {}
        self.now = self.peak = self.largest = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:  # which lie nowhere
                self.largest = max(self.largest, tensor.numel())
                storage = tensor.untyped_storage()
                # A view or a result in place is no new memory.
                if id(storage) not in before and weakref.ref(storage) not in self.live:
                    self.live[weakref.ref(storage, self._died)] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
        return out

    def _died(self, reference: weakref.ref[Any]) -> None:
        self.now -= self.live.pop(reference)
