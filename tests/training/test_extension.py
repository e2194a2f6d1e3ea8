"""Steps added to a finished run: the learning rate keeps its final value or warms up again, and a line says which."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest

from headstart.errors import UsageError
from headstart.objective.head_weights import HeadWeights
from headstart.training.checkpoint_state import read_state
from headstart.training.config import CheckpointConfig, ValidationConfig
from headstart.training.loop import train
from headstart.training.optimizer import OptimizerConfig
from headstart.training.schedule import extended_rate, learning_rate, rate_of
from headstart.training.step import Learner

COSINE = OptimizerConfig(lr=1e-2, warmup_steps=2)
WSD = replace(COSINE, schedule="wsd", decay_fraction=0.5)


def extended(config, steps: int, **optimizer):
    return replace(config, steps=steps, optimizer=replace(config.optimizer, **optimizer))


@pytest.fixture
def finished(tiny):
    """A run that is done after six steps."""

    def make(name: str = "run", **changes):
        settings = {"validation": ValidationConfig(every=0), "checkpoints": CheckpointConfig(every=0)}
        config = tiny(name, **{**settings, "optimizer": COSINE, **changes})
        train(config)
        return config

    return make


@pytest.fixture
def rates(metrics):
    return lambda config: [line["lr"] for line in metrics(config.run_dir) if "lr" in line]


@pytest.mark.parametrize("optimizer", [COSINE, WSD], ids=["cosine", "wsd"])
def test_the_final_rate_is_kept(finished, rates, capsys, optimizer) -> None:
    config = finished(optimizer=optimizer)
    before = rates(config)
    capsys.readouterr()
    train(extended(config, 9))
    assert rates(config) == [*before, *[3e-4] * 3]
    said = capsys.readouterr().err
    assert "learning rate 0.0003 in step 6, 0.0003 in step 7: the schedule had ended at step 6, and the steps" in said
    assert "added keep its final rate (--optimizer.extension rewarm warms up to 0.01 once more)" in said


@pytest.mark.parametrize("optimizer", [COSINE, WSD], ids=["cosine", "wsd"])
def test_or_it_warms_up_once_more(finished, rates, capsys, optimizer) -> None:
    config = extended(finished(optimizer=optimizer), 14, extension="rewarm")
    capsys.readouterr()
    train(config)
    assert "0.0003 in step 6, 0.005 in step 7: " in capsys.readouterr().err
    assert rates(config)[6:] == [learning_rate(step, 8, config.optimizer) for step in range(8)]
    assert rates(config)[7] == 1e-2 and rates(config)[-1] == pytest.approx(3e-4)


def test_a_warm_up_begins_at_the_final_rate() -> None:
    config = replace(COSINE, warmup_steps=100, extension="rewarm")
    found = [extended_rate(step, 1000, config) for step in range(1000)]
    assert min(found) == 3e-4 == found[0] and max(found) == 1e-2
    assert all(b - a < 1.1e-4 for a, b in pairwise(found))


@pytest.mark.parametrize("extension", ["hold", "rewarm"])
def test_a_stopped_extension_resumes_on_its_schedule(finished, rates, monkeypatch, capsys, extension) -> None:
    whole, broken = (extended(finished(name), 12, extension=extension) for name in ("whole", "broken"))
    train(whole)
    broken = replace(broken, checkpoints=CheckpointConfig(every=8))
    original, left = Learner.update, [4]

    def dying(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(*args)

    for steps in (1, 4):  # before the first checkpoint of the extension, and behind it
        left[0] = steps
        monkeypatch.setattr(Learner, "update", dying)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    monkeypatch.setattr(Learner, "update", original)
    capsys.readouterr()
    train(broken)
    assert rates(broken) == rates(whole)
    assert "learning rate" not in capsys.readouterr().err  # nothing has changed since the last start


def test_extensions_follow_one_another(finished, rates) -> None:
    config = finished()
    train(extended(config, 8))
    train(extended(config, 12, extension="rewarm"))
    train(extended(config, 14, extension="hold"))
    train(extended(config, 18, extension="rewarm"))
    again = [learning_rate(step, 4, COSINE) for step in range(4)]
    assert rates(config)[6:] == [3e-4, 3e-4, *again, 3e-4, 3e-4, *again]


def test_a_run_that_had_not_ended_has_its_schedule_planned_anew(finished, tiny, rates, capsys, monkeypatch) -> None:
    config = tiny(optimizer=COSINE, validation=ValidationConfig(every=0), checkpoints=CheckpointConfig(every=3))
    original = Learner.update

    def dying(*args):
        if rates(config)[3:]:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", dying)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    capsys.readouterr()
    train(replace(config, steps=12))
    assert rates(config)[3:] == [learning_rate(step, 12, COSINE) for step in range(3, 12)]
    before, after = learning_rate(2, 6, COSINE), learning_rate(3, 12, COSINE)
    said = f"learning rate {before:.3g} in step 3, {after:.3g} in step 4: the schedule is that of 12 steps instead of 6"
    assert said in capsys.readouterr().err


def test_a_finished_run_of_an_older_headstart(finished, rates, capsys) -> None:
    config = finished()
    file = config.run_dir / "checkpoints" / "step-00000006" / "state.json"
    state = json.loads(file.read_text())
    for name in ("lr", "planned", "extended", "extension"):
        del state["position"][name]
    del state["digest"]
    file.write_text(json.dumps({**state, "format": 1}))
    capsys.readouterr()
    train(extended(config, 8))
    assert "learning rate 0.0003 in step 6, 0.0003 in step 7: " in capsys.readouterr().err
    assert rates(config)[6:] == [3e-4, 3e-4]


def test_a_schedule_that_ends_at_0_needs_a_warm_up(finished) -> None:
    config = finished(optimizer=replace(COSINE, final_lr_ratio=0.0))
    with pytest.raises(UsageError, match=r"learning rate 0, .* train nothing; take --optimizer.extension rewarm$"):
        train(extended(config, 8))
    train(extended(config, 8, extension="rewarm"))


def test_the_head_weights_of_an_extension_are_the_final_ones(finished, monkeypatch) -> None:
    weights = HeadWeights(initial=(1, 1), final=(1, 0))
    config, seen, original = finished(head_weights=weights), [], Learner.update

    def spy(self, batches, weights, lr):
        seen.append(list(weights))
        return original(self, batches, weights, lr)

    monkeypatch.setattr(Learner, "update", spy)
    train(extended(config, 8))
    assert seen == [[1, 0], [1, 0]]


def test_the_position_records_the_plan(finished) -> None:
    config = finished()
    position = read_state(config.run_dir / "checkpoints" / "step-00000006").position
    assert (position.planned, position.extended) == (6, 0) and math.isclose(position.lr, rate_of(5, config))
    with pytest.raises(UsageError, match=r"optimizer.extension 'again' is unknown; take one of hold, rewarm"):
        OptimizerConfig(extension="again")  # type: ignore[arg-type]
