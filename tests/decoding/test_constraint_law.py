"""Outputs sampled under a constraint follow the law of the masked model, whichever rule accepts drafts."""

from __future__ import annotations

import copy

import pytest
import torch
from constrained import LAW, distance
from laws import small_models
from policies import tuning

from headstart.decoding.constraints import Constraint, ConstraintRows
from headstart.decoding.drafters import constrained
from headstart.decoding.kernels.pack import pack
from headstart.decoding.policy.policy import DraftPolicy
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

pytest.importorskip("llguidance", reason="llguidance is not installed")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("match", {}), ("rejection", {}), ("block", {}), ("rejection", {"top_k": 2}), ("block", {"top_k": 2})],
)
def test_texts_follow_the_law_of_the_masked_model(kind: str, settings) -> None:
    raw, model = small_models()
    # 2 is far beyond p = 1e-3 for 15 cells and more.
    assert distance(kind, raw, model, LAW, **settings) < 2


class Ahead(DraftPolicy):
    """Feeds the drafts where it takes the second one for sure."""

    def __init__(self) -> None:
        super().__init__(tuning(1.0, 0.1))

    def prefixes(self, sampled, confidences):
        return [0.5**i for i, _ in enumerate(confidences, start=1)]

    def plan(self, slots, prefixes, sampled=False):
        # What is forced before anything is drawn is sure, and that the text is over then; nothing else is known beyond
        # what the heads are in general.
        assert prefixes[0] in ([], [0.5, 0.25], [1.0, 0.5], [1.0, 1.0], [1.0, 0.0])
        return 3 if len(prefixes[0]) > 1 and prefixes[0][1] > 0.9 * prefixes[0][0] else 1, True


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rejection", "block"])
def test_what_a_policy_knows_does_not_bend_the_law(kind: str) -> None:
    """That the second draft is forced is the doing of the first: it must not be a reason to feed both."""
    raw, model = small_models(layers=1, head_kind="linear")  # one request at a time: small passes
    constraint = Constraint.regex("[\x00-\x02](\x00\x01|\x01[\x00-\x02]|\x02\x02)")
    assert distance(kind, raw, model, constraint, 256, policy=Ahead(), slots=1) < 2


@pytest.mark.slow
def test_where_the_text_may_end_the_law_holds_too() -> None:
    torch.manual_seed(1)
    raw = Transformer(ModelConfig(vocab_size=256, dim=16, layers=5, attention_heads=2, heads=3, context=32)).double()
    constraint = Constraint.regex("a(b|cd?)?(e|b)?|bb?b?b?")
    for kind in ("match", "rejection", "block"):
        assert distance(kind, raw, pack(copy.deepcopy(raw)), constraint, temperature=3.0) < 2.2, kind


@pytest.mark.slow
def test_wrong_ways_do_not_follow_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: drafts weighed by their distributions without the mask; masks that come a row late."""
    raw, model = small_models()

    def without_its_distribution(state, slots, head, at, forbidden, count, row):
        logits = state.constraints.kept(slots.start, head)
        logits = logits.masked_fill(torch.from_numpy(forbidden), float("-inf"))[None, None]
        noise = state.sampling.draft_noise(*torch.tensor(at)[:, None], slots)
        return [int(state.sampling.choose(logits, noise, slots))], []

    with monkeypatch.context() as patch:
        patch.setattr(constrained, "draw_masked", without_its_distribution)
        assert distance("rejection", raw, model, LAW, count=1024) > 2.5
    apply = ConstraintRows.apply

    def late(self, logits, slots):
        before = self.forbidden_SWV.clone()
        self.forbidden_SWV[:, 1:] = before[:, :-1]
        result = apply(self, logits, slots)
        self.forbidden_SWV.copy_(before)
        return result

    monkeypatch.setattr(ConstraintRows, "apply", late)
    with pytest.raises(AssertionError):
        distance("match", raw, model, LAW)
