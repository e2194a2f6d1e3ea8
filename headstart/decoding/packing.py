"""Linear maps laid out for reading: what makes a pass cost the bytes of the weights and little more."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headstart.model.heads import Unembedding
from headstart.model.transformer import Transformer


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


class PackedUnembedding(nn.Module):
    """`Unembedding` for decoding: the same norm, each head's matrix packed, those of replicated heads 2..n in one."""

    def __init__(self, unembedding: Unembedding, rows: int, packed: bool) -> None:
        super().__init__()
        self.norm = unembedding.norm
        weights = [w.detach() for w in unembedding.weights]
        self.copies = len(weights)
        self.first = _linear(weights[0], None, rows, packed)
        self.others = _linear(torch.cat(weights[1:]), None, rows, packed) if self.copies > 1 else self.first
        self.vocab_size = weights[0].shape[0]

    def forward(self, z: Tensor, k: int = 1) -> Tensor:
        """Latent (..., D) of head k -> logits (..., V)."""
        if k == 1 or self.copies == 1:
            return self.first(self.norm(z))
        return self.others(self.norm(z)).unflatten(-1, (-1, self.vocab_size))[..., k - 2, :]

    def drafts(self, latents: list[Tensor]) -> Tensor:
        """Latents (S, 1, D) of heads 2..K -> their logits (S, K-1, V), in one product."""
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


def _linear(weight: Tensor, bias: Tensor | None, rows: int, packed: bool) -> nn.Module:
    return PackedLinear(weight, bias, rows) if packed else _PlainLinear(weight, bias)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN takes packed weights of this type."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


@torch.no_grad()
def pack(model: Transformer, rows: int | None = None) -> Transformer:
    """Turns `model` into its decoding form, in place: linear maps packed where that is possible, no gradients.

    `rows` is the number of rows a pass usually has (default: the number of heads). The model still computes the same
    function of any shape, but can no longer be trained or saved.
    """
    rows = rows or model.config.heads
    weight = model.trunk.embedding.weight
    packed = can_pack(weight.device, weight.dtype)
    model.requires_grad_(False)
    if packed:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, PackedLinear(child.weight, child.bias, rows))
    model.unembedding = PackedUnembedding(model.unembedding, rows, packed)  # type: ignore[assignment]
    return model.eval()
