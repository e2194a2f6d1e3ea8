from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headstart.errors import UsageError
from headstart.formats.assembly import assemble, inexpressible, refuse_other_blocks, stored_tensors
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

TINY = ModelConfig(vocab_size=30, dim=16, layers=3, attention_heads=2, heads=2, attention_bias=True)


@pytest.mark.parametrize("config", [TINY, replace(TINY, tied=True, head_kind="stern")])
def test_a_model_from_its_parts(config: ModelConfig) -> None:
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    files = stored_tensors(model, None)
    again = assemble(config, lambda part: files[part.file][part.name], torch.float32)
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert (again.unembedding.weights[0] is again.trunk.embedding.weight) == config.tied
    with pytest.raises(UsageError, match=r"has shape \[3\]"):
        assemble(config, lambda part: torch.zeros(3), torch.float32)


def test_fields_that_a_format_does_not_know_are_named() -> None:
    assert inexpressible(TINY, ("vocab_size", "dim", "layers", "attention_heads", "heads")) == ["attention_bias"]
    refuse_other_blocks(TINY, "a file")
    with pytest.raises(UsageError, match="window"):
        refuse_other_blocks(replace(TINY, window=8), "a file")
