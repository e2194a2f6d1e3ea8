"""Linear maps laid out for reading: what makes a pass cost the bytes of the weights and little more."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from headstart.decoding.kernels import cpu
from headstart.decoding.kernels.cpu_modules import NativeBlock, NativeLinear, NativeNorm, NativeSwiGLU, NativeTrunk
from headstart.decoding.kernels.int8 import Int8Linear, Quantize
from headstart.errors import UsageError
from headstart.hardware import dtype_on
from headstart.model.heads import MedusaResiduals, SternResiduals, Unembedding
from headstart.model.layers import Block, RMSNorm
from headstart.model.transformer import Transformer

MakeLinear = Callable[[Tensor, "Tensor | None"], nn.Module]


class PackedLinear(nn.Module):
    """y = x W^T + b with the weight in oneDNN's blocked layout, for inference on a CPU.

    Reading the plain layout, a product of few rows reaches a third of the memory bandwidth; the blocked one reaches
    nearly all of it (docs/lab-notes.md). Rows of the result do not depend on how many there are.
    """

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None, rows: int) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach(), rows)
        self.bias = None if bias_N is None else bias_N.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class PackedResiduals(nn.Module):
    """`MedusaResiduals` or `SternResiduals` for decoding: the maps of all heads in one product."""

    def __init__(self, residuals: MedusaResiduals | SternResiduals, linear: MakeLinear) -> None:
        super().__init__()
        medusa = isinstance(residuals, MedusaResiduals)
        every = residuals.maps if isinstance(residuals, MedusaResiduals) else residuals.outputs
        maps = [cast(nn.Linear, x) for x in every]
        bias = torch.cat([x.bias.detach() for x in maps]) if medusa else None
        self.maps = linear(torch.cat([x.weight.detach() for x in maps]), bias)
        self.hidden = linear(residuals.hidden.weight.detach(), None) if isinstance(residuals, SternResiduals) else None

    def forward(self, x: Tensor) -> Tensor:
        """Normed latents (..., D) -> those of heads 2..n, (..., n-1, D)."""
        if self.hidden is None:
            changes = nn.functional.silu(self.maps(x))
        else:
            changes = self.maps(nn.functional.relu(self.hidden(x)))
        return x[..., None, :] + changes.unflatten(-1, (-1, x.shape[-1]))


class PackedUnembedding(nn.Module):
    """`Unembedding` for decoding: the same norm, each head's matrix packed; those of replicated heads 2..n, which read
    the same, in one."""

    def __init__(self, unembedding: Unembedding, linear: MakeLinear) -> None:
        super().__init__()
        self.norm: nn.Module = unembedding.norm
        weights = [w.detach() for w in unembedding.weights]
        self.copies = len(weights)
        self.first = linear(weights[0], None)
        residuals = unembedding.residuals
        self.residuals = None if residuals is None else PackedResiduals(residuals, linear)
        self.others: nn.Module = self.first
        if self.copies > 1:
            apart = residuals is not None
            self.others = (
                nn.ModuleList(linear(w, None) for w in weights[1:]) if apart else linear(torch.cat(weights[1:]), None)
            )
        self.vocab_size = weights[0].shape[0]

    def forward(self, z: Tensor, k: int = 1) -> Tensor:
        """Latent (..., D) of head k -> logits (..., V)."""
        x = self.norm(z)
        if k == 1:
            return self.first(x)
        if self.residuals is not None:
            x = self.residuals(x)[..., k - 2, :]
        if self.copies == 1:
            return self.first(x)
        if isinstance(self.others, nn.ModuleList):
            return self.others[k - 2](x)
        return self.others(x).unflatten(-1, (-1, self.vocab_size))[..., k - 2, :]

    def drafts(self, latents: list[Tensor]) -> Tensor:
        """Latents (S, 1, D) of heads 2..K -> their logits (S, K-1, V), in one product where they share a matrix."""
        if self.residuals is not None:  # all of them read the trunk's latent
            x_SKD = self.residuals(self.norm(latents[0]))[:, 0, : len(latents)]
            if isinstance(self.others, nn.ModuleList):
                return torch.cat([head(x_SKD[:, i : i + 1]) for i, head in enumerate(self.others[: len(latents)])], 1)
            return self.first(x_SKD)
        if self.copies == 1:
            return self.first(self.norm(torch.cat(latents, dim=1)))
        # All replicated heads read the same latent.
        logits = self.others(self.norm(latents[0])).unflatten(-1, (-1, self.vocab_size))  # (S, 1, n-1, V)
        return logits[:, 0, : len(latents)]


class _PlainLinear(nn.Module):
    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        super().__init__()
        self.weight = weight_NK.detach()
        self.bias = None if bias_N is None else bias_N.detach()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def decoding_dtype(model: Transformer, quantize: Quantize | None = None) -> torch.dtype:
    """What a model whose weights are stored as they now are decodes in best: that, but float32 on a CPU that would
    multiply it in software (fp16 on every CPU), and around int8 products. Widening changes no weight."""
    weight = model.trunk.embedding.weight
    if quantize:
        return torch.float32
    fast = (torch.float32, torch.float64, getattr(torch, dtype_on("cpu")))
    return weight.dtype if weight.device.type != "cpu" or weight.dtype in fast else torch.float32


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN takes packed weights of this type."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def can_use_native(model: Transformer) -> bool:
    """Whether the compiled kernels take this model: on a CPU they are for, in widths they can read."""
    weight = model.trunk.embedding.weight
    config = model.config
    if weight.device.type != "cpu" or weight.dtype not in cpu.SOURCES:
        return False
    return config.dim % 16 == 0 and config.hidden % 2 == 0 and cpu.kernels(weight.dtype) is not None


def can_use_gpu_kernels(model: Transformer) -> bool:
    """Whether the kernels for GPUs (`decoding/gpu`) take this model: blocks like Llama's in bf16, where Triton is."""
    weight, config = model.trunk.embedding.weight, model.config
    if weight.device.type != "cuda" or weight.dtype != torch.bfloat16 or not config.llama_blocks:
        return False
    width = config.dim_per_head
    return width >= 16 and width & (width - 1) == 0 and importlib.util.find_spec("triton") is not None


def exact_rows(model: Transformer) -> float:
    """Up to how many rows of all windows together a pass gives a row's bits from that row and its past alone, whatever
    shape it has: infinite where `is_row_exact`, 0 where shapes matter."""
    if is_row_exact(model):
        return math.inf
    if type(getattr(model.unembedding, "first", None)).__name__ != "GpuLinear":
        return 0
    from headstart.decoding.kernels.cuda.launch import MOST

    return MOST


def is_row_exact(model: Transformer) -> bool:
    """Whether every step of a pass over `model` gives a row's bits from that row and its past alone: all products and
    the attention are the compiled ones. Shapes then do not matter to exactness."""
    first = getattr(model.unembedding, "first", None)
    config = model.config
    # Torch's GELU rounds the ends of a tensor otherwise than its middle, and so may its norms; windows need masks.
    ours = config.activation == "silu" and not config.norm_offset and not config.windowed
    return isinstance(first, NativeLinear) and config.dim_per_head % 16 == 0 and ours


def is_quantized(model: Transformer) -> bool:
    """Whether the products of `model` (in decoding form) are of int8."""
    first = getattr(model.unembedding, "first", None)
    return isinstance(first, Int8Linear) or (isinstance(first, NativeLinear) and first.packed.dtype == torch.int8)


@torch.no_grad()
def pack(
    model: Transformer, rows: int | None = None, compiled: bool = True, quantize: Quantize | None = None
) -> Transformer:
    """Turns `model` into its decoding form, in place: linear maps packed where that is possible, no gradients.

    `rows` is the number of rows a pass usually has (default: the number of heads); `compiled=False` leaves the compiled
    kernels out, which tests compare. `quantize="int8"` makes all linear maps and unembeddings products of int8
    (`decoding/kernels/int8.py`), for float32 models on a CPU; the model is then another one, close to it. Without it
    the model still computes the same function of any shape. It can no longer be trained or saved.

    Raises UsageError for a model that cannot be quantized.
    """
    rows = rows or model.config.heads
    weight = model.trunk.embedding.weight
    if quantize and (weight.device.type != "cpu" or weight.dtype != torch.float32):
        raise UsageError(
            f"quantize {quantize} is for CPUs, with all else in float32; here is {weight.dtype} on {weight.device}: "
            "leave the dtype out, or decode without quantize"
        )
    model.requires_grad_(False)
    if compiled and can_use_gpu_kernels(model):
        return _pack_for_gpu(model)
    fast = compiled and can_use_native(model)
    linear = _maker(model, rows, fast, quantize)
    model.unembedding = PackedUnembedding(model.unembedding, linear)  # type: ignore[assignment]
    # A list of linear maps too would keep their weights to the end: the model twice.
    for module in [module for module in model.modules() if not isinstance(module, nn.Linear)]:
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, linear(child.weight, child.bias))
            elif fast and isinstance(child, RMSNorm) and _native_norm(child):
                setattr(module, name, NativeNorm(child))
    if fast and model.config.activation == "silu":
        for module in list(model.modules()):
            if isinstance(module, Block):
                module.mlp = NativeSwiGLU(module.mlp, weight.dtype)  # type: ignore[assignment]
    if fast and weight.dtype == torch.float32 and model.config.llama_blocks:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, Block):
                    setattr(module, name, NativeBlock(child))
        if not model.config.scaled_embedding:
            model.trunk = NativeTrunk(model.trunk)  # type: ignore[assignment]
    return model.eval()


def _pack_for_gpu(model: Transformer) -> Transformer:
    from headstart.decoding.kernels.cuda.blocks import GpuBlock, GpuLinear, GpuNorm

    model.unembedding = PackedUnembedding(model.unembedding, GpuLinear)  # type: ignore[assignment]
    for module in [module for module in model.modules() if not isinstance(module, nn.Linear)]:
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, GpuLinear(child.weight, child.bias))
            elif isinstance(child, RMSNorm):
                setattr(module, name, GpuNorm(child))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Block):
                setattr(module, name, GpuBlock(child))
    return model.eval()


def _native_norm(norm: RMSNorm) -> bool:
    """Whether the kernel computes it: widths of 16 at a time, and 1 + weight where that is not rounded to bf16."""
    return norm.weight.numel() % 16 == 0 and not (norm.offset and norm.weight.dtype == torch.bfloat16)


def _maker(model: Transformer, rows: int, fast: bool, quantize: Quantize | None) -> MakeLinear:
    weight = model.trunk.embedding.weight
    if fast:
        return lambda weight, bias: NativeLinear(weight, bias, quantize)
    if quantize:
        return Int8Linear
    if can_pack(weight.device, weight.dtype):
        return lambda weight, bias: PackedLinear(weight, bias, rows)
    return _PlainLinear
