"""The models with random weights that decoding is measured on, by about how many parameters they have."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from headstart.model.config import ModelConfig
from headstart.model.presets import PRESETS

Size = Literal["12M", "105M", "235M", "1.3B", "6.7B"]

SIZES: dict[str, ModelConfig] = {
    "12M": ModelConfig(vocab_size=4096, dim=256, layers=13, attention_heads=4, context=4096),
    # 32 blocks, so that four transformer heads stand to the trunk as in the paper's 7B model: 28 + 4.
    "105M": ModelConfig(vocab_size=4096, dim=512, layers=32, attention_heads=8, context=4096),
    "235M": ModelConfig(vocab_size=4096, dim=768, layers=32, attention_heads=12, context=4096),
    # The paper's own (Table S14), for GPUs; the larger one is that of its Tables S2 and S3.
    "1.3B": PRESETS["1.3B"],
    "6.7B": PRESETS["6.7B"],
}


def four_heads(config: ModelConfig) -> ModelConfig:
    """With the heads of the paper's Table S2: four transformer heads, parallel, taken from the layers."""
    return replace(config, heads=4, head_kind="transformer", wiring="parallel")


def byte_heads(config: ModelConfig) -> ModelConfig:
    """With the heads of Table S3: bytes, eight of them; each has an unembedding of its own, which bytes make small."""
    return replace(config, vocab_size=256, heads=8, head_kind="replicated", wiring="parallel")
