"""Lossless means token-identical: every number of heads, seed, batch and shape against plain decoding."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shapes import CORE, HEADS, KINDS, VOCABULARY, fill, packed, trained

from headstart.decoding import sampling as sampling_module
from headstart.decoding import verify as verify_module
from headstart.decoding.cache import CachedAttention, KVCache
from headstart.decoding.engine import EXACT_SPAN, Engine, EngineConfig, generate_all
from headstart.decoding.kernels import cpu
from headstart.decoding.kernels.pack import pack
from headstart.decoding.sampling import position_noise
from headstart.decoding.settings import Request, Sampling
from headstart.decoding.state import DecodingState
from headstart.decoding.verify import Evidence, Verdict
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from tests.cases import each_value, pairwise

PROMPT = tuple(b"the cat then")
SAMPLED = Sampling(temperature=1.0, seed=11)
SETTINGS = {
    "greedy": Sampling(),
    "sampled": SAMPLED,
    "truncated": Sampling(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, seed=5),
}


def run(model: Transformer, request: Request, exact: bool = True, slots: int = 1, deferred: bool = True):
    return generate_all(Engine(model, EngineConfig(slots=slots, exact=exact, deferred=deferred)), [request])[0]


def plain_reference(model: Transformer, prompt: tuple[int, ...], new_tokens: int, sampling: Sampling) -> list[int]:
    """Plain decoding written as directly as possible: no cache, no window, one full forward per token."""
    tokens = list(prompt)
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))[0, -1]
        if sampling.temperature == 0:
            tokens.append(int(logits.argmax()))
            continue
        x = (logits / sampling.temperature).double()
        if sampling.top_k:
            x[x < x.sort(descending=True).values[sampling.top_k - 1]] = float("-inf")
        probabilities, order = x.softmax(-1).sort(descending=True)
        dropped = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        x[order[dropped]] = float("-inf")
        x[x < x.max() + torch.tensor(sampling.min_p).log()] = float("-inf")
        noise = position_noise(torch.tensor(sampling.seed), torch.tensor(len(tokens)), len(x))
        tokens.append(int((x + noise).argmax()))
    return tokens[len(prompt) :]


@each_value({"shape": KINDS, "name": list(SETTINGS)})
def test_every_number_of_heads_gives_what_a_loop_without_a_cache_gives(shape: str, name: str) -> None:
    reference = plain_reference(copy.deepcopy(trained(shape)).double(), PROMPT, 45, SETTINGS[name])
    model = packed(shape, torch.float64)
    for heads in range(1, HEADS + 1):
        for exact in (True, False):
            got = run(model, Request(PROMPT, 45, SETTINGS[name], heads), exact)
            assert got.tokens == reference, (heads, exact)


AXES = {
    "dtype,compiled": {
        "fp32": (torch.float32, True),
        "fp32-onednn": (torch.float32, False),
        "bf16": (torch.bfloat16, True),
        "bf16-onednn": (torch.bfloat16, False),
    },
    "name": ["greedy", "truncated"],
}


@pairwise({"shape": CORE, **AXES})
def test_exact_decoding_is_the_same_to_the_bit_for_every_number_of_heads(
    shape: str, dtype: torch.dtype, compiled: bool, name: str
) -> None:
    numbers_of_heads_are_the_same_to_the_bit(shape, dtype, compiled, name)


@each_value({"shape": [shape for shape in KINDS if shape not in CORE], **AXES})
def test_heads_that_go_the_way_of_others_are_exact_too(
    shape: str, dtype: torch.dtype, compiled: bool, name: str
) -> None:
    numbers_of_heads_are_the_same_to_the_bit(shape, dtype, compiled, name)


def numbers_of_heads_are_the_same_to_the_bit(shape: str, dtype: torch.dtype, compiled: bool, name: str) -> None:
    if compiled and cpu.kernels(dtype) is None:
        pytest.skip("there are no compiled kernels for it here: the case without them is this one")
    model = packed(shape, dtype, compiled)
    config = model.config
    results = []
    # Crosses a block of attention, where the span changes in another pass for each number of heads.
    prompt = (PROMPT * 50)[: EXACT_SPAN - 30]
    length = 60
    for heads in range(1, HEADS + 1):
        engine = Engine(model, EngineConfig(slots=1))
        got = generate_all(engine, [Request(prompt, length, SETTINGS[name], heads)])[0]
        on_path = list(range(config.trunk_layers))
        if config.head_kind == "transformer":
            on_path += [config.trunk_layers + k - 1 for k in model.path(1)]
        cache = engine.state.cache
        end = len(prompt) + length - 1 - HEADS  # the last pass may have been cut by the limit
        keys, values = cache.keys_of(0)[on_path, :, :end], cache.values[on_path, 0, :, :end]
        results.append((got.tokens, keys.clone(), values.clone()))
    tokens, keys, values = results[0]
    assert len(tokens) == length
    for other_tokens, other_keys, other_values in results[1:]:
        assert other_tokens == tokens
        assert torch.equal(other_keys, keys) and torch.equal(other_values, values)


def drafts_of(model: Transformer, known: list[int], heads: int = HEADS, seed: int | None = None) -> list[int]:
    """Return the drafts of heads 2..K after `known`, whose last token is the root."""
    tokens = list(known)
    chained = model.config.ahead > 0
    drafts: list[int] = []
    for k in range(2, heads + 1):
        # Head k at the position before the root: of sequential heads those that lack tokens at the end are not asked.
        read = tokens if chained else tokens[:-1]
        with torch.no_grad():
            scores = model(torch.tensor([read]), heads=heads)[0, len(known) - 2, k - 1]
        if seed is not None:
            scores = scores + position_noise(torch.tensor(seed), torch.tensor(len(known) - 2 + k), len(scores))
        drafts.append(int(scores.argmax()))
        tokens.append(drafts[-1])
    return drafts


def accepted_by_a_plain_loop(
    model: Transformer, prompt: tuple[int, ...], tokens: list[int], count: int
) -> list[list[int]]:
    """Greedy blockwise decoding of the first `count` of `tokens` without a cache: for each pass, the heads whose drafts
    were right."""
    passes, done = [], 0
    while done < count:
        # The pass that decides token `done` verifies what the heads said at the last row that the pass before accepted.
        drafts: list[int] = []
        if done:
            drafts = drafts_of(model, [*prompt, *tokens[:done]])
        right = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(drafts, tokens[done:])))
        passes.append(list(range(2, 2 + len(right))))
        done += 1 + len(right)
    return passes


def test_a_pass_accepts_the_drafts_that_a_loop_without_a_cache_accepts(shape: str) -> None:
    """Their number depends on the training of the small model, which differs from machine to machine."""
    reference, model = copy.deepcopy(trained(shape)).double(), packed(shape, torch.float64)
    saved = 0
    count = 60
    for prompt in (PROMPT, tuple(b"end. that is "), tuple(b"a dog the ")):
        plain = run(model, Request(prompt, count + HEADS, Sampling(), 1))  # the last pass may accept beyond the limit
        assert plain.stats.passes == count + HEADS
        fast = run(model, Request(prompt, count, Sampling(), HEADS))
        assert fast.tokens == plain.tokens[:count] and len(fast.origins) == count
        passes = accepted_by_a_plain_loop(reference, prompt, plain.tokens, count)
        assert fast.stats.passes == len(passes)
        assert fast.stats.drafted == [len(passes) - 1] * (HEADS - 1)
        assert fast.stats.accepted == [sum(k in heads for heads in passes) for k in range(2, HEADS + 1)]
        assert fast.stats.tokens_per_pass == pytest.approx(count / len(passes))
        saved += count - len(passes)
    assert saved > 0


requests = st.lists(
    st.builds(
        Request,
        prompt=st.lists(st.integers(32, VOCABULARY - 1), min_size=1, max_size=40).map(tuple),
        max_new_tokens=st.integers(1, 40),
        sampling=st.builds(
            Sampling,
            temperature=st.sampled_from([0.0, 0.7, 1.0]),
            top_k=st.sampled_from([0, 3, 50]),
            top_p=st.sampled_from([1.0, 0.8]),
            min_p=st.sampled_from([0.0, 0.1]),
            seed=st.integers(-(2**70), 2**70),
        ),
        heads=st.integers(1, HEADS),
    ),
    min_size=1,
    max_size=6,
)


@given(
    requests=requests,
    slots=st.integers(1, 4),
    exact=st.booleans(),
    shape=st.sampled_from(["transformer-parallel", "replicated", "transformer-causal", "sequential", "eagle3"]),
)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_any_batch_mix_gives_what_each_request_gives_alone(requests, slots, exact, shape) -> None:
    model = packed(shape, torch.float32)
    together = generate_all(Engine(model, EngineConfig(slots=slots, exact=exact)), requests)
    for request, generation in zip(requests, together):
        alone = run(model, Request(request.prompt, request.max_new_tokens, request.sampling, heads=1), exact=exact)
        assert generation.tokens == alone.tokens
        assert generation.finish_reason == "length"


def test_caches_after_rollbacks_equal_a_fresh_prefill(shape: str) -> None:
    model = packed(shape, torch.float64)
    engine = Engine(model, EngineConfig(slots=2))
    generations = [engine.submit(Request(PROMPT, 200, SAMPLED, HEADS)), engine.submit(Request(PROMPT[:5], 200))]
    for _ in range(25):
        engine.step()
    for slot, generation in enumerate(generations):
        length = int(engine.state.length_S[slot])
        committed = list(generation.request.prompt) + generation.tokens
        assert length == len(committed) - 1  # the root is not cached yet
        fresh = DecodingState.empty(model, 1, engine.state.cache.capacity)
        fill(model, fresh, 0, torch.tensor(committed[:-1]), HEADS, chunk=7, root=torch.tensor(committed[-1:]))
        mine, theirs = engine.state.cache, fresh.cache
        for layer in range(len(mine.values)):
            # Sequential heads have read drafts in their last positions, which the next pass writes anew.
            right = length - (max(0, layer - model.config.trunk_layers) if model.config.carried else 0)
            for got, want in ((mine.keys_of(slot), theirs.keys_of(0)), (mine.values[:, slot], theirs.values[:, 0])):
                assert torch.allclose(got[layer, :, :right], want[layer, :, :right], atol=1e-11), layer
        assert torch.allclose(mine.carried[:, slot], theirs.carried[:, 0], atol=1e-11)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_are_what_the_heads_say_at_the_last_accepted_row_with_the_noise_of_their_position(
    shape: str, temperature: float
) -> None:
    """A draft for a wrong position costs only acceptance, so that no comparison of outputs would ever notice it."""
    reference = copy.deepcopy(trained(shape)).double()
    engine = Engine(packed(shape, torch.float64))
    generation = engine.submit(Request(PROMPT, 200, Sampling(temperature, seed=5)))
    for _ in range(12):
        engine.step()
        length = int(engine.state.length_S[0])
        committed = [*PROMPT, *generation.tokens]
        window = engine.state.windows.tokens_SW[0].tolist()
        assert window[0] == committed[length] and len(committed) == length + 1
        assert window[1:] == drafts_of(reference, committed, seed=5 if temperature else None)


@pytest.mark.parametrize("shape", ["medusa-own", "sequential-own", "sequential-normed-own", "eagle3-own"])
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_heads_that_share_less_are_decoded_alike(shape: str, sampling: Sampling) -> None:
    reference = copy.deepcopy(trained(shape)).double()
    model = packed(shape, torch.float64)
    expected = plain_reference(reference, PROMPT[:1], 40, sampling)  # a prompt shorter than what heads read ahead
    for heads in (1, 3, HEADS):
        engine = Engine(model)
        generation = engine.submit(Request(PROMPT[:1], 40, sampling, heads))
        while engine.busy:
            engine.step()
            known = [*PROMPT[:1], *generation.tokens]
            if engine.busy and heads > 1:
                seed = sampling.seed if sampling.temperature else None
                assert engine.state.windows.tokens_SW[0, 1:heads].tolist() == drafts_of(reference, known, heads, seed)
        assert generation.tokens == expected


def test_what_lies_in_the_caches_beyond_a_slots_length_does_not_matter(shape: str) -> None:
    model = packed(shape, torch.bfloat16)
    clean = run(model, Request(PROMPT, 80, SAMPLED))
    engine = Engine(model, EngineConfig(slots=1))
    engine.state.cache.keys.fill_(1e4)
    engine.state.cache.values.fill_(-1e4)
    assert generate_all(engine, [Request(PROMPT, 80, SAMPLED)])[0].tokens == clean.tokens
    # And a slot used again by another request.
    assert generate_all(engine, [Request(PROMPT[:3], 30), Request(PROMPT, 80, SAMPLED)])[1].tokens == clean.tokens


def test_deferred_heads_draft_what_fused_heads_draft(shape: str) -> None:
    model = packed(shape, torch.float64)
    deferred = run(model, Request(PROMPT, 120, SAMPLED), deferred=True)
    fused = run(model, Request(PROMPT, 120, SAMPLED), deferred=False)
    assert deferred.tokens == fused.tokens
    assert deferred.stats.accepted == fused.stats.accepted and sum(fused.stats.accepted) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_spans_of_whole_attention_blocks_do_not_change_a_bit(dtype: torch.dtype) -> None:
    """The fact that exact decoding rests on: extra masked blocks of EXACT_SPAN positions add exactly nothing."""
    generator = torch.Generator().manual_seed(0)
    capacity = 4 * 512
    for heads, kv_heads, width, rows in itertools.product((4, 8), (2, 4), (32, 64), (1, 4, 8)):
        config = ModelConfig(dim=heads * width, layers=2, attention_heads=heads, kv_heads=kv_heads, context=capacity)
        cache = KVCache(config, 1, capacity, torch.float32, "cpu")
        cache.keys.normal_(generator=generator)
        cache.values.normal_(generator=generator)
        q = torch.randn(1, heads, rows, width, generator=generator).to(dtype)
        k = torch.randn(1, kv_heads, rows, width, generator=generator).to(dtype)
        for start in (3, 150, 260, 350, 505, 700):
            positions = start + torch.arange(rows)[None]
            least = -(-(start + rows) // EXACT_SPAN) * EXACT_SPAN
            results = [
                CachedAttention(cache, slice(0, 1), positions, span)(0)(q, k, k)
                for span in (least, least + EXACT_SPAN, capacity)
            ]
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_speculation_has_the_targets_joint_distribution_by_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every outcome of a discrete noise is played through: the joint law of 4 tokens equals the chain rule's.

    A finite noise stands for the Gumbel noise: each position draws one of 3 vectors, equally likely. The target law is
    computed from the model's own logits, token by token, by summing over the noise of each position alone. (reference:
    companions of the paper, exact verification of lossless sampling.) A wrong acceptance rule must fail the same test.
    """
    torch.manual_seed(1)
    config = ModelConfig(vocab_size=3, dim=16, layers=5, attention_heads=2, heads=3, context=32)
    raw = Transformer(config).double()
    with torch.no_grad():
        for parameter in raw.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    vectors = torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 1.5
    positions, prompt = range(2, 6), (1, 2)

    law: dict[tuple[int, ...], int] = {(): 1}
    for _ in positions:
        extended: dict[tuple[int, ...], int] = {}
        for tokens, weight in law.items():
            with torch.no_grad():
                logits = raw(torch.tensor([prompt + tokens]))[0, -1]
            for token in (logits + vectors).argmax(-1).tolist():
                extended[(*tokens, token)] = extended.get((*tokens, token), 0) + weight
        law = extended

    model = pack(copy.deepcopy(raw))

    def joint(heads: int) -> tuple[dict[tuple[int, ...], int], int]:
        counts: dict[tuple[int, ...], int] = {}
        passes = 0
        for drawn in itertools.product(range(3), repeat=len(positions)):

            def noise(seeds, where, vocabulary, drawn=drawn):
                table = torch.tensor([drawn[p - 2] if p in positions else 0 for p in range(32)])
                return vectors[table[where]]

            monkeypatch.setattr(sampling_module, "position_noise", noise)
            got = run(model, Request(prompt, len(positions), Sampling(temperature=1.0), heads))
            counts[tuple(got.tokens)] = counts.get(tuple(got.tokens), 0) + 1
            passes += got.stats.passes
        return counts, passes

    plain, plain_passes = joint(1)
    fast, fast_passes = joint(3)
    assert len(law) > 5 and sum(law.values()) == 3**4
    assert plain == law and fast == law
    assert fast_passes < plain_passes

    # Negative control: accepting every draft is not lossless.
    def credulous(state: DecodingState, evidence: Evidence) -> Verdict:
        slots, tokens = evidence.slots, evidence.tokens_SR
        accepted = state.windows.drafted_S[slots].clamp_max(tokens.shape[1] - 1)
        state.length_S[slots] += accepted + 1
        state.windows.tokens_SW[slots, :1] = tokens.gather(1, accepted[:, None])
        state.windows.drafted_S[slots] = evidence.heads - 1
        return Verdict(tokens, accepted, accepted)

    monkeypatch.setattr(verify_module, "match_chain", credulous)
    assert joint(3)[0] != law
