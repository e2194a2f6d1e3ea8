"""Constrained text is what its constraint says, and with drafts it is that of constrained plain decoding."""

from __future__ import annotations

import copy
import functools
import json
import random

import numpy as np
import pytest
import torch
from constrained import BYTES, CASES, PERSON, PROMPT, bpe, model_of, one, random_model, reference
from policies import RandomRows
from shapes import HEADS, packed, untrained

import headstart
from headstart.decoding.constraints import Constraint, ConstraintRows, compiled
from headstart.decoding.drafters import constrained
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.generation import FORCED
from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.kernels.pack import pack
from headstart.decoding.settings import Penalties, Request, Rule, Sampling

pytest.importorskip("llguidance", reason="llguidance is not installed")
jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokenizer", [BYTES, "bpe"], ids=["bytes", "bpe"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_with_drafts_it_is_constrained_plain_decoding(name: str, tokenizer, temperature: float) -> None:
    tokenizer = bpe() if tokenizer == "bpe" else tokenizer
    raw, model = model_of(tokenizer)
    prompt = PROMPT if tokenizer is BYTES else tuple(tokenizer.encode("the cat then"))
    expected, reason = reference(raw, tokenizer, CASES[name], prompt, 45, temperature, seed=1)
    sampling = Sampling(temperature, seed=1)
    for heads, lookup in ((1, 0), (2, 0), (model.config.heads, 0), (1, 5), (model.config.heads, 5)):
        engine = Engine(model, EngineConfig(lookup=lookup), tokenizer=tokenizer)
        got = one(engine, prompt, 45, sampling, heads, constraint=CASES[name])
        assert (got.tokens, got.finish_reason) == (expected, reason), (heads, lookup)
        assert got.text == tokenizer.decode(got.tokens)
        if heads == 1 and not lookup:
            assert got.stats.forced == 0 and got.stats.rows_per_pass == 1


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_in_a_batch_under_any_policy_it_is_the_same_and_free_requests_are_as_ever(compiled: bool, exact: bool) -> None:
    model = packed("transformer-parallel", torch.float32, compiled)
    requests = [
        Request(PROMPT, 50, Sampling(0.8 * (i % 3 > 0), seed=i, top_k=5 * (i % 3 > 1)), constraint=constraint)
        for i, constraint in enumerate([CASES["schema"], None, CASES["endless"], CASES["words"], None, CASES["choice"]])
    ]
    plain = []
    for r in requests:
        engine = Engine(model, EngineConfig(exact=exact), tokenizer=BYTES)
        plain.append(one(engine, r.prompt, 50, r.sampling, 1, constraint=r.constraint).tokens)
        if r.constraint is None:  # nothing is made for those that are free
            assert engine.state.constraints.forbidden_SWV is None and engine.state.constraints.draft_logits is None
    for policy in [None, RandomRows(3)] if exact is False or backend_of(model).row_exact else [None]:
        for lookup in (0, 3):
            engine = Engine(model, EngineConfig(slots=3, exact=exact, lookup=lookup), tokenizer=BYTES, policy=policy)
            together = generate_all(engine, requests)
            assert [g.tokens for g in together] == plain
            assert not engine.state.constraints.any(slice(0, 3)) and not engine.state.constraints.forbidden_SWV.any()


def test_what_is_forced_is_drafted_and_kept() -> None:
    text = "exactly this text, and no other"
    constraint = Constraint.choice([text])
    model = packed("transformer-parallel", torch.float32)
    got = one(Engine(model, tokenizer=BYTES), PROMPT, 60, constraint=constraint)
    assert got.text == text and got.finish_reason == "end"
    assert got.stats.passes == -(-len(text) // HEADS)
    assert got.stats.forced == got.origins.count(FORCED) == len(text) - (got.stats.passes - 1)
    # Windows that are longer than heads there are hold more of it.
    longer = one(Engine(model, EngineConfig(lookup=6), tokenizer=BYTES), PROMPT, 60, constraint=constraint)
    assert longer.text == text and longer.stats.passes == -(-len(text) // (HEADS + 6))
    for kind in ("rejection", "block"):
        rule = Rule(kind)
        got = one(Engine(model, tokenizer=BYTES), PROMPT, 60, Sampling(1.0), acceptance=rule, constraint=constraint)
        assert got.text == text and got.stats.passes == -(-len(text) // HEADS)
    # Where nothing may follow nothing is drafted, not even the end token.
    engine = Engine(pack(copy.deepcopy(random_model(432))), EngineConfig(lookup=8), tokenizer=bpe())
    got = one(engine, (5, 6), constraint=Constraint.choice(["then a"]))
    assert got.text == "then a" and got.stats.passes == 1 and got.stats.forced == len(got.tokens) < 10


@pytest.mark.parametrize("kind", ["match", "rejection", "block"])
def test_no_draft_is_fed_that_the_constraint_forbids(kind: str) -> None:
    engine = Engine(packed("transformer-parallel", torch.float32), EngineConfig(lookup=2), tokenizer=BYTES)
    constraint = CASES["endless"]
    generation = engine.submit(Request(PROMPT, 80, Sampling(1.0), acceptance=Rule(kind), constraint=constraint))
    drafts = 0
    while not generation.finished:
        engine.step()
        if not generation.finished:
            window = engine.state.windows.tokens_SW[0, : 1 + int(engine.state.windows.drafted_S[0])].tolist()
            matcher = compiled(constraint, BYTES, 128)
            assert all(matcher.push(token) for token in generation.tokens + window[1:])
            assert window[0] == generation.tokens[-1] and len(generation.window.drafters) == len(window) - 1
            drafts += len(window) - 1
    # Beyond the first, each head has a draft for nearly every pass.
    assert drafts > 0.8 * (HEADS - 1) * (generation.stats.passes - 1)
    assert sum(generation.stats.accepted) > 0


@pytest.mark.parametrize("kind", ["match", "rejection"])
def test_a_draft_chosen_again_without_a_mask_is_what_it_was(kind: str) -> None:
    """The same logits, with the same noise."""
    engine = Engine(packed("transformer-parallel", torch.float32), tokenizer=BYTES)
    anything = Constraint.regex("[\x00-\x7f]*")
    engine.submit(Request(PROMPT, 40, Sampling(1.5, seed=3), acceptance=Rule(kind), constraint=anything))
    for _ in range(10):
        engine.step()
        root, window = engine.scheduler.lengths[0], engine.state.windows.tokens_SW[0].tolist()
        nothing = np.zeros(128, dtype=bool)
        for k in range(2, HEADS + 1):
            tokens, _ = constrained.draw_masked(engine.state, slice(0, 1), k, (root, k - 1), nothing, 1, k - 2)
            assert tokens == [window[k - 1]]


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_a_mask_depends_on_the_text_alone(name: str) -> None:
    """Not on what was asked before, nor on drafts taken back."""
    tokenizer = BYTES if name == "bytes" else bpe()
    for seed, constraint in enumerate(list(CASES.values()) * 3):
        rng = random.Random(seed)
        matcher, text = compiled(constraint, tokenizer, tokenizer.vocab_size), []
        for _ in range(25):
            allowed = matcher.allowed()
            fresh = compiled(constraint, tokenizer, tokenizer.vocab_size)
            assert all(fresh.push(token) for token in text)
            assert np.array_equal(fresh.allowed(), allowed) and fresh.may_end == matcher.may_end
            drafts = 0
            for _ in range(rng.randint(0, 5)):
                token = int(rng.choice(np.flatnonzero(matcher.allowed())))
                if token == tokenizer.end_id:
                    break
                assert matcher.push(token)
                drafts += 1
                if matcher.ended:
                    break
            matcher.back(drafts)
            token = int(rng.choice(np.flatnonzero(allowed)))
            if token == tokenizer.end_id:
                break
            assert matcher.push(token)
            text.append(token)
            if matcher.ended:
                break


SCHEMAS = [
    PERSON,
    {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": "^[a-z]+_[0-9]{2}$", "maxLength": 12}]},
    {
        "type": "object",
        "properties": {"path": {"$ref": "#/$defs/path"}, "more": {"type": "array", "items": {"$ref": "#/$defs/path"}}},
        "required": ["path"],
        "additionalProperties": False,
        "$defs": {"path": {"type": "object", "properties": {"x": {"type": ["integer", "null"]}}, "required": ["x"],
                           "additionalProperties": False}},
    },
]  # fmt: skip


@functools.cache
def boxed() -> headstart.LanguageModel:
    return headstart.load()


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_the_model_in_the_box_writes_what_the_schema_says(schema) -> None:
    constraint = Constraint.json_schema(schema)
    ended = 0
    for seed in range(4):
        settings = {"temperature": 0.9 * (seed > 0), "seed": seed, "constraint": constraint}
        out = boxed().generate("CONFIG = ", 160, **settings)
        plain = boxed().generate("CONFIG = ", 160, heads=1, **settings)
        assert (out.text, out.finish_reason) == (plain.text, plain.finish_reason)
        if out.finish_reason == "end":
            ended += 1
            jsonschema.validate(json.loads(out.text), schema)
        assert "".join(boxed().stream("CONFIG = ", 160, **settings)) == out.text
    assert ended >= 2


@pytest.mark.parametrize("seed", range(3))
def test_a_model_of_random_weights_does_too(seed: int) -> None:
    model = pack(copy.deepcopy(random_model(432)))
    constraint, sampling = Constraint.json_schema(PERSON), Sampling(1.0, seed=seed)
    got = one(Engine(model, tokenizer=bpe()), tuple(bpe().encode("x")), 150, sampling, constraint=constraint)
    assert got.finish_reason == "end"
    jsonschema.validate(json.loads(got.text), PERSON)
    assert max(len(bpe().decode([token])) for token in got.tokens) > 2


def test_stop_strings_penalties_and_logprobs_go_with_it() -> None:
    raw, model = model_of(BYTES)
    penalties = Penalties(repetition=1.2, frequency=0.3, bias=((ord("d"), 2.0), (ord("c"), -float("inf"))))
    for temperature in (0.0, 0.9):
        outputs = set()
        for heads in (1, 2, HEADS):
            settings = {"penalties": penalties, "constraint": CASES["endless"], "logprobs": 1}
            engine = Engine(model, tokenizer=BYTES)
            got = one(engine, PROMPT, 60, Sampling(temperature, seed=5), heads, stop=("! ",), **settings)
            outputs.add((got.text, got.finish_reason))
            with torch.no_grad():
                logs = raw(torch.tensor([[*PROMPT, *got.tokens]]))[0, len(PROMPT) - 1 : -1].log_softmax(-1)
            own = logs.gather(1, torch.tensor(got.tokens)[:, None])[:, 0]
            assert got.logprobs == pytest.approx(own.tolist(), abs=1e-9)  # the model's own, without mask and penalties
        assert len(outputs) == 1
        text, reason = outputs.pop()
        assert "c" not in text and "!" not in text and reason in ("stop", "length")
    forced = one(Engine(model, tokenizer=BYTES), PROMPT, penalties=penalties, constraint=Constraint.choice(["cc"]))
    assert forced.text == "cc"  # what is forced goes before what must never be


def test_where_it_ends() -> None:
    model = packed("transformer-parallel", torch.float32)
    text = "then a dog"
    for heads in (1, HEADS):
        for limit in range(1, len(text) + 3):
            engine = Engine(model, tokenizer=BYTES)
            got = one(engine, PROMPT, limit, heads=heads, constraint=Constraint.choice([text]))
            # Complete with the last token that there may be is complete.
            assert (got.text, got.finish_reason) == (text[:limit], "length" if limit < len(text) else "end")
        # The model's 128 tokens have no letter for it, which shows only on the way.
        got = one(Engine(model, tokenizer=BYTES), PROMPT, heads=heads, constraint=Constraint.regex("then( a dog)? ü"))
        assert got.finish_reason == "stuck" and got.text in ("then ", "then a dog ")


def test_an_end_token_where_the_text_may_not_end_is_no_end() -> None:
    """Rows of a stuck output are not masked: whatever is chosen there, it did not satisfy the constraint."""
    few = 100  # of the tokenizer's tokens: no umlaut is among them
    engine = Engine(pack(copy.deepcopy(random_model(few))), tokenizer=bpe())
    always = {"penalties": Penalties(bias=((bpe().end_id, 1e6),))}
    for heads in (1, 3):
        stuck = one(engine, (1, 2), heads=heads, constraint=Constraint.regex("a(b|bx)ü"), **always)
        assert stuck.text in ("ab", "abx") and stuck.finish_reason == "stuck"
        free = one(engine, (1, 2), heads=heads, constraint=Constraint.regex("a(ab)*"), **always)
        assert (free.text, free.finish_reason) == ("a", "end")


def test_drafts_that_get_stuck_are_no_more_than_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any d is a trap: the model has no token for what comes after it. Drafts step into it where the text may not."""
    engine = Engine(
        packed("transformer-parallel", torch.float32, made=untrained), EngineConfig(slots=8), tokenizer=BYTES
    )
    trap = Constraint.regex("([^d]|dü){40}")
    apply = ConstraintRows.apply

    def checked(self, logits, slots):
        result = apply(self, logits, slots)
        assert result.isfinite().any(-1).all()  # probabilities of nothing would be NaN
        return result

    monkeypatch.setattr(ConstraintRows, "apply", checked)
    found = [
        generate_all(engine, [Request(PROMPT, 50, Sampling(1.5, seed=s), heads, constraint=trap) for s in range(16)])
        for heads in (1, HEADS)
    ]
    plain, drafted = ([(g.text, g.finish_reason) for g in generations] for generations in found)
    assert plain == drafted and len({reason for _, reason in plain}) == 2
    assert all(text.endswith("d") == (reason == "stuck") for text, reason in plain)


def test_what_was_refused_is_taken_back_too() -> None:
    matcher = compiled(CASES["choice"], BYTES, 256)
    for text in (b"", b"t", b"th", b"then"):
        for size in range(len(text) + 1):
            before = matcher.allowed()
            assert all(matcher.push(token) for token in text[:size]) and not matcher.push(ord("?"))
            assert not matcher.allowed().any() and not matcher.may_end
            matcher.back(size)
            assert np.array_equal(matcher.allowed(), before)
