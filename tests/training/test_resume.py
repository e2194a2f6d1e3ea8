"""A run that was stopped in any way and resumes equals the run that was never stopped, bit for bit."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headstart.model.config import ModelConfig
from headstart.objective.head_weights import HeadWeights
from headstart.training import checkpoints
from headstart.training.config import BatchConfig, save_config
from headstart.training.interruption import Interrupted
from headstart.training.loop import train
from headstart.training.optimizer import OptimizerConfig
from headstart.training.step import Learner

TIED = ModelConfig(dim=16, layers=3, attention_heads=2, context=24, heads=2, tied=True)


class Killed(BaseException):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, action) -> None:
    """Calls `action` in the middle of the step that follows `step` finished ones."""
    original, calls = Learner.update, [0]

    def stopping(*args):
        calls[0] += 1
        if calls[0] == step + 1:
            action()
        return original(*args)

    monkeypatch.setattr(Learner, "update", stopping)


def die() -> None:
    raise Killed


def assert_same_run(a: Path, b: Path, metrics, weights) -> None:
    assert metrics(a) == metrics(b)
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() and any("exp_avg" in name for name in first)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    for file in ("model.safetensors", "heads/heads.safetensors"):
        assert (a / "model" / file).read_bytes() == (b / "model" / file).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch": BatchConfig(rows=2, accumulate=2)},
        {"optimizer": OptimizerConfig(kind="muon", lr=1e-2, warmup_steps=2)},
        {"head_weights": HeadWeights(curriculum="forward")},  # head 2 has never run when the checkpoint is written
        {
            "dtype": "bfloat16",
            "model": TIED,
        },
    ],
    ids=["adamw", "accumulate", "muon", "curriculum", "bfloat16-tied"],
)
def test_a_run_that_died_goes_on_exactly(tiny, metrics, weights, monkeypatch, capsys, changes) -> None:
    whole, broken = tiny("whole", **changes), tiny("broken", **changes)
    train(whole)
    with monkeypatch.context() as patch:
        stop_at(patch, 3, die)  # one step past the checkpoint of step 2: its line must be cut off
        with pytest.raises(Killed):
            train(broken)
    assert [line["step"] for line in metrics(broken.run_dir)] == [1, 2, 2, 3]
    capsys.readouterr()
    train(broken)
    assert "resuming from" in capsys.readouterr().err
    assert_same_run(whole.run_dir, broken.run_dir, metrics, weights)


def test_the_data_order_over_epochs_survives(tiny, metrics, monkeypatch) -> None:
    changes = {"batch": BatchConfig(rows=160), "steps": 4}  # 10 kB of text: an epoch is under 3 steps
    seen: dict[str, list[torch.Tensor]] = {"whole": [], "broken": []}
    original = Learner.update

    def record(name):
        def step(self, batches, *rest):
            seen[name] += [batch.tokens.clone() for batch in batches]
            if name == "broken" and len(seen[name]) == 4:
                seen[name].pop()
                raise Killed
            return original(self, batches, *rest)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", record("whole"))
        train(tiny("whole", **changes))
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", record("broken"))
        with pytest.raises(Killed):
            train(tiny("broken", **changes))
        assert len(seen["broken"]) == 3
        del seen["broken"][2:]  # step 3 ran after the checkpoint of step 2, so it runs again
        patch.setattr(Learner, "update", record("whole_again"))
        seen["whole_again"] = seen["broken"]
        train(tiny("broken", **changes))
    assert len(seen["whole"]) == len(seen["broken"]) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen["whole"], seen["broken"]))
    assert not torch.equal(seen["whole"][0], seen["whole"][3])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_names_the_command(tiny, metrics, weights, monkeypatch, number) -> None:
    whole, broken = tiny("whole"), tiny("broken run")
    train(whole)
    before = signal.getsignal(number)  # of a pytest that a script started in the background: SIGINT is ignored
    with monkeypatch.context() as patch:
        stop_at(patch, 2, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted) as stopped:
            train(broken)
    assert stopped.value.status == {signal.SIGINT: 130}.get(number, 75)
    assert "step 3" in str(stopped.value) and "\n" not in str(stopped.value)
    assert f"headstart train '{broken.run_dir}/config.yaml' --run-dir '{broken.run_dir}'" in str(stopped.value)
    assert (broken.run_dir / "checkpoints" / "step-00000003").is_dir()
    assert signal.getsignal(number) == before
    train(broken)
    assert_same_run(whole.run_dir, broken.run_dir, metrics, weights)


def test_a_second_signal_stops_at_once(tiny, monkeypatch) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    stop_at(monkeypatch, 2, twice)
    with pytest.raises(KeyboardInterrupt):
        train(tiny())


KILLED = """
import os, signal, shutil, sys
from pathlib import Path
from headstart import fileio
from headstart.training import checkpoints, loop
from headstart.training.config import load_config

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def at_step_4(original, before=False):
    def call(*args, **kwargs):
        here = any("step-00000004" in str(a) for a in (*args, *kwargs.values()))
        if not here:
            return original(*args, **kwargs)
        if not before:
            original(*args, **kwargs)
        kill()
    return call

moment = sys.argv[2]
if moment == "tensors written":
    writer = checkpoints.CheckpointWriter
    finish = writer._finish
    def tensors_written(self, tensors, stager, path, *rest):
        tensors.result()
        if "step-00000004" in path.name:
            kill()
        finish(self, tensors, stager, path, *rest)
    writer._finish = tensors_written
elif moment == "before the rename":
    fileio.os.replace = at_step_4(os.replace, before=True)
elif moment == "after the rename":
    fileio.os.replace = at_step_4(os.replace)
elif moment == "while the old one is deleted":
    original = shutil.rmtree
    def half(path, **kwargs):
        if Path(path).name == "step-00000002":
            (Path(path) / "state.json").unlink()
            kill()
        original(path, **kwargs)
    checkpoints.shutil.rmtree = half
loop.train(load_config(sys.argv[1]))
"""


@pytest.mark.parametrize(
    "moment", ["tensors written", "before the rename", "after the rename", "while the old one is deleted"]
)
def test_kill_9_during_a_save(tiny, metrics, weights, tmp_path, forks, moment) -> None:
    from headstart.training.config import CheckpointConfig

    one_kept = CheckpointConfig(every=2, keep_last=1)
    whole, broken = tiny("whole", checkpoints=one_kept), tiny("broken", checkpoints=one_kept)
    train(whole)
    save_config(broken, tmp_path / "broken.yaml")
    arguments = [str(tmp_path / "broken.yaml"), moment]
    status, said = forks.run(tmp_path / "said.txt", tmp_path, program=KILLED, arguments=arguments)
    assert status == -signal.SIGKILL, said
    newest = {"tensors written": 2, "before the rename": 2}.get(moment, 4)
    assert checkpoints.latest(broken.run_dir) == broken.run_dir / "checkpoints" / f"step-{newest:08d}"
    train(broken)
    assert_same_run(whole.run_dir, broken.run_dir, metrics, weights)
    assert not list((broken.run_dir / "checkpoints").glob(".*"))


def test_more_steps_go_on(tiny, metrics, capsys) -> None:
    config = tiny(steps=4)
    assert train(config) == config.run_dir / "model"
    capsys.readouterr()
    before = (config.run_dir / "model" / "model.safetensors").read_bytes()
    assert train(config) == config.run_dir / "model"
    assert "already trained for 4 steps" in capsys.readouterr().err
    train(replace(config, steps=6))
    assert "steps 4 -> 6" in capsys.readouterr().err
    assert [line["step"] for line in metrics(config.run_dir) if "lr" in line] == [1, 2, 3, 4, 5, 6]
    assert (config.run_dir / "model" / "model.safetensors").read_bytes() != before


def test_a_changed_learning_rate_takes_effect(tiny, metrics, monkeypatch) -> None:
    config = tiny()
    with monkeypatch.context() as patch:
        stop_at(patch, 3, die)
        with pytest.raises(Killed):
            train(config)
    decayed: list[float] = []
    original = Learner.update

    def spy(self, *rest):
        decayed.append(self.optimizers[-1].param_groups[0]["weight_decay"])
        return original(self, *rest)

    monkeypatch.setattr(Learner, "update", spy)
    train(replace(config, optimizer=OptimizerConfig(lr=1e-3, warmup_steps=2, weight_decay=0.5)))
    rates = [line["lr"] for line in metrics(config.run_dir) if "lr" in line]
    assert rates[1] == 1e-2 and max(rates[2:]) < 1e-3
    assert set(decayed) == {0.5}


def test_a_finished_run_without_its_model_directory_writes_it_again(tiny, tmp_path) -> None:
    config = tiny()
    model = train(config)
    model.rename(tmp_path / "moved")
    train(config)
    for file in ("model.safetensors", "heads/heads.safetensors"):
        assert (model / file).read_bytes() == (tmp_path / "moved" / file).read_bytes()


def test_a_full_disk_leaves_the_checkpoint_before(tiny, metrics, weights, monkeypatch, capsys) -> None:
    import errno

    whole, broken = tiny("whole"), tiny("broken")
    train(whole)
    original = checkpoints.dcp.FileSystemWriter.write_data

    def full(self, *args):
        if "step-00000004" in str(self.path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.dcp.FileSystemWriter, "write_data", full)
        stop_at(patch, 5, die)
        with pytest.raises(Killed):
            train(broken)
    said = capsys.readouterr().err
    assert "warning:" in said and "step-00000004: the disk is full" in said
    assert sorted(path.name for path in (broken.run_dir / "checkpoints").iterdir()) == ["step-00000002"]
    train(broken)
    assert_same_run(whole.run_dir, broken.run_dir, metrics, weights)
