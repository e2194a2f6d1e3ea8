"""The modules of a packed model on a GPU, which call the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

from headstart.decoding.cache import LayerAttention, gather_row
from headstart.decoding.kernels.cuda import launch
from headstart.model.attention import causal_attention
from headstart.model.layers import Attend, Block, RMSNorm


class CudaLinear(nn.Module):
    """Compute x W^T + b: few rows in a kernel, many in torch's product."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        super().__init__()
        self.weight = weight_NK.detach().contiguous()
        self.bias = None if bias_N is None else bias_N.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        return launch.linear(x.contiguous(), self.weight, self.bias)


class CudaNorm(nn.Module):
    """Compute `RMSNorm` in its kernel."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight.detach(), norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the RMS norm of each row."""
        return launch.norm(x.contiguous(), self.weight, self.eps)


class CudaBlock(nn.Module):
    """Compute `Block` over the cache of a chain in seven kernels, or some more for many rows.

    Torch launches some twenty. A pass over few rows is little more than reading the weights, so the other launches
    would take half of its time. Other attention runs the block itself.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        attend: Attend = causal_attention,
        select: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return the output of the block, as `Block.forward` does."""
        S, W, _ = x_BTD.shape
        if not isinstance(attend, LayerAttention) or attend.whole.tree is not None:
            return cast(Tensor, self.block(x_BTD, rotary, attend, select))
        block, row_S = self.block, attend.row_S
        attention, mlp = block.attention, block.mlp
        qkv, out, gate_up, down = (
            cast(CudaLinear, x) for x in (attention.qkv, attention.out, mlp.gate_up, mlp.down)
        )  # fmt: skip
        tables = [table.expand(S, W, 1, -1).contiguous() for table in rotary]
        x_SWD = x_BTD.contiguous()
        normed = block.attention_norm(x_SWD)
        positions_SW = attend.whole.positions
        queries = launch.rotated_qkv(
            normed, qkv.weight, qkv.bias, (tables[0], tables[1]), positions_SW, (attend.keys, attend.values),
            attention.heads,
        )  # fmt: skip
        y_SRHE = launch.attend(queries, attend.keys, attend.values, positions_SW, row_S, attend.whole.span)
        x_SRD = x_SWD if row_S is None else gather_row(x_SWD, row_S, 1)
        x_SRD = launch.linear(y_SRHE.flatten(2), out.weight, out.bias, residual=x_SRD)
        gated = launch.linear(block.mlp_norm(x_SRD), gate_up.weight, gated=True)
        return launch.linear(gated, down.weight, residual=x_SRD)
