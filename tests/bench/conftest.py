from __future__ import annotations

import pytest
import torch

from headstart.data.tokenizers import ByteTokenizer
from headstart.formats.huggingface import save_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads next to a busy neighbour can be many times slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    """A tiny byte model with four heads; greedy, all their drafts are accepted."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(dim=32, layers=5, attention_heads=2, heads=4, context=128))
    # Equal embeddings make equal latents everywhere, so every position wants the same token; equal heads agree on it.
    with torch.no_grad():
        model.trunk.embedding.weight.copy_(model.trunk.embedding.weight[:1].clone())
    for head in list(model.heads)[1:]:
        head.load_state_dict(model.heads[0].state_dict())
    directory = tmp_path_factory.mktemp("run") / "model"
    save_model(model, directory, ByteTokenizer(), dtype=torch.bfloat16)
    return directory
