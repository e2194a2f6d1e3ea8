"""Without tuning, decoding never loses much to plain decoding, and its output is the same."""

from __future__ import annotations

import copy

import pytest
import torch
from shapes import HEADS, packed, trained

from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.kernels.pack import pack
from headstart.decoding.policy.calibration import EDGES, PRIOR
from headstart.decoding.policy.online import AcceptanceCounts, Observations, OnlineCalibration, prior_acceptance
from headstart.decoding.policy.policy import DraftPolicy
from headstart.decoding.policy.timing import ASSUMED_ACCEPTANCE, LOOKUP_ROWS, quick_pass_costs
from headstart.decoding.settings import Request, Sampling
from headstart.formats.heads import next_token_model

PROMPT = tuple(b"the cat then")


class Costs:
    """Return fixed costs in place of timed ones; `asked` keeps the numbers of slots that were to be timed."""

    def __init__(self, first: float, row: float) -> None:
        self.first, self.row = first, row
        self.asked: list[int] = []

    def __call__(self, model, slots, sampled):
        self.asked.append(slots)
        return 1.0, tuple(self.first + self.row * i for i in range(HEADS))


def observations(costs: Costs, model=None) -> Observations:
    return Observations(model or packed("replicated", torch.float32), costs)


def policy_of(observed: Observations) -> DraftPolicy:
    return DraftPolicy(OnlineCalibration(observed))


def test_acceptance_begins_as_a_prior_and_becomes_what_is_observed() -> None:
    assert 0.3 < prior_acceptance(0.0) < prior_acceptance(0.5) < prior_acceptance(1.0) == 1.0
    counts = AcceptanceCounts(3)
    table = counts.table()
    assert len(table.mean) == 2 and table.by_confidence[0][0] == pytest.approx(prior_acceptance(EDGES[0] / 2))
    assert table.by_confidence[1][-1] == pytest.approx(prior_acceptance((EDGES[-1] + 1) / 2))
    for _ in range(96):
        counts.add([0.05, 0.99], fed=2, accepted=0)  # head 3 was never reached, so nothing is learned of it
    table = counts.table()
    assert table.mean[0] < 0.1
    assert table.by_confidence[0][0] == pytest.approx(PRIOR * prior_acceptance(EDGES[0] / 2) / (96 + PRIOR))
    assert table.by_confidence[1] == AcceptanceCounts(3).table().by_confidence[1]
    counts.add([0.05, 0.99], fed=1, accepted=1)  # fed alone: again nothing of head 3
    assert counts.table().mean[1] == table.mean[1]
    assert counts.table().mean[0] == pytest.approx((PRIOR * ASSUMED_ACCEPTANCE + 1) / (97 + PRIOR))


def test_passes_are_timed_once_at_powers_of_two() -> None:
    costs = Costs(1.0, 0.1)
    observed = observations(costs)
    for slots, expected in ((1, [1]), (1, [1]), (4, [1, 4]), (5, [1, 4, 8]), (6, [1, 4, 8]), (16, [1, 4, 8, 16])):
        policy_of(observed).plan(slots, [[]] * slots)
        assert costs.asked == expected


def test_what_was_prepared_is_not_timed_while_decoding() -> None:
    costs = Costs(1.0, 0.1)
    policy = policy_of(observations(costs))
    policy.prepare(5)
    assert sorted(costs.asked) == [1, 1, 2, 2, 4, 4, 8, 8]  # greedy and sampled
    for slots in range(1, 6):
        for sampled in (False, True):
            policy.plan(slots, [[]] * slots, sampled)
    assert len(costs.asked) == 8


@pytest.mark.parametrize("shape", ["replicated", "transformer-parallel"])
@pytest.mark.parametrize("slots", [1, 3])
def test_drafting_follows_the_costs_and_changes_no_output(shape, slots) -> None:
    # In float64 with exact=False windows have no fixed shape on any machine, so the policy decides.
    model = packed(shape, torch.float64)
    requests = [Request(PROMPT[i:], 60, Sampling(0.8 * (i % 2), seed=i)) for i in range(3)]
    plain = [g.tokens for g in generate_all(Engine(model), [Request(r.prompt, 60, r.sampling, 1) for r in requests])]
    drafted = {}
    for name, first, row in (("free", 1.0, 0.0), ("expensive", 1.5, 1.5)):
        policy = policy_of(observations(Costs(first, row), model))
        engine = Engine(model, EngineConfig(slots=slots, exact=False), policy=policy)
        got = generate_all(engine, requests)
        assert [g.tokens for g in got] == plain
        drafted[name] = sum(sum(g.stats.drafted) for g in got)
    assert drafted["expensive"] == 0 < drafted["free"]


@pytest.mark.parametrize(("row", "fed"), [(0.01, True), (2.0, False)])
def test_lookup_of_a_model_with_one_head_follows_the_costs_too(row, fed) -> None:
    model = pack(next_token_model(copy.deepcopy(trained("replicated")).double()))
    policy = policy_of(observations(Costs(1.0, row), model))
    engine = Engine(model, EngineConfig(exact=False, lookup=4), policy=policy)
    request = Request(PROMPT * 3, 80)
    found = generate_all(engine, [request])[0]
    assert found.tokens == generate_all(Engine(model, EngineConfig(exact=False)), [request])[0].tokens
    assert (found.stats.looked_up > 0) == fed


def test_drafts_that_fail_make_it_pause() -> None:
    """Drafts that their heads are sure of and that are never accepted."""
    observed = observations(Costs(1.1, 0.2))
    policy = policy_of(observed)
    sure = [0.99] * (HEADS - 1)
    assert policy.plan(1, [policy.prefixes(False, sure)]) == (HEADS, True)
    drafting = 0
    for _ in range(5_000):
        rows, drafts = policy.plan(1, [policy.prefixes(False, sure)])
        drafting += drafts
        if drafts:
            policy.learn(False, sure, rows - 1, 0)
        policy.observe(1, 1, rows, drafts, 1)
    assert drafting < 250
    assert policy.calibration.current.sampled == observed.tuning().sampled  # it fed no sampled drafts
    assert OnlineCalibration(observed).current.greedy.mean[0] < 0.4  # another engine knows it too


@pytest.mark.parametrize("odd", [16, 100, 400])
def test_wrong_drafts_do_not_stop_drafting_for_long(odd: int) -> None:
    """Passes whose drafts are all wrong, then passes whose drafts are all right."""
    policy = policy_of(observations(Costs(1.1, 0.1)))
    half_sure, plain = [0.5] * (HEADS - 1), 0
    confidences: list[float] = []
    for i in range(odd + 600):
        rows, drafts = policy.plan(1, [policy.prefixes(False, confidences)])
        kept = 0 if i < odd else rows - 1
        if confidences and rows > 1:
            policy.learn(False, confidences, rows - 1, kept)
        policy.observe(1, 1, rows, drafts, 1 + kept)
        confidences = half_sure if drafts else []
        plain += i >= odd and not drafts
    assert drafts and rows == HEADS and plain <= 128


def test_engines_of_a_model_share_timed_costs() -> None:
    costs = Costs(1.0, 0.1)
    observed = observations(costs)
    first, second = policy_of(observed), policy_of(observed)
    for policy in (first, second):
        assert policy.plan(1, [[0.9] * (HEADS - 1)]) == (HEADS, True)
    assert costs.asked == [1]
    first.plan(4, [[]])
    assert second.plan(4, [[0.9]] * 4) == (2, True) and costs.asked == [1, 4]


def test_passes_of_a_model_with_one_head_are_timed_for_the_rows_of_lookup() -> None:
    plain, rows = quick_pass_costs(pack(next_token_model(trained("replicated"))), 2, False)
    assert plain > 0 and len(rows) == LOOKUP_ROWS and list(rows) == sorted(rows)


def test_timed_costs_are_positive_and_ascending() -> None:
    plain, drafting = quick_pass_costs(packed("replicated", torch.float32), 2, True)
    assert plain > 0 and len(drafting) == HEADS
    assert list(drafting) == sorted(drafting)
