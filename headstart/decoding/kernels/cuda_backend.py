"""The backend of Triton kernels for GPUs: bf16 models whose blocks are like Llama's."""

from __future__ import annotations

import importlib.util
from typing import cast

import torch
from torch import Tensor, nn

from headstart.decoding.kernels.backend import Backend, replace_children
from headstart.decoding.kernels.blocks import Weight
from headstart.model.layers import Block, RMSNorm
from headstart.model.transformer import Transformer


class CudaBackend(Backend):
    """Run products and attention of few rows in Triton kernels, and those of many rows in torch's."""

    def __init__(self, model: Transformer, rows: int, form: str | None) -> None:
        super().__init__(model, rows, form)
        # Imported here because Triton, which these modules need, comes with torch for GPUs alone.
        from headstart.decoding.kernels.cuda.launch import MOST_ROWS
        from headstart.decoding.kernels.cuda.modules import CudaBlock, CudaLinear, CudaNorm

        self.exact_rows = MOST_ROWS
        self._linear, self._norm, self._block = CudaLinear, CudaNorm, CudaBlock

    @classmethod
    def supports(cls, model: Transformer) -> bool:
        """Say whether the kernels take this model: blocks like Llama's in bf16 on a GPU, with Triton installed."""
        config = model.config
        if model.device.type != "cuda" or model.dtype != torch.bfloat16 or not config.llama_blocks:
            return False
        width = config.dim_per_head
        return width >= 16 and width & (width - 1) == 0 and importlib.util.find_spec("triton") is not None

    def linear(self, weight: Weight, bias_N: Tensor | None) -> nn.Module:
        """Return a `CudaLinear`."""
        return self._linear(cast(Tensor, weight), bias_N)  # `pack` quantizes models on CPUs only

    def norm(self, norm: RMSNorm) -> nn.Module:
        """Return a `CudaNorm`."""
        return self._norm(norm)

    def replace_blocks(self, model: Transformer) -> None:
        """Make every block a `CudaBlock`."""
        replace_children(model, Block, self._block)
