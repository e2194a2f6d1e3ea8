"""Hidden inputs: which ones, that targets stay, and that the draw belongs to step and row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headstart.data.batches import IGNORE, Batch, targets_of
from headstart.errors import UsageError
from headstart.objective.inputs import StepInputs
from headstart.training.auxiliary.masked_inputs import MaskConfig

MASK = 99


def answers(rows: int = 6, length: int = 12) -> Batch:
    """Rows of one document whose second half is the answer; every token is its place."""
    tokens = torch.arange(length + 2).repeat(rows, 1)
    is_target = torch.arange(length + 2).expand(rows, -1) >= length // 2
    targets = targets_of(tokens, torch.zeros_like(tokens), 2, is_target)
    places = torch.stack([torch.zeros(rows, dtype=torch.int64), torch.arange(rows)], 1)
    tokens = tokens[:, :length]
    return Batch(tokens, targets, torch.zeros_like(tokens), places=places)


def masked(batch: Batch, config: MaskConfig, token: int, seed: int, step: int) -> StepInputs:
    inputs = StepInputs.of_batch(batch, attention_within_documents=False)
    return config.auxiliary(token, seed).inputs(inputs, step)


def test_teacherless_hides_the_answer_and_nothing_else() -> None:
    batch = answers()
    hidden = masked(batch, MaskConfig("teacherless"), MASK, seed=0, step=0)
    assert hidden.tokens[0].tolist() == [0, 1, 2, 3, 4, 5] + [MASK] * 6
    assert torch.equal(hidden.targets, batch.targets) and batch.tokens[0, -1] == 11  # ours is left as it is
    assert hidden.targets[0, 5].tolist() == [6, 7]  # the first one is predicted from the prompt


def test_a_document_is_not_hidden_from_its_first_token_on() -> None:
    tokens, documents = torch.arange(8)[None], torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    batch = Batch(tokens[:, :7], targets_of(tokens, documents, 1), documents[:, :7])
    hidden = masked(batch, MaskConfig("teacherless"), MASK, 0, 0)
    assert hidden.tokens[0].tolist() == [0, MASK, MASK, 3, MASK, MASK, MASK]


def test_random_masks_hide_the_share_that_is_asked_for() -> None:
    batch = answers(rows=400, length=40)
    for everywhere in (False, True):
        config = MaskConfig("random", share=0.25, everywhere=everywhere)
        rates = (masked(batch, config, MASK, 0, 0).tokens == MASK).float().mean(0)
        assert rates[20:].mean() == pytest.approx(0.25, abs=0.02)
        assert rates[:20].mean() == pytest.approx(0.25 if everywhere else 0, abs=0.02)


def test_without_a_share_each_row_draws_its_own() -> None:
    hidden = masked(answers(rows=400, length=40), MaskConfig("random"), MASK, 0, 0).tokens[:, 20:] == MASK
    rates = hidden.float().mean(1)
    assert rates.mean() == pytest.approx(0.5, abs=0.05) and rates.std() == pytest.approx(12**-0.5, abs=0.05)


def test_rows_that_are_not_chosen_stay_whole() -> None:
    hidden = masked(answers(rows=400), MaskConfig("teacherless", rows=0.3), MASK, 0, 0).tokens == MASK
    counts = hidden.sum(1)
    assert set(counts.tolist()) == {0, 6} and (counts == 6).float().mean() == pytest.approx(0.3, abs=0.06)


def test_the_draw_is_of_seed_step_and_row_alone() -> None:
    batch, config = answers(), MaskConfig("random", share=0.5)
    whole = masked(batch, config, MASK, 3, 7).tokens
    order = torch.tensor([4, 1])
    part = replace(batch, tokens=batch.tokens[order], targets=batch.targets[order], places=batch.places[order])
    assert torch.equal(masked(part, config, MASK, 3, 7).tokens, whole[order])
    for seed, step in ((3, 8), (4, 7)):
        assert not torch.equal(masked(batch, config, MASK, seed, step).tokens, whole)
    assert not torch.equal(whole[0] == MASK, whole[1] == MASK)


def test_it_is_off_unless_asked_for() -> None:
    batch = answers()
    assert not MaskConfig().on
    assert (batch.targets[:, :4, 0] == IGNORE).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "other"}, "masked_inputs.kind 'other' is unknown; take one of none, teacherless, random"),
        ({"kind": "teacherless", "share": 0.5}, "masked_inputs.share is for masked_inputs.kind random"),
        ({"everywhere": True}, "masked_inputs.everywhere is for masked_inputs.kind random, not none"),
        ({"kind": "random", "share": 0.0}, "masked_inputs.share is 0.0"),
        ({"kind": "random", "rows": 1.5}, "masked_inputs.rows is 1.5"),
        ({"kind": "random", "token": -1}, "masked_inputs.token is -1"),
    ],
)
def test_wrong_settings_are_told(settings, said) -> None:
    with pytest.raises(UsageError) as error:
        MaskConfig(**settings)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
