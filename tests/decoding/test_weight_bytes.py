from __future__ import annotations

from dataclasses import replace

import pytest

from headstart.decoding.kernels.pack import multiplies_blocks, pack
from headstart.decoding.memory import weight_bytes
from headstart.model.config import ModelConfig
from tests.models import random_model

CONFIG = ModelConfig(vocab_size=320, dim=64, layers=2, attention_heads=2, hidden_dim=128, tied=True)
VOCABULARY = CONFIG.vocab_size * CONFIG.dim
MATRICES = CONFIG.parameters()["total"] - VOCABULARY


@pytest.mark.skipif(not multiplies_blocks("cpu"), reason="no compiled kernels here")
@pytest.mark.parametrize(
    ("quantize", "size", "vocabulary"), [(None, 4, 2 * 4), ("q8", 8.5 / 8, 8.5 / 8), ("q4", 5 / 8, 8.5 / 8)]
)
def test_bytes_of_packed_weights(quantize, size, vocabulary):
    """Blocks of a tied embedding are stored once; floats are also packed for the unembedding."""
    found = weight_bytes(pack(random_model(CONFIG), quantize=quantize))
    assert found == pytest.approx(MATRICES * size + VOCABULARY * vocabulary, rel=0.03)
    untied = weight_bytes(pack(random_model(replace(CONFIG, tied=False)), quantize=quantize))
    assert untied == pytest.approx(found + (VOCABULARY * vocabulary if quantize else 0), rel=0.03)
    assert weight_bytes(pack(random_model(CONFIG), quantize=quantize, compiled=False)) > 0
