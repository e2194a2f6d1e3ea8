"""Rows as others have them, against an obvious reference; and that the step adds the walk's gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headstart.data.batches import IGNORE
from headstart.errors import UsageError
from headstart.integrations.multi_token import collate_rows, multi_token_step, rows_of, step_counts
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.objective.inputs import StepInputs, count_targets
from headstart.objective.objective import Objective
from tests.reference import joint_step

CONFIG = ModelConfig(vocab_size=50, dim=16, layers=4, attention_heads=2, heads=3, context=64)


def make_model(kind: str = "transformer") -> Transformer:
    torch.manual_seed(0)
    wiring = "causal" if kind == "sequential" else "parallel"
    return Transformer(replace(CONFIG, head_kind=kind, wiring=wiring)).double()


def gradients(model: Transformer) -> list[Tensor]:
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    assert all(each is not None for each in found)
    return found  # type: ignore[return-value]


def batch(rows: int = 4, length: int = 12) -> dict[str, Tensor]:
    """Rows of different lengths, padded on the right, some tokens not to be predicted."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 50, (rows, length), generator=generator)
    labels = torch.where(torch.rand(rows, length, generator=generator) < 0.3, IGNORE, tokens)
    mask = (torch.arange(length) < torch.tensor([12, 5, 9, 2])[:rows, None]).long()
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask}


def slow_targets(given: dict[str, Tensor], heads: int) -> Tensor:
    tokens, labels, mask = given["input_ids"], given["labels"], given["attention_mask"]
    positions = given.get("position_ids")
    inside = torch.zeros_like(tokens) if positions is None else (positions == 0).cumsum(1)
    targets = torch.full((*tokens.shape, heads), IGNORE)
    for b in range(tokens.shape[0]):
        for t in range(tokens.shape[1]):
            for k in range(1, heads + 1):
                if t + k < tokens.shape[1] and mask[b, t + k] and inside[b, t] == inside[b, t + k]:
                    targets[b, t, k - 1] = labels[b, t + k]
    return targets


def test_targets_of_rows_as_hugging_face_has_them() -> None:
    given = batch()
    rows = rows_of(given, 3, ahead=2)
    assert torch.equal(rows.targets, slow_targets(given, 3)) and rows.documents is None
    assert rows.tokens.shape == (4, 14) and torch.equal(rows.tokens[:, :12], given["input_ids"])
    packed = {**given, "position_ids": torch.tensor([0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 1, 2]).expand(4, -1)}
    rows = rows_of(packed, 3)
    assert torch.equal(rows.targets, slow_targets(packed, 3))
    assert rows.documents is not None and rows.documents[0].tolist() == [1, 1, 1, 2, 3, 3, 3, 3, 3, 4, 4, 4]
    tokens = torch.arange(20)[None]
    rows = rows_of({"input_ids": tokens}, 3)  # T + n tokens: every head has a target everywhere
    assert rows.tokens.tolist() == [list(range(17))]
    assert all(torch.equal(rows.targets[..., k - 1], tokens[:, :17] + k) for k in (1, 2, 3))
    with pytest.raises(UsageError, match="padded on the right"):
        rows_of({**given, "attention_mask": given["attention_mask"].flip(1)}, 3)
    with pytest.raises(UsageError, match=r"labels \(4, 11\): must have the shape"):
        rows_of({**given, "labels": given["labels"][:, 1:]}, 3)


@pytest.mark.parametrize("kind", ["transformer", "sequential"])
def test_the_step_adds_the_gradients_of_joint_autograd(kind: str) -> None:
    model, given = make_model(kind), batch()
    targets = slow_targets(given, 3)
    seen = multi_token_step(model, **given, weights=[1.0, 0.5, 2.0])
    mine = gradients(model)
    read = torch.nn.functional.pad(given["input_ids"], (0, model.config.ahead), value=7)  # whatever stands there
    expected = joint_step(model, StepInputs(read, targets), count_targets(targets), Objective([1.0, 0.5, 2.0]))
    for a, b in zip(mine, gradients(model)):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    assert torch.equal(seen.counts, expected.counts) and torch.allclose(seen.sums, expected.sums)


def test_four_rows_alone_equal_four_at_once() -> None:
    model, given = make_model(), batch()
    multi_token_step(model, **given)
    at_once = gradients(model)
    alone = [{name: value[i : i + 1] for name, value in given.items()} for i in range(4)]
    counts = step_counts(alone, 3)
    assert torch.equal(counts, count_targets(slow_targets(given, 3))) and counts.tolist() != [4, 4, 4]
    seen = [multi_token_step(model, **each, counts=counts) for each in alone]
    for a, b in zip(at_once, gradients(model)):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    assert torch.equal(sum(each.counts for each in seen), counts)


def test_padding_and_neighbours_change_nothing() -> None:
    """A text packed behind another, or padded, gives the gradient that it gives alone."""
    model = make_model()
    a, b = list(range(10, 19)), [3, 1, 4, 1, 5, 9, 2, 6]
    for ids in (a, b):
        multi_token_step(model, torch.tensor([ids]), torch.tensor([ids]), counts=torch.tensor([15, 13, 11]))
    alone = gradients(model)
    multi_token_step(model, **collate_rows([{"input_ids": a}, {"input_ids": b}]))
    padded = gradients(model)
    row = {"input_ids": a + b, "position_ids": [*range(9), *range(8)]}
    multi_token_step(model, **collate_rows([row]))
    for one, two, three in zip(alone, padded, gradients(model)):
        assert torch.allclose(one, two, rtol=1e-9, atol=1e-12) and torch.allclose(one, three, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("label", [-1, -7, -101, 50, 10**12])
def test_labels_that_are_no_tokens_are_refused_where_they_count(label: int) -> None:
    """A label of -1, as nanoGPT ignores it, would be a target whose logit is 0; padding may hold anything."""
    model, given = make_model(), batch()
    given["labels"][0, 3] = label
    with pytest.raises(UsageError, match=f"labels hold {label}; the vocabulary has 50 tokens"):
        multi_token_step(model, **given)
    with pytest.raises(UsageError, match=f"input_ids hold {label}"):
        multi_token_step(model, torch.full((1, 9), label))
    assert all(parameter.grad is None for parameter in model.parameters())
    padded = batch()
    want = multi_token_step(model, **padded).sums
    padded["labels"][1, 8] = label  # behind its 5 tokens
    assert torch.equal(multi_token_step(model, **padded).sums, want)
