"""Register tokens: nobody sees them, they see what they should, and the walk's gradients are those of autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.data.batches import IGNORE, Batch, targets_of
from headstart.errors import UsageError
from headstart.model.attention import DocumentAttention, RegisterAttention, causal_attention
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.objective.inputs import StepInputs, count_targets
from headstart.objective.objective import Objective
from headstart.objective.walk import walk_step
from headstart.training.auxiliary.base import StepAuxiliaries
from headstart.training.auxiliary.registers import RegisterConfig
from headstart.training.processes import Processes
from tests.models import random_model
from tests.reference import joint_step

V = 31
SMALL = ModelConfig(vocab_size=V, dim=16, layers=4, attention_heads=4, kv_heads=2, context=64, heads=2)
REGISTER = V - 1
CONFIG = RegisterConfig(weight=0.6, offsets=(1, 4), share=0.5)


def batch(rows: int = 3, length: int = 13) -> Batch:
    """Rows of two documents each, but for the first, in which a part is no target."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, V - 1, (rows, length + 2), generator=generator)
    documents = (torch.arange(length + 2) >= 5).long().repeat(rows, 1)
    documents[0] = 0
    is_target = torch.ones_like(tokens, dtype=torch.bool)
    is_target[0, :4] = False
    places = torch.stack([torch.zeros(rows, dtype=torch.int64), torch.arange(rows)], 1)
    targets = targets_of(tokens, documents, 2, is_target)
    return Batch(tokens[:, :length], targets, documents[:, :length], places=places)


def with_registers(batch: Batch, config: RegisterConfig, token: int, seed: int, step: int, within=False) -> StepInputs:
    inputs = StepInputs.of_batch(batch, attention_within_documents=within)
    return config.auxiliary(token, seed).inputs(inputs, step)


def lively(**changes: Any) -> Transformer:
    return random_model(replace(SMALL, **changes), dtype=torch.float64)


def one_by_one(model: Transformer, given: StepInputs, row: int, r: int, within: bool) -> Tensor:
    """Logits of a register computed as a row of its own: the tokens that it sees, and it behind them."""
    registers = given.registers
    assert registers is not None
    at, position = int(registers.after[row, r]), int(registers.positions[row, r])
    tokens = torch.cat([given.tokens[row, : at + 1], registers.tokens[row, r : r + 1]])[None]
    documents = torch.cat([given.documents[row, : at + 1], given.documents[row, at : at + 1]])[None]
    attend = DocumentAttention(documents) if within else causal_attention
    rotary = model.rotary(torch.tensor([*range(at + 1), position]), torch.float64)
    z = model.trunk(tokens, rotary, lambda layer: attend)
    for k in model.path(1):
        z = model.head(k)(z, rotary, attend)
    return model.unembedding(z)[0, -1]


def slow_loss(model: Transformer, given: StepInputs, within: bool) -> Tensor:
    assert given.registers is not None
    losses = []
    for row, targets in enumerate(given.registers.targets.tolist()):
        for r, target in enumerate(targets):
            if target != IGNORE:
                losses.append(F.cross_entropy(one_by_one(model, given, row, r, within), torch.tensor(target)))
    return torch.stack(losses).sum()


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"head_kind": "linear"}, {"wiring": "anticausal"}, {"tied": True}, {"window": 4, "local_rope_theta": 100.0}],
    ids=["transformer", "linear", "anticausal", "tied", "sliding"],
)
def test_the_walk_with_them_is_autograd_over_rows_of_their_own(changes: dict[str, Any], within: bool) -> None:
    """A register in a row of its own sees just what it is meant to see."""
    model, given = lively(**changes), with_registers(batch(), CONFIG, REGISTER, 0, 0, within)
    counts = count_targets(given.targets)
    documents = given.documents if within else None
    assert given.registers is not None
    asked = (given.registers.targets != IGNORE).sum()
    joint_step(model, StepInputs(given.tokens, given.targets, documents), counts)
    slow = slow_loss(model, given, within)
    (slow * CONFIG.weight / int(asked)).backward()
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    alone = Processes(torch.device("cpu"))
    auxiliaries = StepAuxiliaries([CONFIG.auxiliary(REGISTER, 0)], model, [given], counts[0], alone)
    seen = walk_step(model, given, counts, Objective(auxiliaries=auxiliaries.losses))
    assert auxiliaries.means()["registers"] == pytest.approx(slow.item() / int(asked), rel=1e-5)
    assert torch.equal(seen.counts, counts)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and theirs[name] is not None
        assert (parameter.grad - theirs[name]).norm() <= 1e-12 * theirs[name].norm(), name


@pytest.mark.parametrize("within", [False, True])
def test_what_ordinary_positions_say_is_the_same_with_and_without_them(within: bool) -> None:
    model, given = lively(), with_registers(batch(), replace(CONFIG, share=1.0), REGISTER, 0, 0)
    documents, registers = given.documents if within else None, given.registers
    assert registers is not None
    T = given.tokens.shape[1]
    plain = model(given.tokens, heads=2, documents_BT=documents)
    ordinary = DocumentAttention(given.documents) if within else causal_attention
    attend = RegisterAttention(ordinary, T, registers.after, documents)
    positions = torch.cat([torch.arange(T).expand(3, -1), registers.positions], 1)
    rotary = model.rotary(positions, torch.float64)

    def logits() -> Tensor:
        z = model.trunk(torch.cat([given.tokens, registers.tokens], 1), rotary, lambda layer: attend)
        return torch.stack([model.unembedding(model.head(k)(z, rotary, attend), k)[:, :T] for k in (1, 2)], 2)

    first = logits()
    assert torch.allclose(first, plain, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        model.trunk.embedding.weight[REGISTER] += 1
    assert torch.equal(logits(), first)  # nothing of a register reaches them, to the bit


def test_registers_stand_where_there_is_something_to_predict() -> None:
    given = with_registers(batch(), CONFIG, REGISTER, seed=1, step=2)
    registers = given.registers
    assert registers is not None and registers.after.shape == (3, 6)
    assert (registers.tokens == REGISTER).all() and (registers.after.diff(dim=1) > 0).all()
    offsets = registers.positions - registers.after + 1
    assert all(len(set(row)) == 1 for row in offsets.tolist()) and 1 <= offsets.min() <= offsets.max() <= 4
    for row in range(3):
        for after, offset, target in zip(registers.after[row], offsets[row], registers.targets[row].tolist()):
            ahead = int(after + offset)
            if target != IGNORE:
                if ahead < 13:  # the token at that distance, in the same document
                    assert (
                        target == given.tokens[row, ahead]
                        and given.documents[row, ahead] == given.documents[row, after]
                    )
                assert row > 0 or ahead >= 4
    assert (registers.targets != IGNORE).sum() >= 3 * 5


def test_the_draw_is_of_seed_step_and_row_alone() -> None:
    whole = with_registers(batch(), CONFIG, REGISTER, 3, 7).registers
    given = batch()
    part = replace(
        given,
        tokens=given.tokens[1:],
        targets=given.targets[1:],
        documents=given.documents[1:],
        places=given.places[1:],
    )
    again = with_registers(part, CONFIG, REGISTER, 3, 7).registers
    assert whole is not None and again is not None
    assert all(torch.equal(a[1:], b) for a, b in zip(vars(whole).values(), vars(again).values()))
    other = with_registers(given, CONFIG, REGISTER, 3, 8).registers
    assert other is not None and not torch.equal(other.after, whole.after)
    assert not RegisterConfig().on


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weight": -0.1}, "registers.weight is -0.1"),
        ({"offsets": (0, 3)}, "registers.offsets is [0, 3]; it must be [least, largest], both at least 1"),
        ({"offsets": (4, 3)}, "registers.offsets is [4, 3]"),
        ({"share": 0.0}, "registers.share is 0.0"),
        ({"token": -2}, "registers.token is -2"),
    ],
)
def test_wrong_settings_are_told(settings, said) -> None:
    with pytest.raises(UsageError) as error:
        RegisterConfig(**settings)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
