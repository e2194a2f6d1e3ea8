"""Constraints, models for them, and constrained plain decoding without a cache."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from shapes import packed, trained

from headstart.data.tokenizers import ByteTokenizer, PretrainedTokenizer, Tokenizer
from headstart.decoding.constraints import Constraint, compiled
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.generation import Generation
from headstart.decoding.kernels.pack import pack
from headstart.decoding.sampling import position_noise
from headstart.decoding.settings import Request, Rule, Sampling
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

BYTES = ByteTokenizer()
PROMPT = tuple(b"the cat then")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "animal": {"enum": ["cat", "caterpillar", "dog"]},
    },
    "required": ["name", "age", "animal"],
    "additionalProperties": False,
}
CASES = {
    "schema": Constraint.json_schema(PERSON),
    "words": Constraint.regex(r"((the|that|then) (cat|dog|[a-z]{1,5})[ .]){8}"),
    "endless": Constraint.regex(r"(then a (dog|cat) |[a-d]{2,3}! )*"),
    "choice": Constraint.choice(["then a dog is that", 'then "a cat"\\', "th"]),
    "lark": Constraint.lark('start: item (", " item){4}\nitem: /[a-z]{1,4}/ | "<" item ">"'),
}


@functools.cache
def bpe() -> PretrainedTokenizer:
    """A BPE whose tokens straddle what a grammar says in pieces: `": "`, `{"`, `", "`, `cat"`."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [json.dumps({"name": name, "age": i, "animal": "cat"}) for i, name in enumerate(["ann", "bo", "übel"] * 9)]
    library.train_from_iterator([*corpus, "then a dog the cat that is ", "then a cat! "], trainer)
    with tempfile.TemporaryDirectory() as folder:
        library.save(str(Path(folder) / "tokenizer.json"))
        return PretrainedTokenizer(folder)


@functools.cache
def random_model(vocab_size: int) -> Transformer:
    """A model of random weights, whose vocabulary is larger than the tokenizer's, and whose heads say something."""
    torch.manual_seed(2)
    config = ModelConfig(
        vocab_size=vocab_size, dim=16, layers=5, attention_heads=1, heads=3, context=256, head_kind="replicated"
    )
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    return model.double()


def model_of(tokenizer: Tokenizer) -> tuple[Transformer, Transformer]:
    """A model and its decoding form, in float64."""
    if tokenizer is BYTES:
        return copy.deepcopy(trained("transformer-parallel")).double(), packed("transformer-parallel", torch.float64)
    return random_model(432), pack(copy.deepcopy(random_model(432)))


def reference(
    model: Transformer, tokenizer: Tokenizer, constraint: Constraint, prompt, count: int, temperature=0.0, seed=0
) -> tuple[list[int], str]:
    """Constrained plain decoding as directly as possible: a whole forward and a fresh matcher for each token."""
    tokens: list[int] = []
    for _ in range(count):
        matcher = compiled(constraint, tokenizer, model.config.vocab_size)
        assert all(matcher.push(token) for token in tokens)
        if tokens and matcher.ended:
            return tokens, "end"
        allowed = torch.from_numpy(matcher.allowed())
        if not allowed.any():
            return tokens, "stuck"
        with torch.no_grad():
            scores = model(torch.tensor([[*prompt, *tokens]]))[0, -1].masked_fill(~allowed, -float("inf"))
        if temperature:
            noise = position_noise(torch.tensor(seed), torch.tensor(len(prompt) + len(tokens)), len(scores))
            scores = scores / temperature + noise
        token = int(scores.argmax())
        if token == tokenizer.end_id:
            return tokens, "end"
        tokens.append(token)
    matcher = compiled(constraint, tokenizer, model.config.vocab_size)
    assert all(matcher.push(token) for token in tokens)
    return tokens, "end" if matcher.ended else "length"


def one(engine: Engine, *args, **settings) -> Generation:
    return generate_all(engine, [Request(*args, **settings)])[0]


# A path through this decides which tokens come later; in places there is one.
LAW = Constraint.regex(
    "\x00[\x01\x02][\x00-\x02]{2}|\x01(\x00[\x00\x01]|\x02\x02)[\x00-\x02]|\x02[\x00-\x02]\x01[\x00\x02]?"
)


def law_of(raw: Transformer, prompt, constraint: Constraint, temperature: float, top_k: int = 0) -> dict:
    """The probability of every text, by playing through all of them."""
    law: dict[tuple[int, ...], float] = {}

    def follow(tokens: tuple[int, ...], chance: float) -> None:
        matcher = compiled(constraint, BYTES, raw.config.vocab_size)
        assert all(matcher.push(token) for token in tokens)
        if matcher.ended:
            law[tokens] = chance
            return
        with torch.no_grad():
            logits = raw(torch.tensor([prompt + tokens]))[0, -1] / temperature
        logits = logits.masked_fill(~torch.from_numpy(matcher.allowed()), -float("inf"))
        if top_k:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -float("inf"))
        for token, p in enumerate(logits.softmax(-1).tolist()):
            if p and token == BYTES.end_id:
                law[tokens] = chance * p
            elif p:
                follow((*tokens, token), chance * p)

    follow((), 1.0)
    assert sum(law.values()) == pytest.approx(1)
    return law


def distance(kind: str, raw: Transformer, model: Transformer, constraint: Constraint, count=512, slots=128, **settings):
    """Return chi-square of outputs drawn with `count` seeds against their law, over its degrees of freedom."""
    prompt = (1,)
    temperature, top_k = settings.pop("temperature", 1.0), settings.pop("top_k", 0)
    law = law_of(raw, prompt, constraint, temperature, top_k)
    requests = [
        Request(prompt, 8, Sampling(temperature, top_k, seed=s), acceptance=Rule(kind), constraint=constraint)
        for s in range(count)
    ]
    generations = generate_all(
        Engine(model, EngineConfig(slots=slots, exact=False, **settings), tokenizer=BYTES), requests
    )
    assert {g.finish_reason for g in generations} == {"end"}
    drawn = Counter(tuple(g.tokens) for g in generations)
    assert all(law.get(tokens, 0) > 0 for tokens in drawn)
    cells = [(drawn[tokens], chance * count) for tokens, chance in law.items() if chance * count >= 5]
    rare = count - sum(seen for seen, _ in cells), count - sum(expected for _, expected in cells)
    if rare[1] >= 5:
        cells.append(rare)
    return sum((seen - expected) ** 2 / expected for seen, expected in cells) / (len(cells) - 1)
