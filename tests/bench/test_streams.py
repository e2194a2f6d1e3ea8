from __future__ import annotations

from dataclasses import replace

import pytest

from bench import streams
from bench.streams import Synthetic, acceptance_table, share_right
from headstart.decoding.kernels.pack import pack
from headstart.decoding.policy.calibration import PassCosts, Tuning
from headstart.decoding.policy.policy import DraftPolicy
from headstart.decoding.policy.timing import random_model
from headstart.decoding.settings import Request, Sampling
from headstart.errors import UsageError
from headstart.model.config import ModelConfig

SIZES = ModelConfig(vocab_size=97, dim=32, layers=6, attention_heads=2, context=256, heads=4)


def requests(heads, lengths=(5, 9, 3), new_tokens=60, temperature=0.0):
    return [Request(tuple(range(1, n + 1)), new_tokens, Sampling(temperature, seed=n), heads=heads) for n in lengths]


def test_the_share_for_a_number_of_tokens_per_pass():
    share = share_right(3.5, 4)
    assert 1 + share + share**2 + share**3 == pytest.approx(3.5)
    assert share_right(1, 4) == pytest.approx(0) and share_right(4, 4) == pytest.approx(1)
    for rate in (0.5, 4.1):
        with pytest.raises(UsageError):
            share_right(rate, 4)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["transformer", "replicated"])
def test_drafts_are_right_at_the_rate_and_the_output_is_plain(kind, temperature):
    config = replace(SIZES, head_kind=kind)
    model = pack(random_model(config, "float32", "cpu"))
    outputs = streams.plain_outputs(model, requests(4, temperature=temperature))
    plain = streams.decode(model, requests(1, temperature=temperature))
    assert [output[:60] for output in outputs] == plain.tokens
    for rate in (1.0, 2.5, 4.0):
        runs = [
            streams.decode(
                model, requests(4, temperature=temperature), synthetic=Synthetic(outputs, share_right(rate, 4))
            )
            for _ in range(2)
        ]
        assert runs[0].tokens == plain.tokens
        counts = [[list(counts) for _, counts in run.stamps] for run in runs]
        assert counts[0] == counts[1]  # the same passes again
        assert streams.tokens_per_pass(runs[0].stamps) == pytest.approx(rate, rel=0.15)
    assert all(count == 4 for _, row in runs[0].stamps[1:-1] for count in row)  # all of them right


def test_a_policy_learns_that_drafts_do_not_pay():
    model = pack(random_model(SIZES, "float32", "cpu"))
    asked = requests(None, new_tokens=120)
    outputs = streams.plain_outputs(model, asked)
    table = acceptance_table(0.1, 4)
    costs = PassCosts((1, 3), (1.0, 1.0), ((1.5, 1.6, 1.7, 1.8),) * 2)
    policy = DraftPolicy(Tuning(table, table, costs))
    # Exact decoding without compiled kernels fixes the shapes of passes, and then no policy chooses them.
    stream = streams.decode(model, asked, exact=False, policy=policy, synthetic=Synthetic(outputs, 0.1))
    assert streams.tokens_per_pass(stream.stamps[40:]) == 1.0  # drafting pauses


def test_rates_and_gaps_by_hand():
    # Two rows; the second begins a pass later and ends a pass earlier.
    stamps = [(0.0, [1, 0]), (1.0, [1, 1]), (1.5, [2, 1]), (2.5, [1, 3]), (3.0, [4, 0])]
    assert [time for time, _ in streams.full(stamps)] == [1.0, 1.5, 2.5]
    assert streams.tokens_per_second(stamps) == 7 / 1.5
    assert streams.tokens_per_pass(stamps) == 7 / 4
    assert streams.gaps(stamps) == [0.5, 1.0]
    assert streams.tokens_per_second(stamps, [(0.0, [1]), (2.0, [3])]) == 10 / 3.5
    assert streams.p50_p95([0.003, 0.001, 0.002]) == "2 / 2.9" and streams.p50_p95([1.0]) == ""
