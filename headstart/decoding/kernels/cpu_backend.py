"""The backend of compiled kernels for CPUs: bf16 and fp32 models, the latter also with weights in blocks."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from headstart.decoding.cache import CachedAttention, CompiledAttention
from headstart.decoding.kernels import cpu
from headstart.decoding.kernels.backend import Backend, replace_children
from headstart.decoding.kernels.blocks import BlockEmbedding, Weight, shape_of
from headstart.decoding.kernels.cpu.weights import pack_blocks, pack_weight
from headstart.model.attention import causal_attention
from headstart.model.eagle import EagleBlock
from headstart.model.layers import Attend, Block, RMSNorm, SwiGLU
from headstart.model.transformer import Transformer, Trunk


class CompiledBackend(Backend):
    """Run products, norms and, where the model allows it, attention and whole blocks in compiled kernels."""

    def __init__(self, model: Transformer, rows: int, form: str | None) -> None:
        super().__init__(model, rows, form)
        config = model.config
        # Torch's GELU rounds the ends of a tensor otherwise than its middle, and so may torch's norms. The compiled
        # attention has no masks for windowed attention.
        exact = config.activation == "silu" and not config.norm_offset and not config.windowed
        self.compiled_cache = exact and config.dim_per_head % 16 == 0
        self.exact_rows = math.inf if self.compiled_cache else 0

    @classmethod
    def supports(cls, model: Transformer) -> bool:
        """Say whether this processor has the kernels for this model's dtype, and they can read its widths."""
        config = model.config
        if model.device.type != "cpu" or model.dtype not in cpu.SOURCES:
            return False
        return config.dim % 16 == 0 and config.hidden % 2 == 0 and cpu.kernels(model.dtype) is not None

    def linear(self, weight: Weight, bias_N: Tensor | None) -> nn.Module:
        """Return a `CompiledLinear`."""
        return CompiledLinear(weight, bias_N)

    def norm(self, norm: RMSNorm) -> nn.Module:
        """Return a `CompiledNorm` for widths in multiples of 16, unless 1 + weight would be rounded to bf16."""
        rounded = norm.offset and norm.weight.dtype == torch.bfloat16
        return norm if rounded or norm.weight.numel() % 16 else CompiledNorm(norm)

    def replace_blocks(self, model: Transformer) -> None:
        """Compile the gates of all blocks, and, in fp32, blocks like Llama's and the trunk in one call each."""
        dtype = model.dtype
        if model.config.activation == "silu":
            replace_children(model, SwiGLU, lambda mlp: CompiledSwiGLU(mlp, dtype))
        if dtype == torch.float32:
            replace_children(model, EagleBlock, CompiledBlock)
        if dtype == torch.float32 and model.config.llama_blocks:
            replace_children(model, Block, CompiledBlock)
            if not model.config.scaled_embedding:
                model.trunk = CompiledTrunk(model.trunk)  # type: ignore[assignment]


class CompiledLinear(nn.Module):
    """Compute x W^T + b: a row's bits depend on that row alone, and 8 rows cost little more than one.

    fp32 weights that bf16 holds exactly are stored in bf16. Weights in blocks are for fp32 activations, and the result
    is that of `BlockLinear`.
    """

    def __init__(self, weight: Weight, bias_N: Tensor | None) -> None:
        super().__init__()
        if isinstance(weight, tuple):
            self.shape, self.packed, dtype = shape_of(weight), pack_blocks(weight), torch.float32
        else:
            self.shape, self.packed, dtype = weight.shape, pack_weight(weight.detach()), weight.dtype
        self.bias = None if bias_N is None else bias_N.detach().float()
        self._linear = cpu.loaded_kernels(dtype).linear
        self._options = () if dtype == torch.bfloat16 else (cpu.STORED[self.packed.dtype],)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        x = x.contiguous()
        N, K = self.shape
        y = x.new_empty((*x.shape[:-1], N))
        bias = None if self.bias is None else self.bias.data_ptr()
        sizes = (x.numel() // K, N, K, torch.get_num_threads())
        self._linear(x.data_ptr(), self.packed.data_ptr(), bias, y.data_ptr(), *sizes, *self._options)
        return y

    def rows(self, which: Tensor) -> Tensor:
        """Return the rows (..., K) of W, stored in blocks, that `which` (...) names, in fp32."""
        which = which.contiguous()
        y = torch.empty((*which.shape, self.shape[1]))
        sizes = (which.numel(), self.shape[1])
        cpu.loaded_kernels(torch.float32).block_rows(self.packed.data_ptr(), which.data_ptr(), y.data_ptr(), *sizes)
        return y


class CompiledNorm(nn.Module):
    """Compute `RMSNorm` in one call."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight.detach() + 1 if norm.offset else norm.weight.detach(), norm.eps
        self._rms_norm = cpu.loaded_kernels(norm.weight.dtype).rms_norm

    def forward(self, x: Tensor) -> Tensor:
        """Return the RMS norm of each row."""
        x = x.contiguous()
        y = torch.empty_like(x)
        D = x.shape[-1]
        self._rms_norm(x.data_ptr(), self.weight.data_ptr(), y.data_ptr(), x.numel() // D, D, self.eps)
        return y


class CompiledSwiGLU(nn.Module):
    """Compute `SwiGLU` with its elementwise part in one call."""

    def __init__(self, mlp: SwiGLU, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up, self.down = mlp.gate_up, mlp.down
        self._silu_times = cpu.loaded_kernels(dtype).silu_times

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the MLP."""
        gate_up = self.gate_up(x)
        hidden = gate_up.shape[-1] // 2
        y = gate_up.new_empty((*gate_up.shape[:-1], hidden))
        self._silu_times(gate_up.data_ptr(), y.data_ptr(), y.numel() // hidden, hidden)
        return self.down(y)


class CompiledBlock(nn.Module):
    """Compute `Block` or `EagleBlock` in one call over a compiled cache; other attention runs the block itself.

    Each of some twenty operators costs a small model more than its arithmetic.
    """

    def __init__(self, block: Block | EagleBlock) -> None:
        super().__init__()
        self.block = block
        reads_tokens = isinstance(block, EagleBlock)
        attention, mlp = block.attention, block.mlp
        linears = [cast(CompiledLinear, x) for x in (attention.qkv, attention.out, mlp.gate_up, mlp.down)]
        biases = [None if x.bias is None else x.bias.data_ptr() for x in linears[:2]]
        first = block.hidden_norm if isinstance(block, EagleBlock) else block.attention_norm
        norms = [cast(CompiledNorm, x) for x in (first, block.mlp_norm, block.attention_norm)]
        self.weights = cpu.Block(
            *(x.packed.data_ptr() for x in linears),
            *biases,
            *(x.weight.data_ptr() for x in norms[: 2 + reads_tokens]),
            *(() if reads_tokens else (None,)),
            *(linears[1].shape[0], attention.heads, attention.kv_heads, attention.dim_per_head, linears[3].shape[1]),
            stored=(ctypes.c_int * 4)(*(cpu.STORED[x.packed.dtype] for x in linears)),
            eps=norms[0].eps,
        )
        self._call = cpu.loaded_kernels(torch.float32).block

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        attend: Attend = causal_attention,
        select: Callable[[Tensor], Tensor] | None = None,
        *,
        ahead_BTD: Tensor | None = None,
    ) -> Tensor:
        """Return the output of the block, as `Block.forward` does; `EagleBlock` also reads embeddings."""
        if not isinstance(attend, CompiledAttention):
            more = {} if ahead_BTD is None else {"ahead_BTD": ahead_BTD}
            return cast(Tensor, self.block(x_BTD, rotary, attend, select, **more))
        ahead_SWD = None if ahead_BTD is None else ahead_BTD.contiguous()
        x_SWD, cos, sin = x_BTD.contiguous(), rotary[0].contiguous(), rotary[1].contiguous()
        S, W, D = x_SWD.shape
        row_S, whole = attend.row_S, attend.whole
        y_SQD = x_SWD.new_empty(S, W if row_S is None else 1, D)
        self._call(
            self.weights,
            x_SWD.data_ptr(),
            None if ahead_SWD is None else ahead_SWD.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            y_SQD.data_ptr(),
            *whole.cache.addresses(attend.layer, whole.slots.start),
            whole.positions.data_ptr(),
            None if row_S is None else row_S.data_ptr(),
            None,
            whole.compiled_tree,
            *(S, W, whole.cache.capacity),
            torch.get_num_threads(),
        )
        return y_SQD


class CompiledTrunk(nn.Module):
    """Compute `Trunk` with all blocks in one call over a compiled cache; other attention runs block by block."""

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.embedding, self.blocks, self.handed_out = trunk.embedding, trunk.blocks, trunk.handed_out
        # A tensor's rows without what nn.Embedding does around looking them up.
        blocks = isinstance(self.embedding, BlockEmbedding)
        self._embed = self.embedding if blocks else functools.partial(torch.embedding, self.embedding.weight)
        pointers = [ctypes.pointer(cast(CompiledBlock, block).weights) for block in self.blocks]
        # Blocks without an input to hand out between them run in one call.
        ends = [layer for layer in self.handed_out if layer] + [len(pointers)]
        self._calls = [
            (first, (ctypes.POINTER(cpu.Block) * (end - first))(*pointers[first:end]))
            for first, end in pairwise([0, *ends])
        ]
        self._call = cpu.loaded_kernels(torch.float32).blocks

    def forward(
        self,
        tokens_BT: Tensor,
        rotary: tuple[Tensor, Tensor],
        attend: Callable[[int], Attend] = lambda layer: causal_attention,
        length: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the output of the trunk, as `Trunk.forward` does."""
        if not isinstance(attend, CachedAttention) or not attend.cache.compiled:
            return Trunk.forward(cast(Trunk, self), tokens_BT, rotary, attend, length)
        states = [self._embed(tokens_BT)]
        cache, cos, sin = attend.cache, rotary[0].contiguous(), rotary[1].contiguous()
        for first, blocks in self._calls:
            z_SWD, y_SWD = states[-1], torch.empty_like(states[-1])
            self._call(
                *(blocks, len(blocks)),
                *(z_SWD.data_ptr(), cos.data_ptr(), sin.data_ptr(), y_SWD.data_ptr()),
                *cache.addresses(first, attend.slots.start),
                *(cache.keys.stride(0), attend.positions.data_ptr(), attend.compiled_tree),
                *(*z_SWD.shape[:2], cache.capacity),
                torch.get_num_threads(),
            )
            states.append(y_SWD)
        if not self.handed_out:
            return states[-1]
        return torch.cat(states if 0 in self.handed_out else states[1:], -1)
