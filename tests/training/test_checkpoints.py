from __future__ import annotations

import errno
import json
import math
import threading

import pytest
import torch

from headstart.errors import UsageError
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.training import checkpoint_state, checkpoints
from headstart.training.checkpoint_state import Position, read_state
from headstart.training.checkpoints import CheckpointWriter, all_steps, latest
from headstart.training.config import CheckpointConfig
from headstart.training.optimizer import OptimizerConfig, build_optimizers
from headstart.training.processes import Processes

ALONE = Processes(torch.device("cpu"))
CONFIG = ModelConfig(dim=16, layers=3, attention_heads=2, context=16, heads=2)


def make(config: ModelConfig = CONFIG, seed: int = 0, kind: str = "adamw"):
    torch.manual_seed(seed)
    model = Transformer(config)
    optimizers = build_optimizers(model, OptimizerConfig(kind=kind), torch.device("cpu"))
    model(torch.arange(8)[None], heads=2).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizers


def save(root, model, optimizers, position, **settings):
    """Write one checkpoint, wait for it and delete older ones."""
    writer = CheckpointWriter(root, model, optimizers, CheckpointConfig(**settings), ALONE)
    writer.save(position)
    writer.wait(needed=True)
    writer.rotate()
    writer.close()
    return root / checkpoints.name_of(position.step)


def restore(path, model, optimizers):
    return checkpoints.restore(path, model, optimizers, ALONE)


def restore_newest(root, model, optimizers):
    return checkpoints.restore_newest(root, model, optimizers, ALONE)


def test_everything_comes_back(tmp_path) -> None:
    model, optimizers = make(kind="muon")
    position = Position(step=3, tokens=96, skipped=2, skipped_in_a_row=1, data={"epoch": 1, "row": 4})
    torch.manual_seed(5)
    path = save(tmp_path, model, optimizers, position)
    drawn = torch.rand(3)
    other, other_optimizers = make(seed=1, kind="muon")
    assert restore(path, other, other_optimizers) == position
    assert torch.equal(torch.rand(3), drawn)
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)
    for old, new in zip(optimizers, other_optimizers):
        ours, theirs = old.state_dict()["state"], new.state_dict()["state"]
        assert ours.keys() == theirs.keys() and ours
        for i in ours:
            assert all(torch.equal(ours[i][name], theirs[i][name]) for name in ours[i])


@pytest.mark.parametrize("keep_last, kept", [(1, [8]), (2, [6, 8]), (0, [2, 4, 6, 8])])
def test_keep_last(tmp_path, keep_last, kept) -> None:
    model, optimizers = make()
    for step in (2, 4, 6, 8):
        save(tmp_path, model, optimizers, Position(step=step), keep_last=keep_last)
    assert list(all_steps(tmp_path)) == kept


def test_keep_every(tmp_path) -> None:
    model, optimizers = make()
    for step in (2, 4, 6, 8, 10):
        save(tmp_path, model, optimizers, Position(step=step), keep_last=1, keep_every=4)
    assert list(all_steps(tmp_path)) == [4, 8, 10]


def test_what_is_written_is_what_was_there(tmp_path, monkeypatch) -> None:
    """Training continues while the thread writes."""
    gate = threading.Event()
    original = checkpoints.dcp.FileSystemWriter.write_data

    def slow(self, *args):
        assert gate.wait(10)
        return original(self, *args)

    monkeypatch.setattr(checkpoints.dcp.FileSystemWriter, "write_data", slow)
    model, optimizers = make()
    before = [p.detach().clone() for p in model.parameters()]
    moment = optimizers[0].state[next(model.parameters())]["exp_avg"].clone()
    writer = CheckpointWriter(tmp_path, model, optimizers, CheckpointConfig(), ALONE)
    position = Position(step=2)
    writer.save(position)
    position.step, position.tokens = 3, 5
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers[0].step()
    assert not all_steps(tmp_path)
    gate.set()
    writer.close()
    other, other_optimizers = make(seed=3)
    assert restore(tmp_path / "step-00000002", other, other_optimizers) == Position(step=2)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters()))
    assert torch.equal(other_optimizers[0].state[next(other.parameters())]["exp_avg"], moment)


def test_torch_may_close_what_copies_the_weights(tmp_path, monkeypatch) -> None:
    """torch 2.11 does: what had copied the weights of one checkpoint failed at the next."""
    original = checkpoints.dcp.async_save

    def as_in_2_11(*args, async_stager, **more):
        answer = original(*args, async_stager=async_stager, **more)
        async_stager.close()
        return answer

    monkeypatch.setattr(checkpoints.dcp, "async_save", as_in_2_11)
    model, optimizers = make(kind="muon")
    writer = CheckpointWriter(tmp_path, model, optimizers, CheckpointConfig(), ALONE)
    for step in (2, 4):
        writer.save(Position(step=step))
        writer.wait(needed=True)
    writer.close()
    other, other_optimizers = make(seed=1, kind="muon")
    assert restore(tmp_path / "step-00000004", other, other_optimizers) == Position(step=4)


def test_one_that_cannot_be_written_is_told_and_tried_again(tmp_path, monkeypatch, capsys) -> None:
    model, optimizers = make()
    save(tmp_path, model, optimizers, Position(step=2))
    writer = CheckpointWriter(tmp_path, model, optimizers, CheckpointConfig(), ALONE)

    def full(self, *args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.dcp.FileSystemWriter, "write_data", full)
        writer.save(Position(step=4))
        writer.wait()
        assert "warning:" in (said := capsys.readouterr().err) and "the disk is full" in said
        writer.save(Position(step=4))
        with pytest.raises(UsageError, match="step-00000004: the disk is full"):
            writer.wait(needed=True)
    assert list(all_steps(tmp_path)) == [2] and len(list(tmp_path.iterdir())) == 1
    writer.save(Position(step=4))
    writer.close()
    assert list(all_steps(tmp_path)) == [2, 4]


def test_nothing_is_deleted_before_the_new_one_is_whole(tmp_path, monkeypatch) -> None:
    model, optimizers = make()
    save(tmp_path, model, optimizers, Position(step=2), keep_last=1)

    def fail(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr(checkpoints.torch, "save", fail)
    with pytest.raises(RuntimeError):
        save(tmp_path, model, optimizers, Position(step=4), keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_damaged_later_one_does_not_push_out_a_sound_one(tmp_path) -> None:
    model, optimizers = make()
    (tmp_path / "step-00000009").mkdir()
    for step in (2, 4):
        save(tmp_path, model, optimizers, Position(step=step), keep_last=1)
    assert list(all_steps(tmp_path)) == [4, 9]


def truncate(path) -> None:
    file = path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])


def scramble(path) -> None:
    file = path / ".metadata"
    file.write_bytes(bytes(len(file.read_bytes())))


def flip(path) -> None:
    """One bit of a weight: torch reads it without a word."""
    file = path / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x40
    file.write_bytes(content)


def empty(path) -> None:
    for file in path.iterdir():
        file.unlink()


def future(path) -> None:
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))


def listed(path) -> None:
    (path / "state.json").write_text("[]")


@pytest.mark.parametrize("damage", [truncate, scramble, flip, empty, future, listed])
def test_a_damaged_one_is_refused_or_passed(tmp_path, capsys, damage) -> None:
    run_dir, root = tmp_path, tmp_path / "checkpoints"
    model, optimizers = make()
    save(root, model, optimizers, Position(step=2))
    newest = save(root, model, optimizers, Position(step=4))
    damage(newest)
    with pytest.raises(UsageError, match=r"step-00000004: [^\n]*; (delete|give)[^\n]*$") as raised:
        restore(newest, *make())
    assert "\n" not in str(raised.value)
    if damage not in (scramble, flip):  # of the same size: seen only when it is read
        assert latest(run_dir) == root / "step-00000002"
    position = restore_newest(root, *make(seed=1))
    assert position == Position(step=2)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"warning: {newest}") and said[1] == f"resuming from {root}/step-00000002"
    damage(root / "step-00000002")
    end = "give another" if damage is future else f"there is no older one that is sound: move {root} away to start anew"
    with pytest.raises(UsageError, match=rf"step-00000002: [^\n]*; {end}"):
        restore_newest(root, *make())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["weights", "exp_avg", "momentum_buffer"])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path, capsys, part, value) -> None:
    root = tmp_path / "checkpoints"
    model, optimizers = make(kind="muon")
    save(root, model, optimizers, Position(step=2))
    states = [state for optimizer in optimizers for state in optimizer.state.values() if part in state]
    tensor = dict(model.named_parameters())["trunk.embedding.weight"].data if part == "weights" else states[0][part]
    tensor.view(-1)[3] = value
    newest = save(root, model, optimizers, Position(step=4))
    name = r"trunk\.embedding\.weight" if part == "weights" else rf"\S+ \({part}\)"
    with pytest.raises(UsageError, match=rf"step-00000004: damaged, {name} holds NaN or infinite values; delete it"):
        restore(newest, *make(kind="muon"))
    other, other_optimizers = make(seed=1, kind="muon")
    assert restore_newest(root, other, other_optimizers) == Position(step=2)
    assert all(p.isfinite().all() for p in other.parameters())
    capsys.readouterr()


def test_a_flipped_bit_of_state_json_is_found(tmp_path) -> None:
    """Bits all over the file: 11 of 150 were taken for another position."""
    position = Position(
        step=4, tokens=96, skipped=2, data={"epoch": 1, "row": 4}, history={"count": 4, "mean": 3.25, "variance": 0.5},
        sources=[{"tokens": "ab", "tokenizer": "cd"}],
    )  # fmt: skip
    path = save(tmp_path, *make(), position)
    file = path / "state.json"
    text = file.read_bytes()
    assert read_state(path).position == position
    for bit in range(0, 8 * len(text), 17):
        damaged = bytearray(text)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(UsageError, match="step-00000004: "):
            read_state(path)
    for length in range(0, len(text), 37):
        file.write_bytes(text[:length])
        with pytest.raises(UsageError, match="step-00000004: "):
            read_state(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 5},
        {"step": "4"},
        {"step": True},
        {"tokens": -1},
        {"skipped": None},
        {"skipped_in_a_row": [1]},
        {"data": {"epoch": 1, "sow": 4}},
        {"data": {"epoch": 1, "row": 4.0}},
        {"data": [1, 4]},
        {"history": {"count": 4, "mdan": 3.25, "variance": 0.5}},
        {"history": {"count": 4, "mean": None, "variance": 0.5}},
        {"history": {"count": 4, "mean": math.nan, "variance": 0.5}},
        {"history": None},
        {"sources": [1]},
        {"stop": 4},
    ],
)
@pytest.mark.parametrize("digested", [False, True], ids=["format 1", "format 2"])
def test_a_position_of_other_types_is_passed(tmp_path, capsys, changes, digested) -> None:
    """Also in checkpoints of format 1, whose state.json has no digest."""
    model, optimizers = make()
    save(tmp_path, model, optimizers, Position(step=2))
    newest = save(tmp_path, model, optimizers, Position(step=4))
    state = json.loads((newest / "state.json").read_text())
    state.pop("digest")
    state["position"] |= changes
    text = checkpoint_state._with_digest(state) if digested else json.dumps({**state, "format": 1})
    (newest / "state.json").write_text(text)
    assert restore_newest(tmp_path, *make(seed=1)) == Position(step=2)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"warning: {newest}") and said[1] == f"resuming from {tmp_path}/step-00000002"


def test_format_1_is_read(tmp_path) -> None:
    path = save(tmp_path, *make(), Position(step=4, data={"row": 3, "source0": 1, "source1": 2}))
    state = json.loads((path / "state.json").read_text())
    del state["digest"], state["position"]["sources"]
    (path / "state.json").write_text(json.dumps({**state, "format": 1}))
    assert restore(path, *make(seed=1)) == Position(step=4, data={"row": 3, "source0": 1, "source1": 2})


def test_one_of_another_shape_is_refused(tmp_path) -> None:
    path = save(tmp_path, *make(), Position(step=2))
    with pytest.raises(UsageError, match=r"step-00000002: a checkpoint of another model shape"):
        restore(path, *make(ModelConfig(dim=32, layers=3, attention_heads=2, context=16, heads=2)))


def test_none_at_all(tmp_path) -> None:
    assert latest(tmp_path) is None
    assert restore_newest(tmp_path / "checkpoints", *make()) is None
