"""The thirteen sizes of the paper (Table S14)."""

from __future__ import annotations

from dataclasses import replace

from headstart.errors import UsageError
from headstart.model.config import ModelConfig


def _paper(dim: int, layers: int, attention_heads: int, context: int) -> ModelConfig:
    return ModelConfig(vocab_size=32000, dim=dim, layers=layers, attention_heads=attention_heads, context=context)


PRESETS: dict[str, ModelConfig] = {
    # The first seven are named by non-embedding parameters, the last six by all parameters. Context: Table S13.
    "1M": _paper(128, 5, 4, 2048),
    "3M": _paper(256, 4, 8, 2048),
    "10M": _paper(384, 6, 8, 2048),
    "30M": _paper(512, 10, 8, 2048),
    "100M": _paper(768, 14, 12, 2048),
    "300M": _paper(1024, 25, 16, 2048),
    "1B": _paper(1536, 36, 24, 2048),
    "0.3B": _paper(1024, 18, 16, 4096),
    "0.6B": _paper(1280, 27, 20, 4096),
    "1.3B": _paper(2048, 24, 16, 4096),
    "3B": _paper(2560, 36, 20, 4096),
    "6.7B": _paper(4096, 32, 32, 4096),
    "13B": _paper(5120, 40, 40, 4096),
}


def preset(name: str, **changes: object) -> ModelConfig:
    """Return one of the paper's sizes with `changes` to any field: `preset("100M", heads=4)`."""
    if name not in PRESETS:
        raise UsageError(f"no size is called {name!r}; there are {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]
