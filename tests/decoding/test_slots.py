"""Requests that come and go: their order, prompts read in chunks, prefixes used again. None of it changes an output."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from shapes import HEADS, packed, trained
from torch import Tensor

from headstart.decoding import scheduler as scheduler_module
from headstart.decoding.cache import CachedAttention
from headstart.decoding.decode_pass import decode_pass, prefill
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.generation import Generation
from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.kernels.pack import pack
from headstart.decoding.scheduler import SHORTEST, Slots, common_prefix
from headstart.decoding.settings import Penalties, Request, Sampling
from headstart.decoding.state import DecodingState, PassPlan
from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

TEXT = tuple(b"the cat then a dog that is end. then a dog the cat that is that is the cat end. " * 6)
SAMPLED = Sampling(temperature=1.0, seed=11)
WAYS = {"compiled": True, "fixed shapes": False}
"""True: the compiled kernels are used. Both ways are exact to the bit, by other means."""


@pytest.fixture(params=list(WAYS))
def model(request: pytest.FixtureRequest) -> Transformer:
    return way(request.param)


def way(name: str, shape: str = "transformer-causal") -> Transformer:
    model = packed(shape, torch.float32, WAYS[name])
    if backend_of(model).row_exact != WAYS[name]:
        pytest.skip("no compiled kernels here")
    return model


def alone(model: Transformer, request: Request) -> Generation:
    return generate_all(Engine(model, EngineConfig(prefix_reuse=False, prefill_budget=None)), [request])[0]


def rows(engine: Engine, slot: int, count: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the first positions of a slot."""
    cache = engine.state.cache
    return cache.keys_of(slot)[..., :count, :].clone(), cache.values[:, slot, :, :count].clone()


def same_rows(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


def finish(engine: Engine) -> None:
    for _ in engine.run():
        pass


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(slot, start, size) of every chunk of a prompt, as it is read."""
    seen: list[tuple[int, int, int]] = []

    def recorded(model, state, piece, score=None) -> None:
        seen.append((piece.slot, piece.start, len(piece.tokens_T)))
        prefill(model, state, piece, score)

    monkeypatch.setattr(scheduler_module, "prefill", recorded)
    return seen


# Prompts in chunks


@pytest.mark.parametrize("budget", [1, 30])
def test_a_long_prompt_never_stalls_the_others_for_more_than_the_budget(model, budget, chunks) -> None:
    engine = Engine(model, EngineConfig(slots=2, prefill_budget=budget, prefix_reuse=False))
    short = engine.submit(Request(TEXT[3:5], 200))
    while not short.tokens:
        engine.step()
    long = engine.submit(Request(TEXT[:100], 20))
    while not long.tokens and not short.finished:
        chunks.clear()
        before = len(short.tokens)
        engine.step()
        assert sum(size for _, _, size in chunks) <= budget
        assert len(short.tokens) > before
    finish(engine)
    assert short.tokens == alone(model, short.request).tokens and long.tokens == alone(model, long.request).tokens


@pytest.mark.parametrize("budget", [5, 64, None])
def test_mixed_prompts_in_few_slots_give_what_each_gives_alone(model, budget) -> None:
    prompts = [TEXT[i : i + size] for i, size in enumerate((150, 1, 40, 2, 300, 17))]
    requests = [Request(p, 12, SAMPLED if i % 2 else Sampling()) for i, p in enumerate(prompts)]
    generations = generate_all(Engine(model, EngineConfig(slots=2, prefill_budget=budget)), requests)
    for request, generation in zip(requests, generations):
        assert generation.tokens == alone(model, request).tokens


def test_a_prompts_rows_do_not_depend_on_its_chunks_with_compiled_kernels() -> None:
    model = way("compiled")
    found = []
    for budget in (1, 7, 50, None):
        engine = Engine(model, EngineConfig(prefill_budget=budget))
        generation = engine.submit(Request(TEXT[:130], 1))
        while not generation.finished:
            engine.step()
        found.append(rows(engine, 0, 129))
    assert all(same_rows(found[0], other) for other in found[1:])


def test_with_fixed_shapes_a_prompt_is_cut_the_same_whatever_else_is_read(chunks) -> None:
    model = way("fixed shapes")
    engine = Engine(model, EngineConfig(slots=3, prefill_budget=48))
    for size in (70, 100, 5):
        engine.submit(Request(TEXT[size : 2 * size], 30))
    engine.step()
    assert chunks == [(0, 0, 48)]
    finish(engine)
    # 21 of 48 are left when the second prompt begins: too few for its first chunk, which waits for the next step.
    assert chunks == [(0, 0, 48), (0, 48, 21), (1, 0, 48), (1, 48, 48), (1, 96, 3), (2, 0, 4)]


def test_first_come_first_served(model) -> None:
    engine = Engine(model, EngineConfig(slots=2, prefill_budget=20, prefix_reuse=False))
    generations = [engine.submit(Request(TEXT[i : i + size], 8)) for i, size in enumerate((90, 3, 60, 2, 30))]
    begun: list[Generation] = []
    while engine.busy:
        for generation, _ in engine.step():
            if generation not in begun:
                begun.append(generation)
    # Both of the first step's slots: the long prompt came first and is read first.
    assert begun == generations


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="prefill_budget is 0"):
        Engine(packed("replicated", torch.float32), EngineConfig(prefill_budget=0))


def test_a_slot_is_free_when_its_request_is_cancelled_in_the_middle_of_its_prompt(model) -> None:
    engine = Engine(model, EngineConfig(prefill_budget=32))
    first, second = engine.submit(Request(TEXT[:200], 20)), engine.submit(Request(TEXT[7:20], 20))
    waiting = engine.submit(Request(TEXT[:9], 20))
    engine.step()
    assert not first.tokens and engine.busy
    engine.cancel(first)
    engine.cancel(waiting)
    engine.cancel(waiting)
    assert first.finish_reason == waiting.finish_reason == "cancelled"
    finish(engine)
    assert second.tokens == alone(model, second.request).tokens and not waiting.tokens
    engine.cancel(second)  # long finished
    assert second.finish_reason == "length"


# Prefixes used again


def from_live(engine: Engine) -> None:
    engine.submit(Request(TEXT[:200], 400))
    engine.step()


def from_idle(engine: Engine) -> None:
    generate_all(engine, [Request(TEXT[:200], 10)])


def from_cancelled(engine: Engine) -> None:
    first = engine.submit(Request(TEXT[:300], 10))
    while len(engine.scheduler.slots.held[0].tokens) < 160:
        engine.step()
    engine.cancel(first)


@pytest.mark.parametrize("donate", [from_live, from_idle, from_cancelled])
@pytest.mark.parametrize("slots", [1, 3])
def test_a_prompt_goes_on_from_what_a_slot_holds_of_it(
    model: Transformer, donate: Callable[[Engine], None], slots: int
) -> None:
    if slots == 1 and donate is from_live:
        return
    engine = Engine(model, EngineConfig(slots=slots, prefill_budget=32))
    donate(engine)
    request = Request(TEXT[:150] + TEXT[20:60], 40, SAMPLED)
    generation = engine.submit(request)
    while not generation.finished:
        engine.step()
    # With fixed shapes whole chunks of 32 are taken.
    found = common_prefix(request.prompt, TEXT)
    assert generation.stats.prompt_tokens_reused == (found if backend_of(model).row_exact else found // 32 * 32) >= 128
    plain = Engine(model, EngineConfig(prefix_reuse=False, prefill_budget=32))
    want = generate_all(plain, [request])[0]
    assert generation.tokens == want.tokens and generation.stats.accepted == want.stats.accepted
    assert want.stats.prompt_tokens_reused == 0
    count = len(request.prompt) - 1
    assert same_rows(rows(engine, generation.slot, count), rows(plain, 0, count))


def test_of_equal_prompts_at_once_the_first_is_read_and_the_others_take_it(model, chunks) -> None:
    requests = [Request(TEXT[:150], 20, Sampling(1.0, seed=seed)) for seed in range(3)]
    generations = generate_all(Engine(model, EngineConfig(slots=3)), requests)
    assert [g.stats.prompt_tokens_reused for g in generations] == [0, 149, 149]
    assert sum(size for _, _, size in chunks) == 149
    for request, generation in zip(requests, generations):
        assert generation.tokens == alone(model, request).tokens


def test_a_conversation_goes_on_in_its_slot(chunks) -> None:
    """The next prompt is the last sequence and more: only the rest is read, also next to other conversations."""
    model = way("compiled")
    engine = Engine(model, EngineConfig(slots=3))
    prompts = [TEXT[:60], TEXT[5:70]]
    for turn in range(3):
        for i, text in enumerate(prompts):
            chunks.clear()
            generation = generate_all(engine, [Request(text, 15)])[0]
            assert sum(size for _, _, size in chunks) <= (14 if turn else 100)
            assert generation.tokens == alone(model, generation.request).tokens
            prompts[i] = (*text, *generation.tokens, *TEXT[i : i + 14])


@pytest.mark.parametrize("shape", ["transformer-causal", "transformer-anticausal", "replicated"])
def test_heads_take_no_prefix_that_they_have_not_read(shape: str) -> None:
    """A head with holes in its cache would draft worse: no output shows it, the drafts accepted do."""
    model = way("compiled", shape)
    engine = Engine(model, EngineConfig(slots=2))
    generate_all(engine, [Request(TEXT[:100], 30, heads=1)])
    whole = Request(TEXT[:120], 60)
    want = alone(model, whole)
    got = generate_all(engine, [whole])[0]
    free = shape in ("transformer-anticausal", "replicated")  # the way to head 1 leads over all heads, or over none
    assert (got.stats.prompt_tokens_reused > 0) == free
    assert got.tokens == want.tokens and got.stats.accepted == want.stats.accepted
    fewer = Request(TEXT[:110] + TEXT[:9], 60, heads=2)
    got, want = generate_all(engine, [fewer])[0], alone(model, fewer)
    assert got.stats.prompt_tokens_reused >= 110
    assert got.tokens == want.tokens and got.stats.accepted == want.stats.accepted


def test_what_a_head_has_missed_is_not_taken_for_it() -> None:
    config = ModelConfig(heads=3, layers=6)
    slots = Slots(1, config, None, True, True)
    slots.filled(0, TEXT[:50], 3)
    held = slots.held[0]
    held.root = TEXT[50]
    slots.wrote(0, TEXT[51:54], 3)
    slots.wrote(0, TEXT[54:70], 1)
    slots.wrote(0, TEXT[70:80], 3)
    assert held.tokens == list(TEXT[:79]) and held.root == TEXT[79]
    assert held.heads == [79, 53, 53]
    assert [held.usable(TEXT, k, None) for k in (1, 2, 3)] == [79, 53, 53]
    assert held.cut(60).heads == [60, 53, 53]


def test_lookup_penalties_and_logprobs_are_right_with_a_prefix_used_again() -> None:
    model = way("compiled")
    request = Request(TEXT[:150], 40, SAMPLED, penalties=Penalties(1.3, 0.2, 0.1), logprobs=1)
    engine = Engine(model, EngineConfig(slots=2, lookup=4))
    generate_all(engine, [Request(TEXT[:200], 40, penalties=Penalties(bias=((101, -5.0),)))])
    got = generate_all(engine, [request])[0]
    want = generate_all(Engine(model, EngineConfig(lookup=4, prefix_reuse=False)), [request])[0]
    assert got.stats.prompt_tokens_reused == 149
    assert got.tokens == want.tokens == alone(model, request).tokens and got.logprobs == want.logprobs


@pytest.mark.parametrize("exact", [True, False])
def test_reuse_changes_nothing_in_a_queue_of_texts_that_branch(model, exact: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    requests = []
    for seed in range(14):
        cut, end = torch.randint(20, 200, (2,), generator=generator).tolist()
        heads = (None, 2, 1)[seed % 3]
        requests.append(
            Request(TEXT[: cut + 1] + TEXT[end : end + seed], 6 + seed, Sampling(seed % 2, seed=seed), heads)
        )
    found = [
        generate_all(Engine(model, EngineConfig(slots=3, prefill_budget=40, prefix_reuse=reuse, exact=exact)), requests)
        for reuse in (True, False)
    ]
    assert [g.tokens for g in found[0]] == [g.tokens for g in found[1]]
    assert sum(g.stats.prompt_tokens_reused for g in found[0]) > 400


def test_so_it_is_in_blocks() -> None:
    model = pack(copy.deepcopy(trained("transformer-causal")), quantize="q4")
    if not backend_of(model).row_exact:
        pytest.skip("no compiled kernels here")
    requests = [Request(TEXT[:size], size // 4, SAMPLED if size % 2 else Sampling()) for size in (100, 20, 99, 60, 31)]
    generations = generate_all(Engine(model, EngineConfig(slots=3, prefill_budget=32)), requests)
    assert sum(g.stats.prompt_tokens_reused for g in generations) > 150
    for request, generation in zip(requests, generations):
        assert generation.tokens == alone(model, request).tokens


def test_prefixes_are_shared_by_requests_of_one_salt_alone() -> None:
    """Copied from slots in use or left, however requests are admitted; the output does not depend on it."""
    model, engine = way("compiled"), Engine(way("compiled"), EngineConfig(slots=3))
    asked = [Request(TEXT[:100] + TEXT[i : i + 5], 4, cache_salt=salt) for i, salt in enumerate("aabba")]
    reused = [generation.stats.prompt_tokens_reused for generation in generate_all(engine, asked)]
    assert [count >= 100 for count in reused] == [False, True, False, True, True] and reused[0] == reused[2] == 0
    for salt, some in (("a", True), ("b", True), ("", False), ("c", False)):
        request = Request(TEXT[:120], 4, cache_salt=salt)
        found = generate_all(engine, [request])[0]
        assert (found.stats.prompt_tokens_reused > 0) == some, salt
        assert found.tokens == alone(model, request).tokens


def test_a_slot_that_changes_hands_holds_the_new_salt() -> None:
    engine = Engine(way("compiled"), EngineConfig(slots=1))
    for salt, reused in (("a", False), ("b", False), ("a", False), ("a", True)):
        found = generate_all(engine, [Request(TEXT[:100], 1, cache_salt=salt)])[0]
        assert (found.stats.prompt_tokens_reused > 0) == reused


def test_a_prompt_given_up_before_its_turn_leaves_the_slot_to_its_former_salt() -> None:
    engine = Engine(way("compiled"), EngineConfig(slots=2, prefill_budget=8))
    generate_all(engine, [Request(TEXT[:60], 1, cache_salt="a"), Request(TEXT[100:160], 1, cache_salt="a")])
    first, second = (engine.submit(Request(TEXT[200:300], 1, cache_salt="b")) for _ in range(2))
    engine.step()  # the second one has a slot, and waits for the first one's prompt
    assert second.slot is not None and engine.scheduler.slots.held[second.slot].salt == "a"
    engine.cancel(second)
    engine.cancel(first)
    assert generate_all(engine, [Request(TEXT[200:300], 1, cache_salt="a")])[0].stats.prompt_tokens_reused == 0


# Which slot


def holding(*sequences: tuple[int, ...], chunk: int | None = None, compact: bool = True) -> Slots:
    """Slots that were left in this order; an empty one was never used."""
    slots = Slots(len(sequences), ModelConfig(heads=1), chunk, compact, True)
    for slot, text in enumerate(sequences):
        if text:
            slots.filled(slot, text, 1)
            slots.freed(slot)
    return slots


def test_a_request_goes_where_least_is_lost() -> None:
    prompt = TEXT[:100]
    other = TEXT[40:120]
    assert holding(other, TEXT[:50], ()).place(prompt, 1, [0, 1, 2], []) == (1, 1)  # it continues that text
    assert holding(other, other, ()).place(prompt, 1, [0, 1, 2], []) == (2, 2)  # an empty one
    assert holding(other, other).place(prompt, 1, [0, 1], []) == (0, 0)  # the one that was left first
    assert holding(TEXT[:90] + other, other).place(prompt, 1, [0, 1], []) == (0, 0)


def test_slots_that_are_decoded_lie_close_together() -> None:
    prompt, other = TEXT[:100], TEXT[40:120]
    slots = holding((), other, other, ())
    # Slot 3 is empty, but would widen the pass: what slot 1 holds goes there instead.
    assert slots.place(prompt, 1, [1, 2, 3], [0]) == (1, 3)
    assert holding((), other, ()).place(prompt, 1, [1, 2], [0]) == (1, 2)
    assert holding((), other, other).place(prompt, 1, [1, 2], [0]) == (1, 1)
    # Where every pass runs over all slots there is nothing to move.
    assert holding((), other, (), compact=False).place(prompt, 1, [1, 2], [0]) == (2, 2)


def test_what_makes_room_for_a_request_can_be_used_again() -> None:
    model = way("compiled")
    engine = Engine(model, EngineConfig(slots=4))
    prompts = [TEXT[40:120], TEXT[:30], TEXT[11:90]]
    first, long, _ = (engine.submit(Request(text, size)) for text, size in zip(prompts, (5, 500, 15)))
    while len([g for g in engine.scheduler.live if g is not None]) != 1 or not first.finished:
        engine.step()
    kept = rows(engine, 0, 79)
    new, again = Request(TEXT[7:77], 5, SAMPLED), Request(prompts[0], 5, SAMPLED)
    # The new text takes the slot that was left first, and what lay there goes to the empty one; from where the next
    # request takes it back, in exchange for what lies in slot 2.
    for request, slot, reused, kept_in in ((new, 0, 0, 3), (again, 2, 79, 2)):
        generation = engine.submit(request)
        while not generation.finished:
            engine.step()
        assert generation.slot == slot and generation.stats.prompt_tokens_reused == reused
        assert generation.tokens == alone(model, request).tokens
        assert same_rows(rows(engine, kept_in, 79), kept)
    engine.cancel(long)


@pytest.mark.parametrize(("a", "b", "want"), [("", "x", 0), ("abc", "abd", 2), ("abc", "abcde", 3), ("x", "y", 0)])
def test_common_prefix(a: str, b: str, want: int) -> None:
    assert common_prefix(a.encode(), tuple(b.encode())) == common_prefix(list(b.encode()), a.encode()) == want


def test_with_fixed_shapes_only_whole_chunks_count() -> None:
    held = holding(TEXT[:70]).held[0]
    for prompt, want in (
        (TEXT[:71], 70),
        (TEXT[:100], 64),
        (TEXT[:70], 64),
        (TEXT[:40] + TEXT[:9], 32),
        (TEXT[:20], 0),
    ):
        assert held.usable(prompt, 1, 32) == want
    assert held.usable(TEXT[: SHORTEST + 1], 1, None) == SHORTEST and held.usable(TEXT[:SHORTEST], 1, None) == 0
    held.add(TEXT[70:100], 1)  # written in windows
    assert held.usable(TEXT[:101], 1, 32) == 64


# Slots that take no part


@pytest.mark.parametrize("shape", ["transformer-causal", "replicated"])
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("slots", [2, 4])
def test_a_pass_over_a_slot_without_a_request_leaves_what_it_holds(name: str, shape: str, slots: int) -> None:
    model = way(name, shape)
    engine = Engine(model, EngineConfig(slots=slots))
    requests = [Request(TEXT[i : i + 50], (4, 40)[i != slots - 2], SAMPLED) for i in range(slots)]
    generations = [engine.submit(request) for request in requests]
    idle = slots - 2
    while not generations[idle].finished:
        engine.step()
    held = engine.scheduler.slots.held[idle].tokens
    kept = rows(engine, idle, len(held))
    finish(engine)
    assert same_rows(kept, rows(engine, idle, len(held)))
    for generation in generations:
        assert generation.tokens == alone(model, generation.request).tokens


def test_slots_without_a_request_cost_no_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The windows of the live slots alone go through trunk and unembedding, and give what each gives alone."""
    model = way("compiled")
    every = [Request(TEXT[i : i + 20], 3 if i % 2 else 12, SAMPLED, heads=1 + i % 3) for i in range(5)]
    fed: list[int] = []
    product = type(model.unembedding).forward

    def counted(self: Transformer, z: Tensor, *arguments: object) -> Tensor:
        fed.append(len(z))
        return product(self, z, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(type(model.unembedding), "forward", counted)
        together = generate_all(Engine(model, EngineConfig(slots=5, prefix_reuse=False)), every)
    assert fed[0] == 5 and fed[-1] <= 3  # slots 0, 2 and 4 are still decoded
    assert [g.tokens for g in together] == [alone(model, request).tokens for request in every]


def test_reads_are_bounded_by_the_longest_live_slot(model) -> None:
    spans: list[tuple[int, int]] = []
    engine = Engine(model, EngineConfig(slots=3))
    decode = engine.decode_pass

    def recorded(plan: PassPlan):
        spans.append((plan.span, max(plan.starts) + plan.rows))
        return decode(plan)

    engine.decode_pass = recorded
    generate_all(engine, [Request(TEXT[:400], 150)])
    spans.clear()
    generate_all(engine, [Request(TEXT[9:19], 30), Request(TEXT[3:6], 5)])
    assert all(needed <= span < needed + engine.step_span for span, needed in spans)
    assert max(needed for _, needed in spans) <= 10 + 30 + HEADS


@pytest.mark.parametrize("shape", ["transformer-causal", "replicated"])
def test_a_text_that_overflowed_does_not_reach_the_next_one_in_its_slot(model, shape: str) -> None:
    request = Request(TEXT[3:60], 60, SAMPLED)
    engine = Engine(model, EngineConfig(slots=2))
    generate_all(engine, [Request(TEXT[:200], 20), Request(TEXT[1:90], 20)])
    for slot, held in enumerate(engine.scheduler.slots.held):
        beyond = len(held.tokens) + HEADS
        cache = engine.state.cache
        cache.values[:, slot, :, :beyond] = float("nan")
        # Whatever a key is, the compiled kernels mask it.
        cache.keys[:, slot, :, : None if cache.compiled else beyond] = float("nan")
    got = generate_all(engine, [request, Request(TEXT[30:500], 200)])
    for generation in got:
        assert generation.stats.prompt_tokens_reused == 0
        assert generation.tokens == alone(model, generation.request).tokens


def test_nor_does_one_that_was_cancelled_while_its_prompt_was_read(model) -> None:
    engine = Engine(model, EngineConfig(prefill_budget=32))
    from_cancelled(engine)
    engine.state.cache.values[:, 0, :, :160] = float("nan")
    request = Request(TEXT[3:20], 40, SAMPLED)
    assert generate_all(engine, [request])[0].tokens == alone(model, request).tokens


def test_a_parked_slot_computes_nothing_that_is_not_finite(model) -> None:
    state = DecodingState.empty(model, 2, 64)
    assert state.parked == -HEADS
    state.length_S[:] = torch.tensor([state.parked, 5])
    state.cache.keys.fill_(3.0)
    state.cache.values.fill_(3.0)
    decode_pass(model, state, PassPlan(slice(0, 2), HEADS, HEADS, 64, [state.parked, 5], keep_logits=True))
    assert state.logits_SRV is not None and state.logits_SRV.isfinite().all()
    assert (state.cache.values[:, 0, :, : 64 - HEADS] == 3).all()
    if not state.cache.compiled:  # not every attention makes a number of a row that sees nothing
        attention = CachedAttention(state.cache, slice(0, 2), torch.tensor([[-2, -1], [5, 6]]), 64)
        assert attention._mask(None).any(-1).all()
