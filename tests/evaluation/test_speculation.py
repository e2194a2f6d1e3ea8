"""Metrics of speculative decoding against counting them pass by pass, and against the engine's own counts."""

from __future__ import annotations

import json

import pytest
import torch

from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.kernels.pack import pack
from headstart.decoding.settings import Request, Rule, Sampling
from headstart.evaluation.intervals import resample
from headstart.evaluation.speculation import Answer, Pair, acceptance, by_place, by_position, decode_all, summarize
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer


def answer(steps: list[tuple[int, int]], seconds: float = 1.0, prompt_seconds: float = 0.5) -> Answer:
    drafted, accepted = [d for d, _ in steps], [a for _, a in steps]
    return Answer(
        "",
        10,
        sum(accepted) + len(steps),
        seconds,
        prompt_seconds,
        len(steps),
        sum(drafted),
        sum(accepted),
        4,
        drafted,
        accepted,
    )


STEPS = [(0, 0), (3, 3), (3, 1), (2, 0), (4, 2), (1, 1), (0, 0)]


def test_fields_of_vllm() -> None:
    found = acceptance([answer(STEPS[:4]), answer(STEPS[4:])])
    assert found == {
        "mean_acceptance_length": 1 + 7 / 5,  # five passes had drafts
        "draft_acceptance_rate": 7 / 13,
        "num_accepted_draft_tokens": 7,
        "num_draft_tokens": 13,
        "num_spec_tokens": 4,
        "num_spec_steps": 5,
        "acceptance_histogram": [1, 2, 1, 1, 0],
        "acceptance_histogram_by_draft_length": {"1": [0, 1], "2": [1, 0, 0], "3": [0, 1, 0, 1], "4": [0, 0, 1, 0, 0]},
    }


def test_acceptance_by_position_by_both_definitions() -> None:
    rows = {row["position"]: row for row in by_position([answer(STEPS)])}
    assert [rows[j]["fed"] for j in (1, 2, 3, 4)] == [5, 4, 3, 1]
    assert [rows[j]["unconditional"] for j in (1, 2, 3, 4)] == [4 / 5, 2 / 4, 1 / 3, 0]
    assert [rows[j]["conditional"] for j in (1, 2, 3, 4)] == [4 / 5, 2 / 3, 1 / 2, 0]  # draft 4 was never reached
    assert rows[4]["reached"] == 0


def test_places_hold_the_passes_that_begin_there() -> None:
    steps = [(1, 1)] * 40 + [(1, 0)] * 60  # 80 tokens at two a pass, then 60 at one
    rows = by_place([answer(steps)])
    assert [(row["from"], row["to"], row["passes"]) for row in rows] == [(1, 64, 32), (65, 128, 56), (129, 256, 12)]
    assert [row["tokens_per_pass"] for row in rows] == [2, pytest.approx((16 + 48) / 56), 1]
    cut = answer(steps)
    cut.tokens = 79  # the last tokens of an answer may lie beyond its end
    assert by_place([cut])[0]["tokens_per_pass"] == 2
    cut.ordered = False
    assert by_place([cut]) == []


def test_speed_up_is_time_per_token_with_and_without_the_prompt() -> None:
    pairs = [
        Pair([answer([(1, 1)] * 5, 2.0, 1.0)], [answer([(0, 0)] * 5, 3.0, 1.0)], equal=1),
        Pair([answer([(1, 0)] * 10, 4.0, 1.0)], [answer([(0, 0)] * 20, 12.0, 1.0)]),
    ]
    found = summarize(pairs)
    assert found["speedup"]["value"] == pytest.approx((15 / 25) / (6 / 20))
    assert found["speedup_with_prompt"]["value"] == pytest.approx((17 / 25) / (8 / 20))
    assert found["tokens_per_pass"]["value"] == 20 / 15
    assert (found["equal"], found["compared"], found["prompts"]) == (1, 2, 2)
    low, high = found["tokens_per_pass"]["low"], found["tokens_per_pass"]["high"]
    assert low == 1 and high == 2  # both prompts are the first, or both the second
    alone = summarize([Pair([answer(STEPS)])])
    assert "speedup" not in alone and alone["tokens_per_pass"]["low"] == alone["tokens_per_pass"]["high"]


def test_answers_without_counts_of_drafts_have_no_tau() -> None:
    found = summarize([Pair([Answer("a b", 3, 2, 1.0, 0.5)])])
    assert found["tokens_per_second"] == 2 and "tokens_per_pass" not in found and "speculative_decoding" not in found
    totals = Answer("a b", 3, 20, 1.0, 0.5, 10, 30, 10)  # llama.cpp's
    found = summarize([Pair([totals])])
    assert found["tokens_per_pass"]["value"] == 2 and found["acceptance_by_position"] == []
    assert found["speculative_decoding"] == {
        "draft_acceptance_rate": 1 / 3,
        "num_accepted_draft_tokens": 10,
        "num_draft_tokens": 30,
        "num_spec_tokens": 0,
    }


def test_intervals_narrow_with_prompts_and_hold_the_ratio() -> None:
    few, many = (resample([(1, 1), (3, 1)] * n, lambda a, b: a / b) for n in (4, 400))
    assert few.value == many.value == 2
    assert few.low < many.low < 2 < many.high < few.high
    assert many.high - many.low == pytest.approx(2 * 1.645 / 800**0.5, rel=0.15)


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=50, dim=16, layers=2, attention_heads=2, context=128, heads=3, head_kind="replicated"
    )
    return pack(Transformer(config))


@pytest.mark.parametrize(("slots", "lookup", "temperature"), [(1, 0, 0.0), (3, 0, 1.0), (2, 4, 0.0), (2, 4, 0.5)])
def test_passes_are_those_that_the_engine_counts(model, slots, lookup, temperature) -> None:
    """The drafts of passes, read off after each step, add up to the engine's counts of each generation."""
    requests = [
        Request(tuple(range(1 + i, 9 + i)) * 2, 40, Sampling(temperature, seed=i), acceptance=Rule("match"))
        for i in range(4)
    ]
    config = EngineConfig(slots=slots, lookup=lookup)
    found = decode_all(Engine(model, config), requests)
    generations = generate_all(Engine(model, config), requests)
    for ours, theirs in zip(found, generations):
        stats = theirs.stats
        assert ours.output == theirs.tokens and ours.finish_reason == theirs.finish_reason
        assert ours.passes == stats.passes == len(ours.per_step_drafted) == len(ours.per_step_accepted)
        assert ours.num_draft_tokens == sum(ours.per_step_drafted) == sum(stats.drafted) + stats.looked_up
        assert sum(ours.per_step_accepted) == sum(stats.accepted) + stats.looked_up_accepted
        assert ours.tokens == stats.tokens + stats.ends
        assert max(ours.per_step_drafted) <= ours.num_spec_tokens == 2 + lookup
        beyond = sum(ours.per_step_accepted) + ours.passes - ours.tokens
        assert 0 <= beyond <= ours.per_step_accepted[-1]  # of the last pass alone
    accepted = sum(sum(each.per_step_accepted) for each in found)
    assert accepted if lookup and not temperature else True  # loops are looked up


def test_trees_count_all_their_nodes(model) -> None:
    from headstart.decoding.drafters.tree import DraftTree

    engine = Engine(model, EngineConfig(slots=1, tree=DraftTree.parse("0,1,0.0,0.1")))
    [found] = decode_all(engine, [Request((1, 2, 3), 20)])
    assert max(found.per_step_drafted) == 2 and found.num_draft_tokens > sum(found.per_step_drafted)


def test_a_record_gives_the_answer_back() -> None:
    whole = answer(STEPS)
    record = json.loads(json.dumps(whole.record()))
    assert Answer(**record) == whole and "output" not in record and "ordered" not in record
