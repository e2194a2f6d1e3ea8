"""Log-probabilities of a prompt's tokens are head 1's, whatever chunks the prompt is read in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from shapes import SHAPES

from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.kernels.pack import pack
from headstart.decoding.settings import Request
from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

PROMPT = tuple(torch.randint(40, (75,), generator=torch.Generator().manual_seed(1)).tolist())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("compiled", "exact"), [(True, True), (False, True), (False, False)])
def test_they_are_those_of_head_1(shape: str, compiled: bool, exact: bool) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=40, dim=32, layers=5, attention_heads=2, kv_heads=1, heads=3, context=128, **SHAPES[shape]
    )
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform
            parameter.mul_(3 if parameter.dim() > 1 else 1)
        wanted = model(torch.tensor([PROMPT]), heads=1)[0, :-1, 0].log_softmax(-1)
    own = wanted.gather(-1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    engine = Engine(pack(model, compiled=compiled), EngineConfig(slots=2, exact=exact, prefill_budget=48))
    asked = Request(PROMPT, max_new_tokens=5, prompt_logprobs=2)
    first, again, without = (
        generate_all(engine, [each])[0] for each in (asked, asked, replace(asked, prompt_logprobs=None))
    )
    assert first.prompt_logprobs == pytest.approx(own.tolist(), abs=1e-3)
    best = wanted.topk(2)
    found = [[chance for _, chance in pairs] for pairs in first.prompt_top_logprobs]
    assert torch.tensor(found).allclose(best.values, atol=1e-3) and len(found) == len(PROMPT) - 1
    # What slots hold of the prompt is read again, and only by those who ask for that.
    assert again.prompt_logprobs == first.prompt_logprobs and again.stats.prompt_tokens_reused == 0
    assert without.stats.prompt_tokens_reused > 0 and not without.prompt_logprobs
    assert first.tokens == again.tokens == without.tokens


def test_a_prompt_of_one_token_has_none_and_counts_are_checked() -> None:
    model = pack(Transformer(ModelConfig(vocab_size=40, dim=16, layers=3, attention_heads=1, heads=2, context=32)))
    engine = Engine(model)
    (only,) = generate_all(engine, [Request((3,), max_new_tokens=2, prompt_logprobs=0)])
    assert only.prompt_logprobs == [] and only.prompt_top_logprobs == []
    (pair,) = generate_all(engine, [Request((3, 4), max_new_tokens=2, prompt_logprobs=0)])
    assert len(pair.prompt_logprobs) == 1 and pair.prompt_top_logprobs == [[]]
    with pytest.raises(UsageError, match="prompt_logprobs is 41"):
        engine.submit(Request((3,), prompt_logprobs=41))
