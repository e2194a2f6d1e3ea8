"""Penalties, biases and log-probabilities along drafts are those of plain decoding, token for token."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from shapes import HEADS, packed, trained, untrained

from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.sampling import position_noise
from headstart.decoding.settings import Penalties, Request, Rule, Sampling
from headstart.errors import UsageError

PROMPT = tuple(b"the cat then")
CASES = {
    "repetition": Penalties(repetition=1.3),
    "presence": Penalties(presence=0.7),
    "frequency": Penalties(frequency=0.2),
    "bias": Penalties(bias=((ord("e"), -float("inf")), (ord("t"), 1.5))),
    "all": Penalties(1.1, 0.3, 0.1, ((ord(" "), -2.0),)),
}


def reference(model, prompt: tuple[int, ...], count: int, penalties: Penalties, temperature: float, seed: int):
    """Plain decoding as directly as possible: one full forward per token, penalties by their definitions. Tokens, and
    the model's own log-probabilities."""
    model = copy.deepcopy(model).double()
    tokens: list[int] = []
    logs = []
    for _ in range(count):
        with torch.no_grad():
            raw = model(torch.tensor([[*prompt, *tokens]]))[0, -1]
        written, x = Counter(tokens), raw.tolist()
        for token in {*prompt, *tokens}:
            x[token] = x[token] / penalties.repetition if x[token] > 0 else x[token] * penalties.repetition
        for token, times in written.items():
            x[token] -= penalties.presence + penalties.frequency * times
        for token, value in penalties.bias:
            x[token] += value
        scores = torch.tensor(x, dtype=torch.float64)
        if temperature:
            noise = position_noise(torch.tensor(seed), torch.tensor(len(prompt) + len(tokens)), len(x))
            scores = scores / temperature + noise
        tokens.append(int(scores.argmax()))
        logs.append(raw.log_softmax(-1))
    return tokens, logs


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("temperature", "made"), [(0.0, trained), (0.9, untrained)])
def test_drafts_are_judged_as_plain_decoding_judges(name: str, temperature: float, made) -> None:
    shape = "transformer-parallel"
    expected, _ = reference(made(shape), PROMPT, 50, CASES[name], temperature, 7)
    model = packed(shape, torch.float64, made=made)
    plain = generate_all(Engine(model), [Request(PROMPT, 50, Sampling(temperature, seed=7))])[0]
    assert plain.tokens != expected or made is trained  # it does something; trained weights may not notice
    for heads in (1, 2, HEADS):
        request = Request(PROMPT, 50, Sampling(temperature, seed=7), heads, penalties=CASES[name])
        got = generate_all(Engine(model), [request])[0]
        assert got.tokens == expected, heads
    assert got.stats.passes < 50 or made is trained


def test_penalties_are_each_slots_own_and_end_with_their_request() -> None:
    model = packed("replicated", torch.float64)
    requests = [
        Request(PROMPT, 40, Sampling(0.8 * (i % 2), seed=i), penalties=penalties)
        for i, penalties in enumerate([CASES["all"], Penalties(), CASES["repetition"], Penalties(), CASES["bias"]])
    ]
    engine = Engine(model, EngineConfig(slots=2))
    together = generate_all(engine, requests)
    for request, generation in zip(requests, together):
        assert generation.tokens == generate_all(Engine(model), [request])[0].tokens
    assert not engine.state.penalties.any(slice(0, 2))
    forbidden = together[4]
    assert ord("e") not in forbidden.tokens


def test_penalties_with_a_rule_that_weighs() -> None:
    """Forbidden tokens are not generated, and a bias that decides everything decides it."""
    model = packed("transformer-causal", torch.float64)
    only = Penalties(bias=((ord("x"), 1e4),))
    never = Penalties(bias=((ord("e"), -float("inf")),))
    for kind in ("rejection", "block"):
        request = Request(PROMPT, 30, Sampling(1.0, seed=1), acceptance=Rule(kind), penalties=only)
        got = generate_all(Engine(model), [request])[0]
        assert set(got.tokens) == {ord("x")} and got.stats.passes < 30
        request = Request(PROMPT, 60, Sampling(1.0, seed=1), acceptance=Rule(kind), penalties=never)
        assert ord("e") not in generate_all(Engine(model), [request])[0].tokens


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("alternatives", [0, 3])
def test_logprobs_are_those_of_the_model(heads: int, alternatives: int) -> None:
    shape, penalties = "transformer-parallel", Penalties(presence=0.5)
    tokens, logs = reference(untrained(shape), PROMPT, 40, penalties, 0.9, 3)
    request = Request(PROMPT, 40, Sampling(0.9, seed=3), heads, penalties=penalties, logprobs=alternatives)
    others = [Request(PROMPT[:4], 20), Request(PROMPT[:6], 30, Sampling(0.5), logprobs=1)]
    got, silent, one = generate_all(
        Engine(packed(shape, torch.float64, made=untrained), EngineConfig(slots=3)), [request, *others]
    )
    assert got.tokens == tokens and len(got.logprobs) == len(got.top_logprobs) == 40
    for i, log in enumerate(logs):
        assert got.logprobs[i] == pytest.approx(float(log[tokens[i]]), abs=1e-9)
        best = log.topk(alternatives)
        assert [token for token, _ in got.top_logprobs[i]] == best.indices.tolist()
        assert [value for _, value in got.top_logprobs[i]] == pytest.approx(best.values.tolist(), abs=1e-9)
    assert silent.logprobs == [] and len(one.logprobs) == 30 and all(len(top) == 1 for top in one.top_logprobs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repetition": 0.0}, "repetition penalty is 0"),
        ({"presence": float("nan")}, "presence penalty is nan"),
        ({"frequency": float("inf")}, "frequency penalty is inf"),
        ({"bias": ((-1, 1.0),)}, "logit bias -1"),
        ({"bias": ((1, float("inf")),)}, "logit bias 1"),
    ],
)
def test_impossible_penalties(settings, message) -> None:
    with pytest.raises(UsageError, match=message):
        Penalties(**settings)


def test_impossible_requests() -> None:
    engine = Engine(packed("replicated", torch.float32))
    with pytest.raises(UsageError, match="token 4000"):
        engine.submit(Request(PROMPT, penalties=Penalties(bias=((4000, 1.0),))))
    with pytest.raises(UsageError, match="logprobs is -1"):
        engine.submit(Request(PROMPT, logprobs=-1))
