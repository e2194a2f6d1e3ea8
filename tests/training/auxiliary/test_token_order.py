"""Token order prediction: its loss and gradients are those of the definition, written out over the whole vocabulary."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headstart.data.batches import IGNORE
from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.objective.inputs import StepInputs, count_targets
from headstart.objective.objective import Objective
from headstart.objective.walk import walk_step
from headstart.training.auxiliary.base import StepAuxiliaries
from headstart.training.auxiliary.token_order import (
    TokenOrderConfig,
    linear_token_order,
)
from headstart.training.processes import Processes
from tests.reference import joint_step

V = 9
SMALL = ModelConfig(vocab_size=V, dim=8, layers=4, attention_heads=2, context=64, heads=3)


def slow_scores(targets_BT: Tensor, documents_BT: Tensor, window: int) -> Tensor:
    """(B, T, V): W - d where the token is the target at distance d - 1 for the first time, else -inf."""
    scores = torch.full((*targets_BT.shape, V), -math.inf, dtype=torch.float64)
    T = targets_BT.shape[1]
    for b, row in enumerate(targets_BT.tolist()):
        for t in range(T):
            for u in range(min(T, t + window) - 1, t - 1, -1):  # the nearest last, so that it stays
                if row[u] != IGNORE and documents_BT[b, u] == documents_BT[b, t]:
                    scores[b, t, row[u]] = window - (u - t + 1)
    return scores


def slow_loss(x: Tensor, weight: Tensor, targets_BT: Tensor, documents_BT: Tensor, window: int) -> Tensor:
    """Listwise loss with the softmax of the scores, as the paper writes it, summed over positions with a target."""
    scores = slow_scores(targets_BT, documents_BT, window)
    asked = targets_BT != IGNORE
    log_q = (x @ weight.T).log_softmax(-1)
    return -(scores[asked].softmax(-1) * log_q[asked]).sum()


def batch(time: int = 23) -> tuple[Tensor, Tensor]:
    """Targets with gaps, in rows of several documents."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, V, (3, time), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = IGNORE
    documents = (torch.rand(targets.shape, generator=generator) < 0.15).cumsum(1)
    documents[1] = 0
    return targets, documents


@pytest.mark.parametrize("window", [1, 2, 5, 23, 60, None])
@pytest.mark.parametrize("budget", [1, 2**26])
def test_it_is_the_definition(window: int | None, budget: int) -> None:
    targets, documents = batch()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 23, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, 8, generator=generator, dtype=torch.float64)
    found = []
    for function in (slow_loss, lambda *given: linear_token_order(*given, budget=budget)):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(*leaves, targets, documents, window or 23)
        (2.5 * loss).backward()
        found.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    for theirs, mine in zip(*found):
        assert mine.dtype == torch.float64 and torch.allclose(mine, theirs, rtol=1e-12, atol=1e-13)


def test_a_far_window_changes_nothing_that_float64_could_tell() -> None:
    """So targets end where exp(-d) does, whatever the window."""
    generator = torch.Generator().manual_seed(2)
    targets = torch.stack([torch.randperm(120, generator=generator) for _ in range(2)])
    x = torch.randn(2, 120, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(120, 4, generator=generator, dtype=torch.float64)
    documents = torch.zeros_like(targets)
    log_q, expected = (x @ weight.T).log_softmax(-1), torch.zeros((), dtype=torch.float64)
    for t in range(120):
        share = torch.exp(-torch.arange(120 - t, dtype=torch.float64))
        for b in range(2):
            expected -= (share / share.sum()) @ log_q[b, t, targets[b, t:]]
    assert torch.allclose(linear_token_order(x, weight, targets, documents), expected, rtol=1e-14)


@pytest.mark.parametrize("kind", ["transformer", "linear", "medusa"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_walk_with_it_is_joint_autograd_with_it(kind: str, tied: bool) -> None:
    torch.manual_seed(0)
    model = Transformer(replace(SMALL, head_kind=kind, tied=tied)).double()
    order = TokenOrderConfig(1.3, 6).auxiliary(0, 0)
    order.add_parameters(model)
    assert model.unembedding.order is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    next_tokens, documents = batch()
    tokens = torch.randint(0, V, next_tokens.shape)
    targets = torch.stack([next_tokens, next_tokens.roll(3, 1), next_tokens.roll(5, 1)], -1)
    counts, weights = count_targets(targets), [0.7, 1.0, 0.2]

    plain = joint_step(model, StepInputs(tokens, targets), counts, Objective(weights))
    latent = model.unembedding(model.latents(tokens, [1])[1], 1, using=lambda x, weight: x)
    loss = slow_loss(latent, model.unembedding.order, next_tokens, documents, 6)
    (loss * 1.3 * weights[0] / int(counts[0])).backward()
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    inputs = StepInputs(tokens, targets, documents, attention_within_documents=False)
    auxiliaries = StepAuxiliaries([order], model, [inputs], counts[0], Processes(torch.device("cpu")))
    seen = walk_step(model, inputs, counts, Objective(weights, auxiliaries=auxiliaries.losses))
    assert torch.allclose(seen.sums, plain.sums)  # what is reported of heads is theirs alone
    assert auxiliaries.means()["token_order"] == pytest.approx(loss.item() / int(counts[0]), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and theirs[name] is not None
        assert (parameter.grad - theirs[name]).norm() <= 1e-12 * theirs[name].norm(), name


def test_no_logits_tensor_and_no_targets_over_the_vocabulary_exist() -> None:
    """At a vocabulary of 20,000, a chunk of 16 of the 256 positions exists at a time."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple) else (out,):
                if isinstance(value, Tensor):
                    largest = max(largest, value.numel())
            return out

    x = torch.randn(1, 256, 4, requires_grad=True)
    weight = torch.randn(20_000, 4, requires_grad=True)
    targets = torch.randint(0, 20_000, (1, 256))
    with Watch():
        linear_token_order(x, weight, targets, torch.zeros_like(targets), budget=1).backward()
    assert largest == 16 * 20_000


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"weight": -1.0}, "token_order.weight is -1.0"), ({"window": 0}, "token_order.window is 0; it must be at least")],
)
def test_wrong_settings_are_told(settings, said) -> None:
    with pytest.raises(UsageError) as error:
        TokenOrderConfig(**settings)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
