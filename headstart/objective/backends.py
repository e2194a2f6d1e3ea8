"""Backends of a head's loss: our own chunked cross-entropy, torch's, Liger's or Apple's (cut cross-entropy).

Ours is the default. It alone counts top-1 hits and has z-loss, and tests hold its memory. The others are for GPUs, on
which fused kernels may be faster; their memory and their rounding are their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from headstart.arguments import COEFFICIENT, SHARE, check_fields
from headstart.data.batches import IGNORE
from headstart.errors import UsageError
from headstart.model.transformer import compute_dtype
from headstart.objective.cross_entropy import LOGITS_BYTES, CrossEntropy, linear_cross_entropy

Backend = Literal["headstart", "torch", "liger", "cce"]
HeadLoss = Literal["cross-entropy", "kl", "total-variation", "acceptance"]
Summed = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (N, D), weight (V, D) of one dtype, targets (N,)) -> cross-entropy summed over valid targets."""
PACKAGES = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}


@dataclass(frozen=True)
class LossConfig:
    """Loss of a head."""

    z_loss: float = 0.0
    """Coefficient of logsumexp(logits)^2 in the differentiated loss; the reported loss is without it (0: none)."""
    backend: Backend = "headstart"
    """headstart, or torch, liger, cce: other implementations, which count no top-1 in training and have no z-loss."""
    heads: HeadLoss = "cross-entropy"
    """Target of heads 2..n: cross-entropy, the text; kl, total-variation or acceptance (-log of its rate), the later
    distribution of the next-token head, which accepts or rejects their drafts (no gradient goes into it)."""
    share: float = 1.0
    """Share of kl, total-variation or acceptance in the loss of heads 2..n; the rest is cross-entropy."""

    def __post_init__(self) -> None:
        check_fields(self, "loss.", z_loss=COEFFICIENT, share=SHARE)
        if self.z_loss and self.backend != "headstart":
            raise UsageError(f"loss.z_loss needs loss.backend headstart; {self.backend} is used without it")
        if self.heads != "cross-entropy" and (self.backend != "headstart" or self.z_loss):
            raise UsageError(f"loss.heads {self.heads} needs loss.backend headstart and loss.z_loss 0")

    def require(self, device: torch.device) -> None:
        """Raise UsageError unless the backend can run on `device` here."""
        package = PACKAGES.get(self.backend)
        if package is not None and find_spec(package) is None:
            raise UsageError(
                f"loss.backend {self.backend} needs {package}, which is not installed; "
                "pip install 'headstart[kernels]', or take loss.backend headstart"
            )
        if self.backend == "torch" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
            raise UsageError(
                f"loss.backend torch needs torch 2.13 or newer, this is {torch.__version__}; "
                "take loss.backend headstart"
            )
        if self.backend == "liger" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise UsageError("loss.backend liger needs a GPU, and the device is cpu; take loss.backend headstart")

    def function(self, budget: int = LOGITS_BYTES) -> Callable[[Tensor, Tensor, Tensor], CrossEntropy]:
        """Return a function with the arguments x, weight and targets of `linear_cross_entropy`, and its result.

        Only our own backend heeds `budget`, the bytes of logits held at once.
        """
        if self.backend == "headstart":
            return partial(linear_cross_entropy, z_loss=self.z_loss, budget=budget)
        return partial(_foreign, {"torch": _torch, "liger": _liger, "cce": _cce}[self.backend])


def _foreign(summed: Summed, x: Tensor, weight_VD: Tensor, targets: Tensor) -> CrossEntropy:
    """Cast as our own loss does: products in the autocast dtype, an fp32 sum, gradients in the dtypes of the inputs."""
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        loss = summed(x.flatten(0, -2).to(dtype), weight_VD.to(dtype), targets.flatten())
    if loss.dtype != torch.float64:
        loss = loss.float()
    return CrossEntropy(loss, loss.detach(), None)


def _torch(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    # A sum comes back in the dtype of x, and a bf16 scalar has three digits. In bf16 the rows come one by one, each of
    # three digits but added in fp32; the backward then computes the logits again.
    whole = x_ND.dtype in (torch.float32, torch.float64)
    rows = torch.nn.functional.linear_cross_entropy(
        x_ND,
        weight_VD,
        targets_N,
        reduction="sum" if whole else "none",
        ignore_index=IGNORE,
        options=torch.nn.LinearCrossEntropyOptions(),
    )
    return rows if whole else rows.float().sum()


def _liger(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    # Its default sums the weight's gradient over chunks in the weight's own dtype.
    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE, reduction="sum", accum_dtype=torch.float32)
    return loss(weight_VD, x_ND, targets_N)


def _cce(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

    # Its default drops gradients below a threshold. Its kernels are for GPUs; on a CPU it compiles the plain product,
    # which holds all logits.
    impl = "cce" if x_ND.is_cuda else "torch_compile"
    return cut_cross_entropy(
        x_ND, weight_VD, targets_N, ignore_index=IGNORE, reduction="sum", filter_eps=None, impl=impl
    )
