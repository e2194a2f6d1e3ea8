"""Measure what quantizing a model costs: bits per token of a text before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.data.sample_text import SAMPLE_TEXT
from headstart.data.tokenizers import Tokenizer
from headstart.decoding.kernels.blocks import Quantize
from headstart.decoding.kernels.pack import pack
from headstart.errors import UsageError
from headstart.model.transformer import Transformer

WINDOW = 256
"""Tokens that are read together; the first of them are predicted from few others."""
LEAST, MOST = 64, 512
"""Tokens of the built-in text that are read: as many as `WORK` allows between these."""
WORK = 8e10
"""Multiplications for all of these tokens: a second or two in fp32 on two cores."""
MOST_OF_A_TEXT = 20_000
"""The most tokens of a given text that are read."""


@dataclass(frozen=True)
class QuantizationLoss:
    """Bits per token of a text before and after quantizing."""

    quantize: Quantize
    before: float
    """Bits per token of the model as it is stored."""
    after: float
    """Bits per token of the quantized model, whose activations are rounded too."""
    error: float
    """Standard error of the difference over the tokens."""
    tokens: int
    """Number of tokens predicted."""

    def __str__(self) -> str:
        change = self.after - self.before
        return (
            f"{self.quantize}: {self.after:.3f} bits per token, and {self.before:.3f} before quantizing "
            f"({change:+.3f} +- {self.error:.3f}, {100 * change / self.before:+.1f} %; {self.tokens} tokens)"
        )


@torch.no_grad()
def pack_and_measure(
    model: Transformer, quantize: Quantize, tokenizer: Tokenizer, text: str | None = None
) -> tuple[Transformer, QuantizationLoss]:
    """Quantize and pack `model` in place, like `pack`, and measure the loss on a text (None: `SAMPLE_TEXT`).

    A large model reads less of `SAMPLE_TEXT`. Raises UsageError for a text of fewer than two tokens, and as `pack`
    does.
    """
    most = MOST_OF_A_TEXT if text is not None else _affordable_tokens(model)
    tokens = tokenizer.encode(SAMPLE_TEXT if text is None else text)[:most]
    if len(tokens) < 2:
        raise UsageError("the text to measure the loss of quantizing on has fewer than two tokens; take a longer one")
    start = list(tokenizer.start_ids)
    before = token_bits(model, tokens, start)
    packed = pack(model, quantize=quantize)
    after = token_bits(packed, tokens, start)
    error = float((after - before).std(correction=0)) / math.sqrt(len(before))
    return packed, QuantizationLoss(quantize, float(before.mean()), float(after.mean()), error, len(before))


def _affordable_tokens(model: Transformer) -> int:
    """Return how many tokens of the built-in text a model of this size reads."""
    return max(LEAST, min(MOST, int(WORK / model.config.parameters()["next_token_path"])))


def token_bits(model: Transformer, tokens: Sequence[int], start: Sequence[int] = ()) -> Tensor:
    """Return the bits that head 1 takes for each token, float64.

    Windows are read one by one, each behind `start`; without it, the first token of each has no prediction.
    """
    found, width = [], max(2, min(WINDOW, model.config.context - len(start)))
    for first in range(0, len(tokens), width):
        window_T = torch.tensor([*start, *tokens[first : first + width]], device=model.device)
        begin = max(1, len(start))
        if len(window_T) > begin:
            logits_TV = model(window_T[None])[0, begin - 1 : -1].float()
            found.append(torch.nn.functional.cross_entropy(logits_TV, window_T[begin:], reduction="none").double())
    return torch.cat(found).cpu() / math.log(2)
