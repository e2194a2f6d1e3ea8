"""Settings of the objective as a run sees them: weights of 0, top-1 hits, z-loss, other loss backends."""

from __future__ import annotations

import math

import pytest
import torch

from headstart.errors import UsageError
from headstart.objective.backends import LossConfig
from headstart.objective.head_weights import HeadWeights
from headstart.training.config import BatchConfig
from headstart.training.loop import train
from headstart.training.step import Learner


@pytest.fixture
def results(monkeypatch) -> list:
    """Collect the results of the steps to come."""
    seen: list = []
    original = Learner.update
    monkeypatch.setattr(Learner, "update", lambda *args: seen.append(original(*args)) or seen[-1])
    return seen


def test_a_head_without_weight_has_no_loss_and_does_not_move(tiny, metrics, weights, results) -> None:
    """Its weights do not decay either: optimizers skip parameters without a gradient."""
    after = []
    for steps in (1, 2):
        config = tiny(f"{steps}", steps=steps, head_weights=HeadWeights(initial=(1, 0)))
        train(config)
        after.append(weights(config.run_dir))
    first = metrics(config.run_dir)[0]
    assert first["loss/head1"] > 0 and first["loss/head2"] is None
    assert not math.isnan(results[0].accuracies[0]) and math.isnan(results[0].accuracies[1])
    one, two = ({n: v for n, v in w.items() if n.startswith(".model.")} for w in after)
    moved = {name for name in one if not torch.equal(one[name], two[name])}
    assert moved == {name for name in one if not name.startswith(".model.heads.1.")} != set()


def test_z_loss_changes_the_gradient_and_not_the_report(tiny, results) -> None:
    for z_loss in (0.0, 0.1):
        train(tiny(f"z{z_loss}", steps=1, loss=LossConfig(z_loss=z_loss)))
    plain, z = results
    assert plain.losses == z.losses and plain.accuracies == z.accuracies  # of the same first weights
    assert plain.gradient_norm != z.gradient_norm


def test_accuracies_are_those_of_all_micro_batches(tiny, results) -> None:
    for name, batch in (("one", BatchConfig(rows=4)), ("four", BatchConfig(rows=1, accumulate=4))):
        train(tiny(name, steps=3, batch=batch))
    assert results[2].accuracies == pytest.approx(results[5].accuracies)
    assert any(0 < accuracy < 1 for accuracy in results[2].accuracies)


def test_another_backend_trains_alike_and_counts_no_hits(tiny, metrics, results) -> None:
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("torch.nn.functional.linear_cross_entropy is in torch 2.13 and newer")
    ours, theirs = tiny("ours", steps=2), tiny("theirs", steps=2, loss=LossConfig(backend="torch"))
    train(ours)
    train(theirs)
    assert all(math.isnan(accuracy) for result in results[2:] for accuracy in result.accuracies)
    for a, b in zip(metrics(ours.run_dir), metrics(theirs.run_dir)):
        assert a.get("loss/head2") == pytest.approx(b.get("loss/head2"), abs=1e-4)


def test_an_absent_backend_is_told_before_anything_is_made(tiny, monkeypatch) -> None:
    monkeypatch.setattr("headstart.objective.backends.find_spec", lambda name: None)
    config = tiny(loss=LossConfig(backend="cce"))
    with pytest.raises(UsageError, match=r"loss.backend cce needs cut_cross_entropy.*headstart\[kernels\]"):
        train(config)
    assert not config.run_dir.exists()
