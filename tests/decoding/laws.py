"""Compare drawn outputs with the law of a small model."""

from __future__ import annotations

import copy
import itertools
from collections import Counter

import torch

from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.kernels.pack import pack
from headstart.decoding.policy.policy import DraftPolicy
from headstart.decoding.settings import Request, Rule, Sampling
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer


def small_models(layers: int = 5, **shape: str) -> tuple[Transformer, Transformer]:
    """A random model over three tokens whose heads say something, and its decoding form."""
    torch.manual_seed(1)
    raw = Transformer(ModelConfig(vocab_size=3, dim=16, layers=layers, attention_heads=2, heads=3, context=32, **shape))
    with torch.no_grad():
        for parameter in raw.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    return raw.double(), pack(copy.deepcopy(raw).double())


MANY = EngineConfig(slots=128)


def chi_square(
    model: Transformer,
    raw: Transformer,
    rule: Rule,
    sampling: Sampling,
    count: int = 1024,
    config: EngineConfig = MANY,
    policy: DraftPolicy | None = None,
) -> float:
    """Chi-square of 4 tokens drawn with `count` seeds against the model's own law, over its degrees of freedom."""
    prompt, length = (1, 2), 4
    law = {}
    for tokens in itertools.product(range(3), repeat=length):
        with torch.no_grad():
            logits = raw(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
        p = (logits / sampling.temperature).softmax(-1)
        if sampling.top_k == 2:
            p = torch.where(p < p.sort(descending=True).values[:, 1:2], 0, p)
            p = p / p.sum(-1, keepdim=True)
        law[tokens] = float(p.gather(-1, torch.tensor(tokens)[:, None]).prod())
    requests = [
        Request(prompt, length, Sampling(sampling.temperature, sampling.top_k, seed=seed), acceptance=rule)
        for seed in range(count)
    ]
    generations = generate_all(Engine(model, config, policy=policy), requests)
    assert sum(g.stats.passes for g in generations) < 0.95 * count * length
    drawn = Counter(tuple(g.tokens) for g in generations)
    assert all(law[tokens] > 0 for tokens in drawn)
    cells = [(drawn[tokens], chance * count) for tokens, chance in law.items() if chance * count >= 5]
    rare = count - sum(seen for seen, _ in cells), count - sum(expected for _, expected in cells)
    if rare[1] >= 5:
        cells.append(rare)
    return sum((seen - expected) ** 2 / expected for seen, expected in cells) / (len(cells) - 1)
