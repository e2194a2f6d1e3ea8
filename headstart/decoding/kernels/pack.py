"""Turn a model into its decoding form: linear maps laid out so that a pass costs little more than reading them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from headstart.decoding.kernels import cpu
from headstart.decoding.kernels.backend import Backend, replace_children
from headstart.decoding.kernels.blocks import BlockEmbedding, Quantize, Weight, in_blocks, rows_of
from headstart.decoding.kernels.cpu_backend import CompiledBackend
from headstart.decoding.kernels.cuda_backend import CudaBackend
from headstart.decoding.kernels.torch_backend import TorchBackend
from headstart.errors import UsageError
from headstart.hardware import dtype_on
from headstart.model.draft_vocabulary import widen
from headstart.model.heads import Residuals
from headstart.model.layers import RMSNorm
from headstart.model.transformer import Transformer, Unembedding

BACKENDS: tuple[type[Backend], ...] = (CudaBackend, CompiledBackend, TorchBackend)
"""All backends, the preferred ones first; the last one supports every model."""
MakeLinear = Callable[[Weight, "Tensor | None"], nn.Module]


class PackedResiduals(nn.Module):
    """Compute `Residuals` with the maps of all heads in one product."""

    def __init__(self, residuals: Residuals, linear: MakeLinear) -> None:
        super().__init__()
        maps = [cast(nn.Linear, x) for x in residuals.head_maps]
        bias = None if maps[0].bias is None else torch.cat([x.bias.detach() for x in maps])
        self.maps = linear(torch.cat([x.weight.detach() for x in maps]), bias)
        self.hidden = None if residuals.hidden is None else linear(residuals.hidden.weight.detach(), None)
        self.silu = residuals.silu

    def forward(self, x: Tensor) -> Tensor:
        """Return the latents (..., n-1, D) of heads 2..n from normed latents (..., D)."""
        changes = self.maps(x if self.hidden is None else nn.functional.relu(self.hidden(x)))
        if self.silu:
            changes = nn.functional.silu(changes)
        return x[..., None, :] + changes.unflatten(-1, (-1, x.shape[-1]))


class PackedUnembedding(nn.Module):
    """Compute `Unembedding` with packed matrices; replicated heads 2..n read the same latent and share one product.

    With a draft vocabulary, heads that share the unembedding have a packed copy of its rows.
    """

    def __init__(self, unembedding: Unembedding, linear: MakeLinear) -> None:
        super().__init__()
        self.norm: nn.Module = unembedding.norm
        self.draft_norm = unembedding.draft_norm
        weights: list[Weight] = list(unembedding.weights)
        self.copies = len(weights)
        self.first = linear(weights[0], None)
        residuals = unembedding.residuals
        self.residuals = None if residuals is None else PackedResiduals(residuals, linear)
        self.vocab_size = unembedding.vocab_size
        self.d2t: Tensor | None
        self.register_buffer("d2t", unembedding.d2t)
        """The draft vocabulary of heads 2..n (None: all tokens)."""
        self.others: nn.Module = self.first
        if self.copies == 1 and self.d2t is not None:
            self.others = linear(rows_of(weights[0], self.d2t), None)
        if self.copies > 1:
            others = [cast(Tensor, w).detach() for w in weights[1:]]
            apart = residuals is not None
            self.others = nn.ModuleList(linear(w, None) for w in others) if apart else linear(torch.cat(others), None)
        self.drafted = self.vocab_size if self.d2t is None else len(self.d2t)

    def forward(self, z: Tensor, k: int = 1) -> Tensor:
        """Return the logits (..., V) of head k for its latent (..., D), as `Unembedding` does."""
        if k == 1:
            return self.first(self.norm(z))
        logits = self.draft(z, k)
        return logits if self.d2t is None else widen(logits, self.d2t, self.vocab_size, -math.inf)

    def draft(self, z: Tensor, k: int) -> Tensor:
        """Return the logits of head k > 1 for its latent (..., D): (..., V), or (..., Vd) over its draft vocabulary."""
        x = self.norm(z) if self.draft_norm is None else self.draft_norm(z)
        if self.residuals is not None:
            x = self.residuals(x)[..., k - 2, :]
        if self.copies <= 2 and not isinstance(self.others, nn.ModuleList):  # one matrix
            return self.others(x)
        if isinstance(self.others, nn.ModuleList):
            return self.others[k - 2](x)
        return self.others(x).unflatten(-1, (-1, self.drafted))[..., k - 2, :]

    def drafts(self, latents: list[Tensor]) -> Tensor:
        """Return the logits (S, K-1, V) of heads 2..K for their latents (S, 1, D); a shared matrix is one product.

        With a draft vocabulary they are (S, K-1, Vd).
        """
        if self.residuals is not None:  # all heads read the trunk's latent
            x_SKD = self.residuals(self.norm(latents[0]))[:, 0, : len(latents)]
            if isinstance(self.others, nn.ModuleList):
                return torch.cat([head(x_SKD[:, i : i + 1]) for i, head in enumerate(self.others[: len(latents)])], 1)
            return self.others(x_SKD)
        if self.copies == 1:
            return self.others(self.norm(torch.cat(latents, dim=1)))
        # All replicated heads read the same latent.
        logits = self.others(self.norm(latents[0])).unflatten(-1, (-1, self.drafted))  # (S, 1, n-1, V)
        return logits[:, 0, : len(latents)]


def decoding_dtype(model: Transformer, quantize: Quantize | None = None) -> torch.dtype:
    """Return the dtype in which a model with these stored weights decodes best.

    It is the stored dtype, except float32 around quantized products and on a CPU that would multiply the stored dtype
    in software, as every CPU does with fp16. Widening changes no weight.
    """
    if quantize:
        return torch.float32
    fast = (torch.float32, torch.float64, getattr(torch, dtype_on("cpu")))
    return model.dtype if model.device.type != "cpu" or model.dtype in fast else torch.float32


@torch.no_grad()
def pack(
    model: Transformer, rows: int | None = None, compiled: bool = True, quantize: Quantize | None = None
) -> Transformer:
    """Turn `model` into its decoding form in place, on the first backend that supports it.

    The model computes the same function of any shape, but can no longer be trained or saved. `backend_of` returns its
    backend. Matrices that `put_blocks` replaced stay in blocks; heads 2..n of such a model are put in blocks of 8 bits.

    Args:
        model: the model, whose weights are packed one after another.
        rows: the usual number of rows in a pass (None: the number of heads).
        compiled: whether to use the compiled kernels and Triton's; tests compare both.
        quantize: "q4" or "q8" puts all matrices in blocks of 4 or 8 bits and quantizes activations to 8 bits
            (`kernels/blocks.py`), for float32 models on a CPU. Embeddings and unembeddings take 8 bits in both. The
            result is another model, close to this one.

    Raises:
        UsageError: the model cannot be quantized.
    """
    if quantize and (model.device.type != "cpu" or model.dtype != torch.float32):
        raise UsageError(
            f"quantize {quantize} is for float32 models on CPUs; this one is {model.dtype} on {model.device}: "
            "leave the dtype out, or decode without quantize"
        )
    model.requires_grad_(False)
    backends = BACKENDS if compiled else (TorchBackend,)
    form = quantize or (None if isinstance(model.trunk.embedding.weight, Tensor) else "blocks")
    backend = next(kind for kind in backends if kind.supports(model))(model, rows or model.config.heads, form)
    _pack_vocabulary(model, backend, quantize)
    # Drafts change no output, so heads 2..n on blocks of a file take blocks too: they are read as fast.
    others: list[nn.Module] = list(model.heads)[1:] if form == "blocks" else []
    drafting = {module for head in others for module in head.modules()}

    def linear(map_: nn.Linear) -> nn.Module:
        return backend.linear(in_blocks(map_.weight, "q8" if map_ in drafting else quantize), map_.bias)

    replace_children(model, nn.Linear, linear)
    replace_children(model, RMSNorm, backend.norm)
    backend.replace_blocks(model)
    model.backend = backend  # type: ignore[assignment]
    return model.eval()


def _pack_vocabulary(model: Transformer, backend: Backend, quantize: Quantize | None) -> None:
    """Pack embedding and unembedding, with 8 bits if quantized; blocks that both use are stored once.

    On blocks of a file, what only heads 2..n use takes 8 bits.
    """
    config, stored = model.config, cast(Weight, model.trunk.embedding.weight)
    first = model.unembedding.weights[0]

    def linear(weight: Weight, bias: Tensor | None) -> nn.Module:
        narrow = quantize or (backend.form == "blocks" and weight is not first)
        return backend.linear(in_blocks(weight, "q8" if narrow else None), bias)

    unembedding = PackedUnembedding(model.unembedding, linear)
    model.unembedding = unembedding  # type: ignore[assignment]
    if quantize or not isinstance(stored, Tensor):
        factor = config.dim**0.5 if config.scaled_embedding else 1
        matrix = unembedding.first if config.tied else linear(stored, None)
        model.trunk.embedding = BlockEmbedding(matrix, factor)  # type: ignore[assignment]


def multiplies_blocks(device: str) -> bool:
    """Say whether there are compiled kernels for weights in blocks, without which decoding with them is slow."""
    return device == "cpu" and cpu.kernels(torch.float32) is not None
