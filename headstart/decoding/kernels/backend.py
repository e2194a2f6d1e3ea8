"""The interface of a kernel backend: the modules of a packed model, and the bits that they guarantee."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from headstart.decoding.kernels.blocks import Weight
from headstart.model.layers import RMSNorm
from headstart.model.transformer import Transformer

Child = TypeVar("Child", bound=nn.Module)


class Backend:
    """Make the modules that run a packed model, and say when a row's bits depend on its shape.

    `pack` takes the first backend of its registry that supports a model, and sets the instance as `model.backend`.

    Args:
        model: the model that is packed, not yet changed.
        rows: the usual number of rows in a pass.
        form: the form of quantized weights: "q4", "q8", or "blocks" for those of a file (None: not quantized).
    """

    exact_rows: float = 0
    """The most rows of a pass, all windows together, up to which a row's bits depend on the row and its past alone:
    infinite where that always holds, 0 where every shape has bits of its own."""
    compiled_cache = False
    """True if the cache holds keys in blocks of 16 positions, for the compiled attention."""

    def __init__(self, model: Transformer, rows: int, form: str | None) -> None:
        self.rows, self.form = rows, form

    @classmethod
    def supports(cls, model: Transformer) -> bool:
        """Say whether this machine and this backend can run `model`."""
        raise NotImplementedError

    def linear(self, weight: Weight, bias_N: Tensor | None) -> nn.Module:
        """Return a module that computes x W^T + b; with a weight in blocks, its method `rows` returns rows of W."""
        raise NotImplementedError

    def norm(self, norm: RMSNorm) -> nn.Module:
        """Return a module that computes `norm`."""
        return norm

    def replace_blocks(self, model: Transformer) -> None:
        """Replace whole blocks of `model`, whose linear maps and norms are those of this backend by now."""

    @property
    def row_exact(self) -> bool:
        """True if a row's bits depend on the row and its past alone, in passes, prompts and trees of any shape."""
        return self.exact_rows == math.inf

    def needs_fixed_shapes(self, rows: int, tree: bool = False) -> bool:
        """Say whether exact decoding must give its passes one shape.

        Args:
            rows: the most rows of a pass, all windows together.
            tree: whether windows are trees, which torch's attention computes unless the backend is row-exact.
        """
        return not self.row_exact if tree else rows > self.exact_rows


def backend_of(model: Transformer) -> Backend:
    """Return the backend that runs `model`: the one `pack` chose, or one without guarantees for an unpacked model."""
    backend = getattr(model, "backend", None)
    return backend if isinstance(backend, Backend) else Backend(model, model.config.heads, None)


def replace_children(model: nn.Module, kind: type[Child], make: Callable[[Child], nn.Module]) -> None:
    """Replace every child module of type `kind`, wherever it is in `model`, by what `make` returns for it."""
    # Children are never visited as parents: a list of linear maps would keep their weights in memory, the model twice.
    for module in [module for module in model.modules() if not isinstance(module, kind)]:
        for name, child in list(module.named_children()):
            if isinstance(child, kind):
                setattr(module, name, make(child))
