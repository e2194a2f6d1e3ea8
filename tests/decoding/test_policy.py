"""The policy chooses how many drafts are fed by their value, and its choice changes speed alone."""

from __future__ import annotations

import json
import random

import pytest
import torch
from policies import RandomRows, acceptance, tuning
from shapes import HEADS, packed

from headstart.decoding.drafters.tree import DraftTree
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.generation import Generation
from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.policy.calibration import (
    PRIOR,
    AcceptanceTable,
    PassCosts,
    Tuning,
    add_tuning,
    machine_key,
    parse_tuning,
)
from headstart.decoding.policy.policy import DraftPolicy
from headstart.decoding.policy.timing import Step
from headstart.decoding.settings import Request, Sampling
from headstart.errors import UsageError

PROMPT = tuple(b"the cat then")
SURE, UNSURE = 0.99, 0.05


def test_a_file_keeps_the_acceptance_of_quantized_weights_apart() -> None:
    model = packed("replicated", torch.float32)
    here = machine_key(model)
    plain, quantized = tuning(1.2, 0.1), tuning(1.2, 0.1, table=acceptance(0.5))
    content = add_tuning(None, here, plain, {})
    content = add_tuning(content, here | {"dtype": "q4"}, quantized, {})
    found = parse_tuning(json.loads(json.dumps(content)), model)
    assert found is not None and found.greedy == plain.greedy
    assert content["acceptance_q4"]["greedy"]["mean"] == quantized.greedy.mean


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("acceptance", "greedy", "mean", 0), 1.5, "a share of right drafts is 1.5"),
        (("acceptance", "sampled", "by_confidence", 0, 3), float("nan"), "a share of right drafts is nan"),
        (("acceptance", "greedy", "mean", 0), "x", "a share of right drafts is 'x'"),
        (("acceptance", "greedy", "mean"), [0.5] * 100_000, "not of a model"),
        (("acceptance", "greedy", "by_confidence", 0), [0.5] * 100_000, "not of a model"),
        (("acceptance", "greedy", "rank_mean"), [[0.5]], "not of a model"),
        (("acceptance", "edges"), [0.5], "not of a model"),
        (("costs", 0, "plain", 0), float("inf"), "the milliseconds of a pass is inf"),
        (("costs", 0, "plain", 0), 10**400, "the milliseconds of a pass is 1000"),
        (("costs", 0, "drafting", 0, 0), 0, "a pass of 0 ms"),
        (("costs", 0, "slots", 0), 10**12, "a batch size is 1000000000000"),
        (("costs", 0, "slots", 0), True, "a batch size is True"),
        (("costs", 0, "slots"), [1, 1], "ascending batch sizes"),
        (("costs", 0, "slots"), [], "ascending batch sizes"),
        (("costs", 0, "tree_rows"), [10**9], "the rows of a tree is 1000000000"),
        (("costs", 0, "tree_rows"), [2], ""),
        (("costs", 0, "tree"), [[1.0] * 5], "its costs of trees"),
        (("costs", 0, "draft_tree"), ",".join(map(str, range(5000))), "more than 1,024 nodes"),
    ],
)
def test_numbers_of_a_file_that_no_measurement_gives_are_refused(path: tuple, value: object, said: str) -> None:
    model = packed("replicated", torch.float32)
    content = json.loads(json.dumps(add_tuning(None, machine_key(model), tuning(1.2, 0.1), {})))
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    if said:
        with pytest.raises(UsageError, match=said):
            parse_tuning(content, model)
    else:
        assert parse_tuning(content, model) is not None


def test_acceptance_is_conditional_and_sorted_by_confidence() -> None:
    # Head 2 is right if it is sure; head 3 counts only if head 2 was right.
    observed = [([SURE, 0.55], 2)] * 30 + [([SURE, 0.55], 1)] * 10 + [([UNSURE, 0.55], 0)] * 60
    found = AcceptanceTable.from_passes(observed, 3)
    assert found.mean == (pytest.approx(40.5 / 101), pytest.approx(30.5 / 41))
    sure, unsure = found.by_confidence[0][-1], found.by_confidence[0][0]
    assert sure == pytest.approx((40 + PRIOR * found.mean[0]) / (40 + PRIOR))
    assert unsure == pytest.approx((PRIOR * found.mean[0]) / (60 + PRIOR))
    assert found.by_confidence[1][5] == pytest.approx((30 + PRIOR * found.mean[1]) / (40 + PRIOR))
    assert found.by_confidence[1][0] == found.mean[1]  # never seen
    assert found.prefixes([SURE, 0.55]) == [sure, pytest.approx(sure * found.by_confidence[1][5])]
    assert found.prefixes([]) == []


def test_costs_between_and_beyond_the_batch_sizes_measured() -> None:
    costs = PassCosts((1, 4), (1.0, 2.5), ((1.2, 1.4, 1.3), (3.0, 4.0, 5.0)))
    assert costs.at(1) == (1.0, (1.2, 1.4, 1.4))  # more rows are never cheaper
    plain, rows = costs.at(2)
    assert plain == pytest.approx(1.5) and rows == pytest.approx((1.8, 2.2667, 2.5333), abs=1e-3)
    plain, rows = costs.at(8)
    assert plain == pytest.approx(4.5) and rows == pytest.approx((5.4, 7.4667, 9.9333), abs=1e-3)


def test_the_policy_feeds_the_drafts_that_are_worth_their_rows() -> None:
    policy = DraftPolicy(tuning(first=1.05, row=0.1))
    sure, unsure = policy.prefixes(False, [SURE] * 3), policy.prefixes(False, [UNSURE] * 3)
    assert policy.plan(1, [sure]) == (4, True)
    assert policy.plan(1, [unsure]) == (1, True)
    assert policy.plan(1, [policy.prefixes(False, [SURE, UNSURE, SURE])]) == (2, True)
    assert policy.plan(1, [[]]) == (1, True)  # no drafts yet: they are made
    dear = DraftPolicy(tuning(first=1.0, row=1.1))
    assert dear.plan(1, [sure]) == (1, True)
    # In a batch all windows have the same length, so their gain together counts.
    assert policy.plan(1, [sure, unsure]) == (4, True)
    assert policy.plan(1, [sure, *[unsure] * 19]) == (1, True)
    # Prompt lookup may draft more rows than were measured; such a row costs the average of the others.
    assert policy.plan(1, [[0.9] * 10]) == (11, True)
    assert policy.plan(1, [[0.9] * 5 + [0.01] * 5]) == (6, True)


def test_sampled_requests_have_their_own_table() -> None:
    costs = tuning(first=1.05, row=0.1).costs
    policy = DraftPolicy(Tuning(acceptance(), acceptance(sure=0.05), costs))
    assert policy.plan(1, [policy.prefixes(False, [SURE] * 3)])[0] == 4
    assert policy.plan(1, [policy.prefixes(True, [SURE] * 3)])[0] == 1


def test_where_drafting_cannot_pay_heads_never_draft() -> None:
    policy = DraftPolicy(tuning(first=3.0, row=2.0))
    for _ in range(1000):
        assert policy.plan(1, [[]]) == (1, False)
        policy.observe(1, 1, 1, False, 1)


def test_drafting_that_loses_is_paused_longer_each_time() -> None:
    """Few of 20,000 passes draft if no draft is ever accepted, so decoding is never much slower than plain."""
    policy = DraftPolicy(tuning(first=1.2, row=0.05))
    drafting = 0
    for _ in range(20_000):
        rows, drafts = policy.plan(1, [policy.prefixes(False, [SURE] * 3)])
        drafting += drafts
        policy.observe(1, 1, rows, drafts, 1)  # nothing is ever accepted
    assert 0 < drafting < 600
    for _ in range(5_000):  # the text turns
        rows, drafts = policy.plan(1, [policy.prefixes(False, [SURE] * 3 if drafts else [])])
        policy.observe(1, 1, rows, drafts, rows)
    assert drafts and rows == 4 and policy.rate > 2


@pytest.mark.parametrize(("without", "least", "most"), [(1.35, 0.0, 0.1), (1.05, 0.9, 0.98)])
def test_heads_pause_where_lookup_alone_is_faster(without: float, least: float, most: float) -> None:
    """A pass of five rows with heads commits 2 tokens; one of one row without them commits `without`."""
    policy = DraftPolicy(tuning(first=1.3, row=0.1))
    drafted = 0
    for _ in range(4000):
        _, drafting = policy.plan(1, [[0.5]])
        drafted += drafting
        policy.observe(1, 1, 5 if drafting else 1, drafting, 2 if drafting else without)  # type: ignore[arg-type]
    assert least < drafted / 4000 < most


@pytest.mark.parametrize(("slots", "most"), [(1, 8), (4, 3), (16, 1)])
def test_drafts_that_fall_far_short_of_the_prediction_are_paused_at_once(slots: int, most: int) -> None:
    policy = DraftPolicy(tuning(first=1.1, row=0.1))
    drafting = 0
    for _ in range(64):
        rows, drafts = policy.plan(slots, [policy.prefixes(False, [SURE] * 3)] * slots)
        drafting += drafts
        policy.observe(slots, slots, rows, drafts, slots)
    assert 0 < drafting <= most


def test_passes_that_were_not_planned_are_no_surprise() -> None:
    """Passes are not planned if every request names its number of heads."""
    policy = DraftPolicy(tuning(first=1.1, row=0.1))
    sure = policy.prefixes(False, [SURE] * 3)
    policy.plan(1, [sure])
    for _ in range(policy.PROBE - 1):
        policy.observe(1, 1, 1, True, 1)
    assert policy.plan(1, [sure])[1]


def test_drafts_that_fare_as_predicted_are_no_surprise() -> None:
    rng, given_up = random.Random(0), 0
    for _ in range(200):
        policy = DraftPolicy(tuning(first=1.1, row=0.1, table=acceptance(0.7, 0.7)))
        for _ in range(40):
            rows, drafts = policy.plan(1, [policy.prefixes(False, [SURE] * 3)])
            right = next((i for i in range(rows - 1) if rng.random() > 0.7), rows - 1)
            given_up += not drafts
            policy.observe(1, 1, rows, drafts, 1 + right)
    assert given_up < 0.01 * 200 * 40


def test_drafting_that_is_not_expected_to_pay_is_tried_late() -> None:
    """Feeding only likely drafts may pay although no fixed number of rows does."""
    policy = DraftPolicy(tuning(first=1.1, row=0.6))
    sure = policy.prefixes(False, [SURE] * 3)
    drafts = [policy.plan(1, [[]])[1]]
    for _ in range(policy.DOUBT):
        policy.observe(1, 1, 1, False, 1)
        drafts.append(policy.plan(1, [[]])[1])
    assert drafts == [False] * policy.DOUBT + [True]
    for _ in range(3 * policy.PROBE):
        rows, drafting = policy.plan(1, [sure])
        assert drafting
        policy.observe(1, 1, rows, drafting, rows)
    assert policy.plan(1, [sure])[1] and policy.plan(2, [sure] * 2)[1]  # with more slots too


@pytest.mark.parametrize("shape", ["transformer-parallel", "transformer-anticausal", "replicated"])
@pytest.mark.parametrize("compiled", [True, False])
def test_output_does_not_depend_on_the_policy(shape: str, compiled: bool) -> None:
    model = packed(shape, torch.float32, compiled)
    requests = [
        Request(PROMPT, 60),
        Request(PROMPT[:5], 50, Sampling(1.0, seed=3)),
        Request(PROMPT[2:], 40, Sampling(0.7, seed=4, top_k=9), heads=2),
        Request(PROMPT * 3, 30, heads=HEADS),
    ]
    plain = [
        generate_all(
            Engine(model, EngineConfig(exact=False)), [Request(r.prompt, r.max_new_tokens, r.sampling, heads=1)]
        )[0].tokens
        for r in requests
    ]
    for seed, slots in enumerate((1, 2, 3)):
        policy = RandomRows(seed)
        got = generate_all(
            Engine(model, EngineConfig(slots=slots, exact=backend_of(model).row_exact), policy=policy), requests
        )
        assert [g.tokens for g in got] == plain
        assert len(policy.chosen) >= 3 and sum(got[0].stats.accepted) >= 0


def test_fixed_shapes_leave_a_policy_nothing_to_choose() -> None:
    model = packed("replicated", torch.float32, False)
    engine = Engine(model, EngineConfig(exact=True), policy=RandomRows(0))
    assert engine.fixed_shapes and engine.policy is None
    assert generate_all(engine, [Request(PROMPT, 40)])[0].stats.passes < 40


def test_a_request_may_name_its_heads() -> None:
    model = packed("replicated", torch.float32)
    policy = DraftPolicy(tuning(first=3.0, row=2.0))  # would never draft
    engine = Engine(model, EngineConfig(exact=False), policy=policy)
    free, named = generate_all(engine, [Request(PROMPT, 60), Request(PROMPT, 60, heads=HEADS)])
    assert free.tokens == named.tokens
    assert free.stats.passes == 60 and sum(free.stats.drafted) == 0 and free.stats.rows_per_pass == 1
    assert named.stats.passes < 60 and named.stats.drafted[0] == named.stats.drafted[-1] == named.stats.passes - 1


class SkipsTheTenth(DraftPolicy):
    """Draft in every pass but the tenth."""

    def __init__(self) -> None:
        super().__init__(tuning(1.0, 0.01))
        self.passes = 0

    def plan(self, slots, prefixes, sampled=False):
        self.passes += 1
        return (1, False) if self.passes == 10 else (1 + max(map(len, prefixes)), True)


@pytest.mark.parametrize("shape", ["transformer-parallel", "replicated"])
def test_heads_whose_caches_have_gaps_stop_drafting(shape: str) -> None:
    """Transformer heads miss the keys of positions that they did not run on; the others keep none."""
    engine = Engine(packed(shape, torch.float32), EngineConfig(exact=False), policy=SkipsTheTenth())
    generation = engine.submit(Request(PROMPT, 200))
    drafted = []
    while engine.busy:
        engine.step()
        drafted.append(sum(generation.stats.drafted))
    assert drafted[9] > 0
    continues = shape == "replicated"
    assert (drafted[-1] > drafted[12]) == continues
    assert generation.heads == (HEADS if continues else 1)


def test_a_watcher_sees_every_draft_with_its_confidence() -> None:
    seen: list[tuple[float, int]] = []

    def watch(generation: Generation, fed: int, accepted: int) -> None:
        assert fed == HEADS - 1 == len(generation.window.confidences)
        seen.append((generation.window.confidences[0], accepted))

    model = packed("replicated", torch.float32)
    generation = generate_all(Engine(model, watch=watch), [Request(PROMPT, 200)])[0]
    assert len(seen) == generation.stats.passes - 1
    assert sum(accepted > 0 for _, accepted in seen) == generation.stats.accepted[0]
    # The confidence of head 2 in its draft; after training it predicts acceptance.
    assert all(0 < confidence <= 1 for confidence, _ in seen)
    right = [confidence for confidence, accepted in seen if accepted]
    wrong = [confidence for confidence, accepted in seen if not accepted]
    assert sum(right) / len(right) > sum(wrong) / len(wrong)


def test_sampled_passes_have_costs_of_their_own() -> None:
    table = acceptance()
    greedy, sampled = (PassCosts((1,), (1.0,), (costs,)) for costs in ((1.1, 1.2, 1.3, 1.4), (1.1, 2.5, 4.0, 5.5)))
    found = Tuning(table, table, greedy, sampled_costs=sampled)
    policy = DraftPolicy(found)
    sure = policy.prefixes(False, [SURE] * 3)
    assert policy.plan(1, [sure]) == (4, True)
    assert policy.plan(1, [sure], sampled=True) == (1, False)
    # The file keeps both; an older file has greedy costs alone.
    model = packed("replicated", torch.float32)
    content = json.loads(json.dumps(add_tuning(None, machine_key(model), found, {})))
    assert parse_tuning(content, model) == found
    del content["costs"][0]["sampled"]
    old = parse_tuning(content, model)
    assert old is not None and old.select(True)[1] == old.costs == greedy


def test_the_engine_reports_which_passes_are_sampled() -> None:
    reported = []

    class Records(RandomRows):
        def plan(self, slots, prefixes, sampled=False):
            reported.append(sampled)
            return super().plan(slots, prefixes, sampled)

    engine = Engine(packed("replicated", torch.float32), EngineConfig(slots=2, exact=False), policy=Records(0))
    generate_all(engine, [Request(PROMPT, 40), Request(PROMPT, 8, Sampling(1.0))])
    assert reported[0] and not reported[-1]


@pytest.mark.parametrize("tree", [None, DraftTree.parse("0,1,0.0,0.1")])
def test_a_timed_step_feeds_its_rows_at_the_same_length(tree: DraftTree | None) -> None:
    model = packed("transformer-parallel", torch.float32)
    drafting = Step(model, rows=3, slots=2, length=20, sampling=Sampling(0.8), tree=tree)
    plain = Step(model, drafting=False, length=20)
    for _ in range(4):
        drafting()
        plain()
        generations = [*drafting.generations, *plain.generations]
        assert [g.finished for g in generations] == [False] * 3
        lengths = drafting.engine.state.length_S.tolist()
        assert all(20 < length <= 23 for length in lengths) and plain.engine.state.length_S.tolist() == [21]
    assert generations[0].stats.rows_per_pass == 2.5  # the first pass has no drafts yet
    assert generations[2].stats.rows_per_pass == 1
