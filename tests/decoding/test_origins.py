from __future__ import annotations

import pytest
import torch
from shapes import HEADS, packed

from headstart.data.tokenizers import ByteTokenizer
from headstart.decoding.engine import Engine
from headstart.decoding.generation import OriginStream
from headstart.decoding.settings import Request, Sampling


@pytest.mark.parametrize("stop", [(), ("dog",), ("cat", "n a d")])
def test_pieces_are_the_released_text_and_name_the_heads(stop: tuple[str, ...]) -> None:
    tokenizer = ByteTokenizer()
    engine = Engine(packed("replicated", torch.float32), tokenizer=tokenizer)
    for seed in range(4):
        generation = engine.submit(
            Request(tuple(b"the cat then"), 80, Sampling(0.9 * (seed > 0), seed=seed), stop=stop)
        )
        origins = OriginStream(generation, tokenizer)
        pieces = []
        while engine.busy:
            engine.step()
            pieces += origins.new()
            # Never ahead of what is released: a stop string that has begun is held back.
            assert "".join(text for text, _ in pieces) == generation.text
        assert not any(s in generation.text for s in stop)
        heads = [head for text, head in pieces for _ in text]
        assert heads == generation.origins[: len(generation.text)]  # a byte is a character here
        assert origins.new() == [] and max(heads) <= HEADS
